"""The cache of prompt embeddings.

It holds the encoder's rows, resumes where it stopped, and refuses another model's or dataset's
files. test_train.py shows that training with it equals training without it, bit for bit.
"""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
from tiny_checkpoint import (
  ROOT,
  assert_trees_equal,
  overrides,
  tiny_config,
  write_flux,
  write_network,
)

from dancegrpo_jax import main, programs
from dancegrpo_jax.assembly import encoding, loading
from dancegrpo_jax.assembly.encoding import as_examples
from dancegrpo_jax.checkpoints import components, weights
from dancegrpo_jax.data import prompt_embeddings as disk
from dancegrpo_jax.data import prompts
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.errors import ConfigError


@pytest.fixture
def small_parts(monkeypatch):
  monkeypatch.setattr(disk, "PART", 3)


# With guidance, so that negative prompts are encoded, too, and without a reward that has a text
# encoder.
GUIDED = {
  "sampler__guidance_scale": 3.0,
  "data__negative_prompt": "grey",
  "reward__terms": (("compressibility", 1.0),),
  "data__held_out": "",
}


def open_cache(config, workdir):
  """The encoder with a cache, for the config's prompts."""
  pipeline, mesh = loading.build_pipeline(config), sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    return encoding.cached_encoder(config, workdir, pipeline, prompts.read_examples(config), mesh)


def test_an_interrupted_cache_goes_on(tiny_models, tmp_path, monkeypatch, small_parts):
  config = tiny_config(tiny_models, **GUIDED, data__cache_folder=tmp_path / "cache")
  written = []
  write = disk.write

  def interrupted(folder, leaves, part, texts, arrays):
    if part == 1 and not written[1:]:
      written.append("interrupted")
      raise KeyboardInterrupt
    written.append(part)
    write(folder, leaves, part, texts, arrays)

  monkeypatch.setattr(disk, "write", interrupted)
  with pytest.raises(KeyboardInterrupt):
    open_cache(config, tmp_path)
  encode = open_cache(config, tmp_path)
  assert written == [0, "interrupted", 1, 2]  # 8 prompts and the negative prompt
  pipeline, mesh = loading.build_pipeline(config), sharding.make_mesh(config.mesh)
  vocabulary = pipeline.components["text_encoder"].abstract["embeddings"]["token_embedding"][
    "embedding"
  ]
  assert vocabulary.shape not in {x.shape for x in jax.live_arrays()}  # the encoder was freed
  monkeypatch.setattr(components, "read_component", None)  # a complete cache needs no weights
  again = open_cache(config, tmp_path)
  texts = ["a red boat", "grey", "a red cat", "a red boat"]
  assert_trees_equal(again(as_examples(texts)), encode(as_examples(texts)))
  monkeypatch.undo()
  examples = prompts.read_examples(config)[3:7]
  with jax.set_mesh(mesh):
    params = loading.read(config, pipeline, pipeline.encoders, mesh)
    program = programs.encoder(config, pipeline, mesh)
    expected = encoding.conditioning(
      config, lambda examples: program(params, pipeline.prepare(examples)), examples
    )
  actual = encoding.conditioning(config, encode, examples)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), actual, expected)
  assert (
    actual.positive.shape == actual.negative.shape == (4, 8, 16)
    and actual.positive.sharding == expected.positive.sharding
  )


def test_flux_rows_in_bfloat16(tmp_path, tiny_models):
  """Two encoders, and a dtype that is not among numpy's."""
  folder = write_flux(tmp_path / "flux")
  config = tiny_config(
    None,
    data__prompts=tiny_models.prompts,
    model__family="flux",
    model__checkpoint=folder,
    model__text_length=8,
    model__frozen_dtype="bfloat16",
    sampler__kind="flow",
    reward__terms=(("compressibility", 1.0),),
  )
  encode = open_cache(config, tmp_path)
  pipeline = loading.build_pipeline(config)
  mesh = sharding.make_mesh(config.mesh)
  texts = [example.prompt for example in prompts.read_examples(config)][:4]
  with jax.set_mesh(mesh):
    params = loading.read(config, pipeline, pipeline.encoders, mesh)
    expected = programs.encoder(config, pipeline, mesh)(
      params, pipeline.prepare(as_examples(texts))
    )
  rows = encode(as_examples(texts))
  assert "tensorflow" not in sys.modules
  assert rows["text"].dtype == jax.numpy.bfloat16 and rows["text"].shape == (4, 8, 24)
  assert_trees_equal(rows, expected)


@pytest.fixture
def other(tiny_models, tmp_path):
  """`(what) -> (folders, fragments of the message)`: the tiny models with one change."""

  def change(what: str):
    folders = tiny_models._replace(model=tmp_path / "other-sd", prompts=tmp_path / "other.txt")
    shutil.copytree(tiny_models.model, folders.model)
    shutil.copy(tiny_models.prompts, folders.prompts)
    if what == "prompts":
      folders.prompts.write_text(folders.prompts.read_text() + "a green cat\n")
      return folders, ("other prompts (9 texts", "this run has 10")
    if what == "weights":
      text = json.loads((folders.model / "text_encoder" / "config.json").read_text())
      write_network(folders.model / "text_encoder", text, seed=9)
      return folders, ("another text encoder", "other-sd")
    merges = folders.model / "tokenizer" / "merges.txt"
    merges.write_text("\n".join(merges.read_text().splitlines()[:2]) + "\n")
    return folders, ("another tokenizer",)

  return change


@pytest.mark.parametrize("what", ["prompts", "weights", "tokenizer"])
def test_a_foreign_cache_is_refused_before_weights_are_read(
  what, tiny_models, other, tmp_path, monkeypatch, capsys
):
  folder = tmp_path / "cache"
  open_cache(tiny_config(tiny_models, **GUIDED, data__cache_folder=folder), tmp_path)
  folders, words = other(what)
  changes = GUIDED | {"data__cache_folder": folder, "data__cache_embeddings": True}
  monkeypatch.setattr(components, "read_component", None)
  argv = [f"--config={ROOT / 'configs' / 'emoji_clip.py'}:tiny", f"--workdir={tmp_path / 'run'}"]
  capsys.readouterr()
  assert main.main(argv + [f"--config.{word}" for word in overrides(folders, **changes)]) == 2
  (line,) = capsys.readouterr().err.strip().splitlines()
  assert line.startswith(f"error: config.data.cache_folder = '{folder}': belongs to ")
  assert all(word in line for word in (*words, "name another folder, or delete this one"))
  assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_and_a_damaged_part_are_refused(tiny_models, tmp_path):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.txt").write_text("years of work")
  with pytest.raises(ConfigError, match="is not empty and has no identity.json"):
    open_cache(tiny_config(tiny_models, **GUIDED, data__cache_folder=tmp_path / "mine"), tmp_path)
  config = tiny_config(tiny_models, **GUIDED, data__cache_folder=tmp_path / "cache")
  open_cache(config, tmp_path)
  for file in (tmp_path / "cache").rglob("*.array_record*"):
    file.write_bytes(b"")
  with pytest.raises(ConfigError, match="part_00000.* is damaged"):
    open_cache(config, tmp_path)


def test_fingerprint(tmp_path):
  """It covers the size and evenly spread blocks, so that a change of either is noticed.

  Small files are read completely.
  """
  file, data = tmp_path / "weights", bytearray(np.random.default_rng(0).bytes(1000))
  prints = set()
  for change in (None, 0, 500, 999):
    copy = bytearray(data)
    if change is not None:
      copy[change] ^= 1
    file.write_bytes(copy)
    prints.add(weights.fingerprint([file]))
    prints.add(weights.fingerprint([file], blocks=3, size=100) if change in (0, 500, 999) else "")
  assert len(prints) == 8

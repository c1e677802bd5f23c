"""Weight files as trainers and libraries leave them: names with prefixes of wrappers, state_dicts
among other things, pickled shards, and the names that an index of shards has had over the years.

Every file is made of the same tensors, and every one must give the same parameters.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from dancegrpo_jax.checkpoints import hub, weight_files, weights
from dancegrpo_jax.checkpoints.networks import abstract_params
from dancegrpo_jax.conversion.table import expected_sources
from dancegrpo_jax.conversion.tables.clip import CLIP_TEXT
from dancegrpo_jax.errors import ConversionError
from dancegrpo_jax.pipelines.layout import Layout

CONFIG = {
  "architectures": ["CLIPTextModel"],
  "vocab_size": 40,
  "max_position_embeddings": 8,
  "hidden_size": 16,
  "intermediate_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
}
NAME = "CLIPTextModel"
ABSTRACT = abstract_params(CONFIG)


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  expected = expected_sources(CLIP_TEXT, weights.specs(ABSTRACT))
  return {name: rng.standard_normal(x.shape, np.float32) for name, x in expected.items()}


@pytest.fixture(scope="module")
def params(tensors, tmp_path_factory):
  folder = tmp_path_factory.mktemp("plain")
  save_file(tensors, folder / "model.safetensors")
  return weights.load(folder, NAME, ABSTRACT)


def assert_loads(path: Path, params, **options) -> None:
  loaded = weights.load(path, NAME, ABSTRACT, **options)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), loaded, params)


def in_torch(tensors: dict) -> dict:
  return {name: torch.tensor(value) for name, value in tensors.items()}


# ---- Names


@pytest.mark.parametrize(
  "prefix",
  [
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.",
    "model.module.",
    "state_dict.module.",
    "ema_model.module.",
    "text_encoder.",
    "module.text_encoder.",
    "cond_stage_model.transformer.",
    "_fsdp_wrapped_module._checkpoint_wrapped_module.",
  ],
)
def test_prefixes_of_wrappers_and_trainers(tensors, params, tmp_path, prefix):
  wrapped = {prefix + name: value for name, value in tensors.items()}
  save_file(wrapped, tmp_path / "model.safetensors")
  assert_loads(tmp_path, params)


def test_wrappers_inside_a_name(tensors, params, tmp_path):
  """torch.compile and activation checkpointing of single layers."""
  wrapped = {name.replace("layers.1.", "layers.1._orig_mod."): x for name, x in tensors.items()}
  assert wrapped.keys() != tensors.keys()
  save_file(wrapped, tmp_path / "model.safetensors")
  assert_loads(tmp_path, params)


def test_other_networks_of_the_file_are_left_out(tensors, params, tmp_path):
  """Of a whole pipeline, and of a whole CLIP."""
  whole = {f"text_encoder.{name}": value for name, value in tensors.items()}
  save_file(whole | {"unet.conv_in.bias": np.zeros(3)}, tmp_path / "model.safetensors")
  assert_loads(tmp_path, params)
  more = {"vision_model.embeddings.class_embedding": np.zeros(3), "logit_scale": np.ones(())}
  more["text_model.embeddings.position_ids"] = np.arange(8)[None]
  save_file(tensors | more, tmp_path / "model.safetensors")
  assert_loads(tmp_path, params)


def test_a_copy_has_the_networks_own_names(tensors, tmp_path):
  """What diffusers and transformers read, whatever the source was called."""
  source = {f"module.{name}": value.astype(np.float16) for name, value in tensors.items()}
  (tmp_path / "source").mkdir()
  save_file(source, tmp_path / "source" / "model.safetensors")
  file = weights.copy(tmp_path / "source", tmp_path / "copy", NAME, ABSTRACT, np.dtype(np.float32))
  with weights.open_reader(file) as reader:
    assert reader.specs.keys() == tensors.keys()
    assert {spec.dtype for spec in reader.specs.values()} == {np.dtype(np.float32)}
    name = "text_model.final_layer_norm.bias"
    expected = tensors[name].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(reader.read(name, (slice(None),)), expected)


def test_the_same_tensor_twice_is_refused(tensors, tmp_path):
  both = tensors | {f"module.{name}": value for name, value in tensors.items()}
  save_file(both, tmp_path / "model.safetensors")
  with pytest.raises(ConversionError, match="the same tensor .* twice") as caught:
    weights.load(tmp_path, NAME, ABSTRACT)
  assert "\n" not in str(caught.value)


# ---- State dicts among other things


@pytest.mark.parametrize(
  "place",
  [
    lambda state: state,
    lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}},
    lambda state: {"model": state, "step": 100, "lr": 1e-5},
    lambda state: {"ema": state},
    lambda state: {"state_dict": {"module": state}},
    lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
    lambda state: state | {"global_step": 7, "config": {"a": 1}},
  ],
)
def test_a_state_dict_among_other_things(tensors, params, tmp_path, place):
  torch.save(place(in_torch(tensors)), tmp_path / "last.pt")
  assert_loads(tmp_path, params, allow_pickle=True)
  assert_loads(tmp_path / "last.pt", params, allow_pickle=True)


@pytest.mark.parametrize(
  "content, message",
  [
    (
      {"model": {"a": torch.ones(1)}, "ema": {"a": torch.ones(1)}},
      "several state_dicts .model, ema",
    ),
    ({"epoch": 3}, "expected a state_dict"),
    ([torch.ones(1)], "expected a state_dict"),
    ({}, "expected a state_dict"),
    (Path("a"), "weights_only loader refuses it .* save its state_dict alone"),
  ],
)
def test_what_is_no_state_dict_gets_one_line(tmp_path, content, message):
  torch.save(content, tmp_path / "last.pt")
  with pytest.raises(ConversionError, match=message) as caught:
    weights.load(tmp_path, NAME, ABSTRACT, allow_pickle=True)
  assert "\n" not in str(caught.value)


# ---- Shards


def shards(folder: Path, index: str, tensors: dict, stem: str, suffix: str, mark: str = "") -> None:
  """Writes two shards and their index."""
  names = sorted(tensors)
  where = {}
  for number, part in enumerate((names[::2], names[1::2]), 1):
    file = f"{stem}-0000{number}-of-00002{mark}{suffix}"
    chosen = {name: tensors[name] for name in part}
    if suffix == ".bin":
      torch.save(in_torch(chosen), folder / file)
    else:
      save_file(chosen, folder / file)
    where |= dict.fromkeys(part, file)
  (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize(
  "index, stem, mark",
  [
    ("model.safetensors.index.json", "model", ""),
    ("model.safetensors.index.fp16.json", "model", ".fp16"),
    ("model.fp16.safetensors.index.json", "model.fp16", ""),
    ("model.safetensors.fp16.index.json", "model", ".fp16"),
    ("diffusion_pytorch_model.safetensors.index.fp16.json", "diffusion_pytorch_model", ".fp16"),
    ("diffusion_pytorch_model.fp16.safetensors.index.json", "diffusion_pytorch_model.fp16", ""),
    ("diffusion_pytorch_model.safetensors.fp16.index.json", "diffusion_pytorch_model", ".fp16"),
  ],
)
@pytest.mark.parametrize("variant", ["", "fp16"])
def test_names_of_an_index(tensors, params, tmp_path, index, stem, mark, variant):
  shards(tmp_path, index, tensors, stem, ".safetensors", mark)
  assert_loads(tmp_path, params, variant=variant)


def test_a_variants_shards_are_preferred_where_they_are_asked_for(tensors, params, tmp_path):
  half = {name: value.astype(np.float16) for name, value in tensors.items()}
  shards(tmp_path, "model.safetensors.fp16.index.json", half, "model", ".safetensors", ".fp16")
  save_file(tensors, tmp_path / "model.safetensors")
  assert_loads(tmp_path, params)
  rounded = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), params)
  assert_loads(tmp_path, rounded, variant="fp16")


@pytest.mark.parametrize(
  "index, stem, mark",
  [
    ("pytorch_model.bin.index.json", "pytorch_model", ""),
    ("diffusion_pytorch_model.bin.index.json", "diffusion_pytorch_model", ""),
    ("diffusion_pytorch_model.bin.index.fp16.json", "diffusion_pytorch_model", ".fp16"),
    ("pytorch_model.fp16.bin.index.json", "pytorch_model.fp16", ""),
  ],
)
def test_pickled_shards(tensors, params, tmp_path, index, stem, mark):
  """They need the flag, which the one line names."""
  shards(tmp_path, index, tensors, stem, ".bin", mark)
  with pytest.raises(ConversionError, match="--config.model.allow_pickle=true$") as caught:
    weights.load(tmp_path, NAME, ABSTRACT)
  assert "\n" not in str(caught.value) and "-00001-of-00002" in str(caught.value)
  assert_loads(tmp_path, params, allow_pickle=True)
  assert len(weights.files(tmp_path)) == 2  # an encoder's identity is that of both


def test_safetensors_come_before_pickles(tensors, params, tmp_path):
  shards(tmp_path, "pytorch_model.bin.index.json", {"a": np.ones(1), "b": np.ones(1)}, "x", ".bin")
  save_file(tensors, tmp_path / "model.safetensors")
  assert_loads(tmp_path, params)


def test_the_hub_is_asked_for_every_name_of_an_index():
  layout = Layout(files={}, tokenizers={}, networks=("unet",))
  patterns = hub.patterns(layout, "fp16")
  for name in weight_files.indices("diffusion_pytorch_model", ".fp16"):
    assert f"unet/{name}" in patterns


def damage(how: str, folder: Path, tensors: dict) -> None:
  """Writes shards of which something is wrong."""
  index = folder / "pytorch_model.bin.index.json"
  shards(folder, index.name, tensors, "pytorch_model", ".bin")
  last = folder / "pytorch_model-00002-of-00002.bin"
  if how == "missing shard":
    last.unlink()
  elif how == "truncated shard":
    last.write_bytes(last.read_bytes()[:200])
  elif how == "a folder for a shard":
    last.unlink()
    last.mkdir()
  elif how == "empty index":
    index.write_text(json.dumps({"weight_map": {}}))
  elif how == "no JSON":
    index.write_text("<html>")
  elif how == "numbers":
    index.write_text(json.dumps({"weight_map": {"a": 1, "b": "x"}}))
  elif how == "no index":
    index.unlink()
  elif how == "twice":
    shutil.copy(folder / "pytorch_model-00001-of-00002.bin", last)
  elif how == "a folder for a file":
    shutil.rmtree(folder)
    (folder / "model.safetensors").mkdir(parents=True)


@pytest.mark.parametrize(
  "how, message",
  [
    ("missing shard", "names shards that are not there: pytorch_model-00002-of-00002.bin; get it"),
    ("truncated shard", "00002-of-00002.bin: torch's weights_only loader refuses it .* truncated"),
    ("a folder for a shard", "names shards that are not there"),
    ("empty index", "names no shards"),
    ("no JSON", "not an index of shards"),
    ("numbers", "not an index of shards"),
    ("no index", "shards without their index .*pytorch_model-00001-of-00002.bin, "),
    ("twice", "is in another shard as well"),
    ("a folder for a file", "no weights; expected .* found model.safetensors/;"),
  ],
)
def test_broken_shards_get_one_line(tensors, tmp_path, how, message):
  folder = tmp_path / "network"
  folder.mkdir()
  damage(how, folder, tensors)
  with pytest.raises(ConversionError, match=message) as caught:
    weights.load(folder, NAME, ABSTRACT, allow_pickle=True)
  assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_several_files_of_which_none_has_a_known_name(tensors, tmp_path):
  for number in range(40):
    save_file({"a": np.ones(1)}, tmp_path / f"epoch_{number}.safetensors")
  with pytest.raises(ConversionError, match="40 weight files .* and 38 more") as caught:
    weights.load(tmp_path, NAME, ABSTRACT)
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


# ---- Messages


@pytest.mark.parametrize(
  "rename, looks",
  [
    (lambda name: f"unknown.{name}", None),
    (lambda name: f"model.diffusion_model.input_blocks.{name}", "original Stable Diffusion"),
    (lambda name: f"transformer.{name}.lora_A.weight", "a LoRA; use it with"),
    (lambda name: f"{name}.absmax", "quantised weights"),
  ],
)
def test_no_wall_of_names(tensors, tmp_path, rename, looks):
  """At most 12 lines, each of a sensible length; what it looks like, and how to see all."""
  save_file({rename(name): x for name, x in tensors.items()}, tmp_path / "model.safetensors")
  with pytest.raises(ConversionError) as caught:
    weights.load(tmp_path, NAME, ABSTRACT)
  lines = str(caught.value).splitlines()
  assert 5 < len(lines) <= 12 and max(map(len, lines)) < 300
  assert "72 problems" in lines[0]
  assert (looks is None) == ("it looks like" not in lines[1])
  assert looks is None or looks in lines[1]
  assert lines[-1] == f"  to see all: python -m dancegrpo_jax.convert inspect {tmp_path}"


def test_another_network_is_named(tensors, tmp_path):
  text_model = Path(__file__).parent.parent / "assets" / "emoji-sd" / "vae"
  with pytest.raises(ConversionError, match="it looks like a file of the network AutoencoderKL"):
    weights.load(text_model, NAME, ABSTRACT)


def test_whole_numbers_are_no_weights(tensors, tmp_path):
  """A quantised file must not be taken for weights from -128 to 127."""
  eight_bit = {name: (10 * value).astype(np.int8) for name, value in tensors.items()}
  save_file(eight_bit, tmp_path / "model.safetensors")
  with pytest.raises(ConversionError, match="int8 numbers are no weights"):
    weights.load(tmp_path, NAME, ABSTRACT)

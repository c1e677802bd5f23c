"""Finding a checkpoint's files: local folders, the cache, and the hub, which is never reached.

Also the messages where files are missing.
"""

import fnmatch
import re
import shutil
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.errors
import jax
import numpy as np
import pytest
from tiny_checkpoint import ROOT, tiny_config

from dancegrpo_jax.assembly import loading
from dancegrpo_jax.checkpoints import components, hub, weights
from dancegrpo_jax.conversion.table import Row, Table
from dancegrpo_jax.conversion.tables.rows import dense, join, layers, norm
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.pipelines import flux, stable_diffusion
from dancegrpo_jax.pipelines.layout import RANDOM
from dancegrpo_jax.rewards import clip

LAYOUT = stable_diffusion.FAMILY.layout
NAME = "nobody/no-such-model"
# Weight files: of CompVis/stable-diffusion-v1-4's unet, of a sharded unet, and of a text encoder.
UNET = [
  "diffusion_pytorch_model.bin",
  "diffusion_pytorch_model.safetensors",
  "diffusion_pytorch_model.fp16.safetensors",
  "diffusion_pytorch_model.non_ema.safetensors",
  "diffusion_pytorch_model.fp16.bin",
]
SHARDED = [
  "diffusion_pytorch_model-00001-of-00002.safetensors",
  "diffusion_pytorch_model.safetensors.index.json",
  "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
  "diffusion_pytorch_model.safetensors.index.fp16.json",
]


def fetched(files: list[str], variant: str = "") -> list[str]:
  wanted = hub.patterns(LAYOUT, variant)
  return [
    file for file in files if any(fnmatch.fnmatch(f"unet/{file}", pattern) for pattern in wanted)
  ]


def test_only_what_is_needed_is_fetched():
  assert fetched(UNET) == ["diffusion_pytorch_model.safetensors"]
  assert fetched(UNET, "fp16") == ["diffusion_pytorch_model.fp16.safetensors"]
  assert fetched(SHARDED) == SHARDED[:2] and fetched(SHARDED, "fp16") == SHARDED[2:]
  others = [
    "model_index.json",
    "tokenizer/vocab.json",
    "scheduler/scheduler_config.json",
    "vae/config.json",
  ]
  unneeded = [
    "safety_checker/model.safetensors",
    "sd-v1-4.ckpt",
    "README.md",
    "feature_extractor/preprocessor_config.json",
  ]
  wanted = hub.patterns(LAYOUT)
  match = [
    file for file in others + unneeded if any(fnmatch.fnmatch(file, pattern) for pattern in wanted)
  ]
  assert match == others
  assert "model.safetensors" in hub.patterns(clip.TRANSFORMERS)


def test_flux_has_two_tokenizers(tmp_path):
  layout = flux.FAMILY.layout
  wanted = hub.patterns(layout)
  assert {"tokenizer/vocab.json", "tokenizer_2/tokenizer.json", "tokenizer_2/spiece.model"} <= set(
    wanted
  )
  assert (
    "tokenizer_2/vocab.json" not in wanted and "text_encoder_2/model-*-of-*.safetensors" in wanted
  )
  absent = hub.missing(tmp_path, layout)
  assert {"tokenizer/vocab.json", "tokenizer_2/tokenizer.json", "transformer/*.safetensors"} <= set(
    absent
  )
  with pytest.raises(
    ConfigError,
    match="vocab.json . merges.txt or tokenizer.json, tokenizer_2/tokenizer.json, transformer/",
  ):
    hub.folder("model.checkpoint", "nowhere", layout)


def test_a_folder_that_is_no_pipeline(tmp_path):
  (tmp_path / "unet").mkdir()
  (tmp_path / "weights.ckpt").write_bytes(b"")
  with pytest.raises(ConfigError) as caught:
    hub.folder("model.checkpoint", str(tmp_path), LAYOUT)
  text = str(caught.value)
  assert (
    "\n" not in text
    and f"config.model.checkpoint = {str(tmp_path)!r}: the folder lacks unet/config.json" in text
  )
  assert (
    "tokenizer/vocab.json" in text
    and "text_encoder/*.safetensors" in text
    and "found unet, weights.ckpt" in text
  )


def test_offline_and_not_cached(monkeypatch):
  """One short line, before any weights are read: how to get the files."""
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  with pytest.raises(ConfigError) as caught:
    hub.folder("model.checkpoint", NAME, LAYOUT)
  text = str(caught.value)
  assert (
    "\n" not in text
    and "not in the Hugging Face cache, and HF_HUB_OFFLINE=1 forbids downloads" in text
  )
  assert f"`hf download {NAME} --local-dir checkpoints/no-such-model`" in text
  assert "--config.model.checkpoint=checkpoints/no-such-model" in text
  assert len(text) < 300


@pytest.mark.parametrize("name", ["../nowhere/at/all", "nowhere", "/nowhere/at"])
def test_neither_folder_nor_id(name):
  with pytest.raises(
    ConfigError, match="no such folder .* and not a hub id; accepted is a folder with"
  ):
    hub.folder("model.checkpoint", name, LAYOUT)


def test_the_build_says_so(tiny_models):
  with pytest.raises(
    ConfigError, match="config.model.checkpoint = 'nobody/no-such-model': no such folder"
  ):
    loading.build_pipeline(tiny_config(tiny_models, model__checkpoint=NAME))


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty Hugging Face cache.

  Returns a function that puts a folder's files into it as a snapshot.
  """
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  repository, commit = tmp_path / "cache" / ("models--" + NAME.replace("/", "--")), "0" * 40

  def fill(source: Path, *leave_out: str) -> Path:
    snapshot = repository / "snapshots" / commit
    shutil.copytree(source, snapshot, ignore=shutil.ignore_patterns(*leave_out), dirs_exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return snapshot

  return fill


def test_a_cached_one_is_used_offline(tiny_models, cache):
  snapshot = cache(tiny_models.model)
  assert hub.folder("model.checkpoint", NAME, LAYOUT).resolve() == snapshot.resolve()


def test_half_a_download_is_completed(tiny_models, cache, monkeypatch):
  """A snapshot without its weights is not accepted.

  The full files are requested first, then those in half precision.
  """
  snapshot, asked = cache(tiny_models.model, "*.safetensors"), []
  real = huggingface_hub.snapshot_download

  def fake(name, allow_patterns, local_files_only=False):
    if local_files_only:
      return real(name, allow_patterns=allow_patterns, local_files_only=True)
    if allow_patterns == ["model_index.json"]:  # to see of which family it is
      return str(snapshot)
    asked.append("unet/diffusion_pytorch_model.fp16.safetensors" in allow_patterns)
    if asked[-1]:
      cache(tiny_models.model)
    return str(snapshot)

  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
  monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
  assert hub.folder("model.checkpoint", NAME, LAYOUT) == snapshot and asked == [False, True]
  assert hub.folder("model.checkpoint", NAME, LAYOUT) and len(asked) == 2  # now it is cached


def test_a_gated_one(cache, monkeypatch):
  def refused(name, allow_patterns, local_files_only=False):
    if local_files_only:
      raise huggingface_hub.errors.LocalEntryNotFoundError("none")
    raise PermissionError("401 Client Error.\nAccess to model is restricted")

  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
  monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
  with pytest.raises(
    ConfigError,
    match=r"not downloaded \(PermissionError: 401 Client Error. Access to model is restricted\)",
  ):
    hub.folder("model.checkpoint", NAME, LAYOUT)


def test_random_weights(tiny_models):
  """They come from JSON files alone and depend on the path, but not on the devices.

  No parameter is degenerate.
  """
  config = tiny_config(tiny_models, model__checkpoint=f"{RANDOM}{ROOT / 'assets' / 'random-sd'}")
  component = loading.build_pipeline(config).components["denoiser"]
  mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
  first = components.read_component(
    loading.model_location(config), component, jax.NamedSharding(mesh, jax.P())
  )

  def split_last_axis(x):
    divisible = x.shape[-1] % 8 == 0
    axes = [None] * (x.ndim - 1) + ["fsdp"] if divisible else []
    return jax.NamedSharding(mesh, jax.P(*axes))

  split = jax.tree.map(split_last_axis, component.abstract)
  again = weights.draw(component.abstract, split, table=component.table)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(again), strict=True
  ):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    if re.search("kernel", jax.tree_util.keystr(path)):
      fan_in = np.prod(a.shape[:-1])
      assert 0.7 < np.std(np.asarray(a)) * fan_in**0.5 < 1.3, path
  assert not any(np.isnan(np.asarray(leaf)).any() for leaf in jax.tree.leaves(first))


def test_random_weights_of_stacked_blocks():
  """Their deviation is that of single blocks.

  Otherwise what passes through a deep network would vanish.
  """
  shape = jax.ShapeDtypeStruct
  tree = {
    "blocks": {
      "dense": {"kernel": shape((20, 64, 32), np.float32)},
      "norm": {"scale": shape((20, 64), np.float32)},
    }
  }
  table = Table("Stacked", layers("blocks", "blocks", join(dense("dense"), norm("norm"))))
  drawn = weights.draw(tree, table=table)["blocks"]
  assert np.std(np.asarray(drawn["dense"]["kernel"])) * 8 == pytest.approx(1, rel=0.02)
  np.testing.assert_array_equal(np.asarray(drawn["norm"]["scale"]), 1)


@pytest.mark.parametrize(
  "axes, fan_in", [("o i t h w -> t h w i o", 4 * 9 * 8), ("o i h w -> {k} h w i o", 9 * 8)]
)
def test_random_kernels_of_five_axes(axes, fan_in):
  """Three spatial axes belong to the fan-in; the axis of stacked layers does not."""
  table = Table("Video", (Row("blocks.{k}.weight", "conv/kernel", axes),))
  tree = {"conv": {"kernel": jax.ShapeDtypeStruct((4, 3, 3, 8, 64), np.float32)}}
  drawn = np.asarray(weights.draw(tree, table=table)["conv"]["kernel"])
  assert np.std(drawn) == pytest.approx(fan_in**-0.5, rel=0.02)


def test_random_needs_its_json_files(tmp_path):
  with pytest.raises(
    ConfigError, match="no such folder .*nowhere .*; give one with the JSON files"
  ):
    hub.folder("model.checkpoint", f"random:{tmp_path}/nowhere", LAYOUT)
  with pytest.raises(ConfigError, match="the folder lacks unet/config.json"):
    hub.folder("model.checkpoint", f"random:{tmp_path}", LAYOUT)

"""Checkpoint folders: what is accepted, and the messages where they are broken.

Also sharded reading, atomic writing, and `inspect`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from dancegrpo_jax.checkpoints import safetensors_io, weights
from dancegrpo_jax.checkpoints.networks import abstract_params
from dancegrpo_jax.conversion.table import Spec
from dancegrpo_jax.convert.__main__ import main
from dancegrpo_jax.errors import ConversionError

CONFIG = {
  "architectures": ["CLIPTextModel"],
  "vocab_size": 40,
  "max_position_embeddings": 8,
  "hidden_size": 16,
  "intermediate_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
}


@pytest.fixture
def abstract():
  return abstract_params(CONFIG)


@pytest.fixture
def params(abstract):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), abstract)


@pytest.fixture
def folder(tmp_path, params):
  """A text encoder's folder as published."""
  weights.save(tmp_path / "text_encoder", "CLIPTextModel", params, CONFIG)
  return tmp_path / "text_encoder"


def tensors(folder: Path) -> dict[str, np.ndarray]:
  return safetensors.numpy.load_file(folder / "model.safetensors")


def same(a, b) -> None:
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_round_trip(folder, params, abstract):
  loaded = weights.load(folder, "CLIPTextModel", abstract)
  same(loaded, params)
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(loaded))
  assert weights.read_config(folder) == CONFIG
  assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_file_is_what_the_reference_library_writes(folder, tmp_path):
  safetensors.numpy.save_file(tensors(folder), tmp_path / "reference", metadata={"format": "pt"})
  assert (tmp_path / "reference").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files(folder, params, abstract, tmp_path, dtype):
  """Written, read lazily and cast meanwhile.

  An export from float32 has the dtypes of the original file.
  """
  weights.save(tmp_path / "half", "CLIPTextModel", params, dtype=dtype)
  assert {
    spec.dtype for spec in safetensors_io.header(tmp_path / "half" / "model.safetensors").values()
  } == {np.dtype(dtype)}
  loaded = weights.load(tmp_path / "half", "CLIPTextModel", abstract)
  same(loaded, jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params))
  kept = weights.load(tmp_path / "half", "CLIPTextModel", abstract, dtype=dtype)
  assert {x.dtype for x in jax.tree.leaves(kept)} == {np.dtype(dtype)}
  again = weights.save(tmp_path / "again", "CLIPTextModel", loaded, like=tmp_path / "half")
  assert again.read_bytes() == (tmp_path / "half" / "model.safetensors").read_bytes()


def test_published_names_and_buffers_come_back(folder, params, abstract, tmp_path):
  """A file exported `like` another has all of its tensors, bit for bit.

  This includes names without the prefix, and position_ids.
  """
  (tmp_path / "other").mkdir()
  other = {name.removeprefix("text_model."): value for name, value in tensors(folder).items()}
  other["embeddings.position_ids"] = np.arange(8)[None]
  safetensors.numpy.save_file(
    other, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"}
  )
  loaded = weights.load(tmp_path / "other", "CLIPTextModel", abstract)
  same(loaded, params)
  again = weights.save(tmp_path / "again", "CLIPTextModel", loaded, like=tmp_path / "other")
  assert again.read_bytes() == (tmp_path / "other" / "model.safetensors").read_bytes()


def shard(folder: Path, index: str, mark: str = "") -> None:
  """Divides the single file into two shards and an index."""
  names = sorted(tensors(folder))
  halves = {f"model-0000{k + 1}-of-00002{mark}.safetensors": names[k::2] for k in range(2)}
  for file, part in halves.items():
    safetensors.numpy.save_file({name: tensors(folder)[name] for name in part}, folder / file)
  (folder / index).write_text(
    json.dumps({"weight_map": {name: file for file, part in halves.items() for name in part}})
  )
  (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
  "index",
  [
    "model.safetensors.index.json",
    "model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.safetensors.index.json",
  ],
)
def test_sharded_files(folder, params, abstract, index):
  shard(folder, index)
  same(weights.load(folder, "CLIPTextModel", abstract), params)
  (folder / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(
    ConversionError,
    match="names shards that are not there: model-00002-of-00002.safetensors; get it with",
  ):
    weights.load(folder, "CLIPTextModel", abstract)


def test_variants(folder, params, abstract):
  """The full file is preferred unless the variant is requested.

  A folder with only the variant works, too.
  """
  half = {name: value.astype(np.float16) for name, value in tensors(folder).items()}
  safetensors.numpy.save_file(half, folder / "model.fp16.safetensors")
  same(weights.load(folder, "CLIPTextModel", abstract), params)
  rounded = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), params)
  same(weights.load(folder, "CLIPTextModel", abstract, variant="fp16"), rounded)
  (folder / "model.safetensors").unlink()
  same(weights.load(folder, "CLIPTextModel", abstract), rounded)


def test_sharded_reading(folder, params, abstract, monkeypatch):
  """Eight devices need four slices; each is read once, and nothing else is read."""
  mesh = jax.make_mesh((4, 2), ("fsdp", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  shardings = jax.tree.map(
    lambda s: NamedSharding(mesh, PartitionSpec(*[None] * (len(s.shape) - 1), "fsdp")), abstract
  )
  reads = []
  read = safetensors_io.Reader.read

  def counted(self, name, index):
    value = read(self, name, index)
    reads.append((name, value.nbytes))
    return value

  monkeypatch.setattr(safetensors_io.Reader, "read", counted)
  loaded = weights.load(folder, "CLIPTextModel", abstract, shardings)
  same(loaded, params)
  jax.tree.map(
    lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(x.sharding)),
    loaded,
    shardings,
  )
  assert sum(size for _, size in reads) == sum(x.nbytes for x in jax.tree.leaves(params))
  whole = dict.fromkeys(name for name, _ in reads)
  assert len(reads) == 4 * len(whole)
  everywhere = weights.load(folder, "CLIPTextModel", abstract, NamedSharding(mesh, PartitionSpec()))
  same(everywhere, params)
  back = weights.save(folder.parent / "back", "CLIPTextModel", loaded)
  assert back.read_bytes() == (folder / "model.safetensors").read_bytes()


def test_stacked_layers_are_exported_one_by_one(folder, params):
  stacked = dict(params)
  layers = stacked.pop("encoder")
  stacked["encoder"] = {
    "layers": jax.tree.map(
      lambda *x: jax.numpy.stack(x), *(layers[f"layers_{i}"] for i in range(2))
    )
  }
  file = weights.save(folder.parent / "stacked", "CLIPTextModel", stacked)
  assert file.read_bytes() == (folder / "model.safetensors").read_bytes()


def broken(folder: Path, how: str) -> None:
  file = folder / "model.safetensors"
  if how == "empty folder":
    file.unlink()
  elif how == "pickled":
    file.rename(folder / "pytorch_model.bin")
  elif how == "truncated":
    file.write_bytes(file.read_bytes()[:-100])
  elif how == "empty file":
    file.write_bytes(b"")
  elif how == "web page":  # which a download without a token writes
    file.write_text("<html>401 Unauthorized</html>" * 10)
  elif how == "index":
    file.rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text("[]")


@pytest.mark.parametrize(
  "how, message",
  [
    (
      "empty folder",
      "no weights; expected diffusion_pytorch_model.safetensors or model.safetensors .* found"
      " config.json; get it with",
    ),
    ("pickled", r"pickled weights only \(pytorch_model.bin\)"),
    (
      "truncated",
      "model.safetensors: truncated or not a safetensors file .* get it with `hf download",
    ),
    ("empty file", "truncated or not a safetensors file"),
    ("web page", "truncated or not a safetensors file"),
    ("index", "model.safetensors.index.json: not an index"),
  ],
)
def test_broken_folders_get_one_line(folder, abstract, how, message):
  broken(folder, how)
  with pytest.raises(ConversionError, match=message) as caught:
    weights.load(folder, "CLIPTextModel", abstract)
  assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_missing_folder_config_and_table(folder, abstract):
  for call in (
    lambda: weights.load(folder / "nowhere", "CLIPTextModel", abstract),
    lambda: weights.read_config(folder / "nowhere"),
    lambda: weights.load(folder, "T5", abstract),
  ):
    with pytest.raises(ConversionError) as caught:
      call()
    assert "\n" not in str(caught.value)


def test_misfits_name_the_folder_and_everything(folder, abstract):
  bad = tensors(folder)
  bad["text_model.encoder.layers.1.mlp.fc3.bias"] = bad.pop(
    "text_model.encoder.layers.1.mlp.fc1.bias"
  )
  bad["text_model.final_layer_norm.bias"] = bad["text_model.final_layer_norm.bias"][:3]
  safetensors.numpy.save_file(bad, folder / "model.safetensors")
  with pytest.raises(ConversionError) as caught:
    weights.load(folder, "CLIPTextModel", abstract)
  text = str(caught.value)
  assert text.startswith(f"{folder}: CLIPTextModel: 3 problems")
  assert (
    "fc3.bias" in text
    and "encoder/layers_1/mlp/fc1/bias" in text
    and "final_layer_norm.bias [3]" in text
  )


def test_writing_is_atomic(folder):
  before = (folder / "model.safetensors").read_bytes()

  def fails(name):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    safetensors_io.write(
      folder / "model.safetensors", {"a": Spec((2,), np.dtype(np.float32))}, fails
    )
  with pytest.raises(ConversionError, match="announced"):
    safetensors_io.write(
      folder / "model.safetensors",
      {"a": Spec((2,), np.dtype(np.float32))},
      lambda name: np.zeros(3),
    )
  assert (folder / "model.safetensors").read_bytes() == before
  assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_inspect_a_pipeline(folder, capsys):
  root = folder.parent
  index = {
    "_class_name": "StableDiffusionPipeline",
    "text_encoder": ["transformers", "CLIPTextModel"],
  }
  index |= {"scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [None, None]}
  (root / "model_index.json").write_text(json.dumps(index))
  assert main(["inspect", str(root)]) == 0
  out = capsys.readouterr().out
  assert f"# {folder} (CLIPTextModel): 36 tensors, 36 parameters" in out
  assert (
    "text_model.encoder.layers.0.mlp.fc1.weight\t[32, 16]\tfloat32\tencoder/layers_0/mlp/fc1/kernel"
    in out
  )
  assert "# scheduler (DDIMScheduler): not a network" in out
  # Problems of several networks are reported together.
  index["vae"] = ["diffusers", "AutoencoderKL"]
  index["unet"] = ["diffusers", "UNet2DConditionModel"]
  (root / "model_index.json").write_text(json.dumps(index))
  (root / "unet").mkdir()
  (root / "unet" / "config.json").write_text(
    json.dumps({"_class_name": "UNet2DConditionModel", "act_fn": "relu"})
  )
  safetensors.numpy.save_file(
    tensors(folder) | {"text_model.more": np.zeros(2)}, folder / "model.safetensors"
  )
  assert main(["inspect", str(root)]) == 2
  captured = capsys.readouterr()
  assert "text_model.more\t[2]\tfloat64\t(nowhere)" in captured.out
  assert captured.err.startswith("3 problems:")
  assert all(
    part in captured.err
    for part in (
      "unexpected tensor text_model.more",
      f"{root / 'vae'}/config.json",
      "act_fn = 'relu'",
    )
  )


def test_inspect_says_what_is_wrong_in_one_line(tmp_path):
  """The command ends with exit code 2 and without a traceback."""
  (tmp_path / "notes.txt").write_text("")
  command = [sys.executable, "-m", "dancegrpo_jax.convert", "inspect", str(tmp_path)]
  root = Path(__file__).parents[1]
  done = subprocess.run(
    command, capture_output=True, text=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}
  )
  assert done.returncode == 2 and done.stdout == ""
  assert re.fullmatch(
    r"error: .*: not a checkpoint folder; expected model_index.json .*; found: notes.txt\n",
    done.stderr,
  )


MEMORY = """
import sys, numpy as np, jax
from dancegrpo_jax.checkpoints.networks import abstract_params
from dancegrpo_jax.checkpoints import weights
def status(key):
  lines = open("/proc/self/status")
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
config = {
  "architectures": ["CLIPTextModel"],
  "hidden_size": 1024,
  "intermediate_size": 4096,
  "num_hidden_layers": 18,
}
abstract = abstract_params(config)
if sys.argv[2] == "save":
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32), abstract)
  weights.save(sys.argv[1], "CLIPTextModel", params, config)
else:
  jax.numpy.zeros(1).block_until_ready()
  open("/proc/self/clear_refs", "w").write("5")  # resets the peak
  base = status("VmRSS")
  tree = jax.block_until_ready(weights.load(sys.argv[1], "CLIPTextModel", abstract))
  print((status("VmHWM") - base) / sum(x.nbytes for x in jax.tree.leaves(tree)))
"""


@pytest.mark.full_size
@pytest.mark.skipif(
  not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc"
)
def test_peak_memory_of_a_gigabyte(tmp_path):
  root = Path(__file__).parents[1]
  ratio = ""
  for step in ("save", "load"):
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "big"), step]
    ratio = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
  assert float(ratio) <= 1.3

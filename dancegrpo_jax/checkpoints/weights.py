"""Reads network parameters from checkpoint folders, shard by shard, and writes them back.

A folder belongs to one network, such as the `unet` folder of a pipeline: it holds config.json and
safetensors in the layout of diffusers or transformers. This is the one place that applies the
tables of `conversion/` to files.
"""

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding

from dancegrpo_jax.checkpoints import lora_files, lora_names, lora_run, views
from dancegrpo_jax.checkpoints.networks import table_of
from dancegrpo_jax.checkpoints.reading import files, open_reader, planned, specs
from dancegrpo_jax.checkpoints.safetensors_io import Reader, write
from dancegrpo_jax.checkpoints.weight_files import HOW
from dancegrpo_jax.conversion.mapping import Mapping, canonical_name, plan
from dancegrpo_jax.conversion.table import Spec, Table, expected_sources, matches, stacked_axes
from dancegrpo_jax.conversion.transfer import export_tensor, import_slice
from dancegrpo_jax.errors import ConversionError
from dancegrpo_jax.pipelines.layout import NEWER_FORMS
from dancegrpo_jax.types import PyTree

__all__ = [
  "ConversionError",
  "draw",
  "files",
  "fingerprint",
  "load",
  "load_lora",
  "open_reader",
  "read_config",
  "save",
  "save_lora",
  "specs",
]


def read_config(folder: str | Path, name: str = "config.json") -> dict[str, Any]:
  """The contents of a JSON file of a checkpoint folder, in the older or the newer form.

  Raises:
    ConversionError: the file is not there, or holds no JSON object.
  """
  file = Path(folder) / name
  if name in NEWER_FORMS and not file.is_file():
    newer, key = NEWER_FORMS[name]
    if (Path(folder) / newer).is_file():
      whole = read_config(folder, newer)
      if not isinstance(whole.get(key), dict):
        raise ConversionError(f"{Path(folder) / newer}: has no {key}; {HOW}")
      return whole[key]
  try:
    config = json.loads(file.read_text())
  except (FileNotFoundError, NotADirectoryError) as error:
    raise ConversionError(f"{file}: no such file; {HOW}") from error
  except ValueError as error:
    raise ConversionError(f"{file}: not valid JSON ({error}); {HOW}") from error
  if not isinstance(config, dict):
    raise ConversionError(f"{file}: expected a JSON object; {HOW}")
  return config


def fingerprint(files: list[Path], blocks: int = 64, size: int = 2**18) -> str:
  """A digest of weight files that doesn't need all of their gigabytes to be read.

  It covers the size of each file, and `blocks` evenly spread blocks of `size` bytes; smaller files
  are read whole. That is enough to tell checkpoints apart, since more training changes nearly every
  weight and so nearly every block.

  Returns:
    16 hexadecimal digits.
  """
  digest = hashlib.sha256()
  for file in files:
    length = file.stat().st_size
    digest.update(length.to_bytes(8, "little"))
    with open(file, "rb") as opened:
      if length <= blocks * size:
        digest.update(opened.read())
        continue
      for start in np.linspace(0, length - size, blocks).astype(int).tolist():
        opened.seek(start)
        digest.update(opened.read(size))
  return digest.hexdigest()[:16]


def load(
  folder: str | Path,
  table: Table | str,
  abstract_params: PyTree,
  shardings: PyTree | Sharding | None = None,
  dtype: Any = None,
  variant: str = "",
  allow_pickle: bool = False,
) -> PyTree:
  """Reads a network's parameters, one at a time. Where they are sharded, only the slices that the
  devices hold are read.

  Args:
    folder: the network's folder, or a weight file.
    table: the table, or the name of its network (`_class_name` or `architectures[0]` of
      config.json).
    abstract_params: tree with the shapes and dtypes of the result, as
      `jax.eval_shape(network.init, ...)["params"]` gives it.
    shardings: a sharding for every parameter, or one for all; None is the default device.
    dtype: what floating-point parameters are cast to; None leaves the dtypes of `abstract_params`.
    variant: "fp16" prefers the files of this variant.
    allow_pickle: whether torch's weights_only loader may read a .pt, .pth or .bin.

  Returns:
    The tree of arrays.

  Raises:
    ConversionError: one message of what is missing, left over or misshapen. It is raised before
      anything is put on a device.
  """
  table = table_of(table)
  with open_reader(folder, variant, allow_pickle, table.file) as reader:
    tensors, mapping = planned(folder, table, reader, abstract_params)
    by_path = _by_path(shardings, mapping.targets)
    params = {}
    for path, spec in _cast(mapping.targets, dtype).items():
      params[path] = _place(mapping, path, spec, tensors, by_path[path])
  return unflatten_dict(params, sep="/")


def load_lora(
  path: str | Path,
  table: Table | str,
  adapters: PyTree,
  network_params: PyTree,
  scale: float,
  shardings: PyTree | Sharding | None = None,
) -> tuple[PyTree, tuple[str, ...]]:
  """Reads adapters of a network in the layout of diffusers, peft or kohya, so that a run can train
  them further.

  Args:
    path: a file, or its folder.
    table: the adapted network's table, or its name.
    adapters: abstract tree of the adapters of the run (models/lora.py).
    network_params: abstract tree of the network's parameters.
    scale: the factor of the product of the matrices in the run. The adapters are rescaled, so that
      they change the network as much as with the factors of the file.
    shardings: as in `load`.

  Returns:
    The tree of arrays, and lines for the user: what was left out, and what was changed.

  Raises:
    ConversionError: one line: the file holds no adapters, those of another model, of another kind,
      of a higher rank, or of other layers.
  """
  network, file = table_of(table), lora_files.find(path)
  adapter_table, targets = lora_files.table_for(network), specs(adapters)
  expected = expected_sources(adapter_table, targets)
  rank = next(spec.shape[0] for name, spec in expected.items() if name.endswith("lora_A.weight"))
  modules = {name.rsplit(".", 2)[0].removeprefix(f"{network.lora_prefix}.") for name in expected}
  layers = lora_names.layers_of(network, specs(network_params))
  with Reader([file]) as reader:
    content = lora_files.read(file, layers, reader)
    lora_run.check_run(content, layers, modules, rank)
    factors = lora_run.Factors(reader, content.adapters, layers, rank, scale)
    mapping, by_path = plan(adapter_table, factors.specs, targets), _by_path(shardings, targets)
    arrays = {
      target: _place(mapping, target, spec, factors, by_path[target])
      for target, spec in targets.items()
    }
  notes = content.notes + lora_run.fitting_note(content, rank)
  return unflatten_dict(arrays, sep="/"), notes


def _by_path(
  shardings: PyTree | Sharding | None, targets: dict[str, Spec]
) -> dict[str, Sharding | None]:
  """The sharding of every parameter, from a tree of shardings or one for all."""
  if not isinstance(shardings, dict):
    return dict.fromkeys(targets, shardings)
  by_path = flatten_dict(shardings, sep="/")
  if set(by_path) != set(targets):
    raise ConversionError(f"shardings and parameters differ: {sorted(set(by_path) ^ set(targets))}")
  return by_path


def draw(
  abstract_params: PyTree,
  shardings: PyTree | Sharding | None = None,
  seed: int = 0,
  *,
  table: Table | None,
) -> PyTree:
  """Random parameters in place of a checkpoint's, for a first look and for tests of speed and
  memory.

  Kernels are normal with variance 1 / fan-in, embeddings are normal with standard deviation 0.02,
  biases are 0 and scales are 1. No layer starts at 0, so that whatever comes before it matters. A
  parameter depends on the seed and its path only, never on the devices.

  Args:
    abstract_params: tree with the shapes and dtypes of the result.
    shardings: as in `load`.
    seed: of all parameters.
    table: the network's, which says what parameters are stacked over layers; None where no
      parameter is.
  """
  targets = specs(abstract_params)
  by_path = _by_path(shardings, targets)

  def one(path: str, spec: Spec) -> jax.Array:
    layer_axes = 0 if table is None else stacked_axes(table, path, len(spec.shape))
    whole = _random(path, spec, layer_axes, seed)
    sharding = by_path[path]
    if sharding is None:
      return jax.device_put(whole)
    return jax.make_array_from_callback(spec.shape, sharding, lambda index: whole[index])

  return unflatten_dict({path: one(path, spec) for path, spec in targets.items()}, sep="/")


def _random(path: str, spec: Spec, layer_axes: int, seed: int) -> np.ndarray:
  """One parameter of `draw`, whole, on the host. Its first `layer_axes` axes count layers, which
  are no part of the fan-in.
  """
  leaf = path.rpartition("/")[2]
  if leaf == "bias":
    return np.zeros(spec.shape, spec.dtype)
  if leaf == "scale" or (len(spec.shape) < 2 and leaf != "class_embedding"):
    return np.ones(spec.shape, spec.dtype)
  std = 0.02 if "embedding" in leaf else np.prod(spec.shape[layer_axes:-1]) ** -0.5
  rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
  return (std * rng.standard_normal(spec.shape, np.float32)).astype(spec.dtype)


def _cast(tensors: dict[str, Spec], dtype: Any) -> dict[str, Spec]:
  """The specs with floating-point dtypes replaced, unless `dtype` is None."""
  if dtype is None:
    return tensors
  floating = {name for name, spec in tensors.items() if jnp.issubdtype(spec.dtype, jnp.floating)}
  return {
    name: spec._replace(dtype=np.dtype(dtype)) if name in floating else spec
    for name, spec in tensors.items()
  }


def _place(
  mapping: Mapping,
  path: str,
  spec: Spec,
  reader: views.Tensors,
  sharding: Sharding | None,
) -> jax.Array:
  """One parameter on its devices. Slices that several devices hold are read once."""
  shape, values = spec.shape, {}

  def value(index: Any) -> np.ndarray:
    key = tuple(s.indices(n)[:2] for s, n in zip(index, shape))
    if key not in values:
      values[key] = import_slice(mapping, path, index, reader.read, spec.dtype)
    return values[key]

  if sharding is None:
    return jax.device_put(value((slice(None),) * len(shape)))
  return jax.make_array_from_callback(shape, sharding, value)


def save(
  folder: str | Path,
  table: Table | str,
  params: PyTree,
  config_json: dict[str, Any] | None = None,
  dtype: Any = None,
  like: str | Path | None = None,
  header: dict[str, str] | None = None,
) -> Path:
  """Writes a network's folder as diffusers or transformers loads it: weights and config.json, each
  under a temporary name first.

  Args:
    folder: made if it isn't there; a weight file in it is replaced.
    table: as in `load`.
    params: tree of arrays.
    config_json: contents of config.json; None leaves the file alone.
    dtype: of the floating-point tensors; None leaves the dtypes of the parameters, or of `like`.
    like: the folder that the parameters were loaded from; the new file gets its names, buffers and
      dtypes.
    header: metadata of the file, beside its format.

  Returns:
    The weight file.
  """
  table, folder, flat = table_of(table), Path(folder), flatten_dict(params, sep="/")
  if like is None:
    sources = expected_sources(table, specs(params))
  else:
    with open_reader(like, stem=table.file) as reader:
      sources = reader.specs
  mapping = plan(table, _cast(sources, dtype), specs(params))
  folder.mkdir(parents=True, exist_ok=True)
  file = folder / f"{table.file}.safetensors"
  write(
    file,
    mapping.sources,
    lambda name: export_tensor(mapping, name, lambda path, index: _fetch(flat[path], index)),
    header,
  )
  if config_json is not None:
    temporary = folder / f".config.json.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(config_json, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, folder / "config.json")
  return file


def copy(
  source: str | Path,
  target: str | Path,
  table: Table | str,
  abstract_params: PyTree,
  dtype: Any,
  variant: str = "",
  allow_pickle: bool = False,
  flag: str = "--config.model.allow_pickle=true",
  unread: tuple[str, ...] = (),
) -> Path:
  """Copies a network's weights into one file of the network's own layout, tensor by tensor, in
  another dtype.

  Args:
    source: the network's folder, or a weight file, which may hold other networks too.
    target: the folder to write into; made if it isn't there.
    table: as in `load`; it names the file.
    abstract_params: as in `load`.
    dtype: of the floating-point tensors.
    variant, allow_pickle, flag: as in `open_reader`.
    unread: patterns of tensors that are copied though they become no parameter.

  Returns:
    The weight file.

  Raises:
    ConversionError: as `load`.
  """
  table, target = table_of(table), Path(target)
  file = target / f"{table.file}.safetensors"
  with open_reader(source, variant, allow_pickle, table.file, flag) as reader:
    tensors, mapping = planned(source, table, reader, abstract_params)
    names = [name for name in tensors.specs if _is_one_of(unread, table, name)]
    kept = _cast(mapping.sources | {name: tensors.specs[name] for name in names}, dtype)

    def tensor(name: str) -> np.ndarray:
      whole = tuple(slice(0, size) for size in kept[name].shape)
      return np.asarray(tensors.read(name, whole)).astype(kept[name].dtype)

    target.mkdir(parents=True, exist_ok=True)
    write(file, kept, tensor)
  return file


def _is_one_of(patterns: tuple[str, ...], table: Table, name: str) -> bool:
  """Whether a tensor's name, as the rows of a table spell it, is of one of some patterns."""
  return any(matches(pattern, canonical_name(table, name)) for pattern in patterns)


def config_in(dtype: str, config_json: dict[str, Any]) -> dict[str, Any]:
  """A config.json for weights of this dtype: transformers read a network in the dtype that the file
  names, and diffusers do not.
  """
  named = {key: dtype for key in ("dtype", "torch_dtype") if key in config_json}
  return config_json | named


def save_lora(
  folder: str | Path, table: Table | str, adapters: PyTree, header: dict[str, str] | None = None
) -> Path:
  """Writes adapters as diffusers' `save_lora_weights` does, in float32, and returns the file.

  The file doesn't give alpha, so that every reader takes the rank for it. The factors must contain
  alpha / rank already. The file gets the metadata `header` beside its format.
  """
  return save(folder, lora_files.table_for(table_of(table)), adapters, header=header)


def _fetch(array: Any, index: tuple[slice, ...]) -> np.ndarray:
  """`array[index]` on the host.

  A part is cut out on the device. The start of the part is an argument of the program, so that
  there is one program for each shape.
  """
  sizes = tuple(s.stop - s.start for s in index)
  if isinstance(array, np.ndarray):
    return array[index]
  if sizes == array.shape:
    return np.asarray(array)
  return np.asarray(jax.lax.dynamic_slice(array, tuple(s.start for s in index), sizes))

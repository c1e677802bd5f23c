"""LoRA files in the layouts of diffusers, peft and kohya: the adapters in them.

lora_names.py says which layer a tensor is for, and lora_strength.py how strongly it counts. Here
both are read into one `Adapter` for each layer of the network. lora_run.py makes them those of a
run, and lora_merging.py adds them to the weights.
"""

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dancegrpo_jax import installation
from dancegrpo_jax.checkpoints import lora_names, lora_strength
from dancegrpo_jax.checkpoints.lora_names import Layers, Name, Piece, Shape
from dancegrpo_jax.checkpoints.safetensors_io import Reader
from dancegrpo_jax.conversion.table import Row, Spec, Table
from dancegrpo_jax.errors import ConversionError, listed

FILE = "pytorch_lora_weights"
_FILES = (f"{FILE}.safetensors", "adapter_model.safetensors")


class Adapter(NamedTuple):
  """The adapter of one layer of the network.

  Attributes:
    piece: the layer, and which outputs of the file's layer it is.
    down: the name of the tensor A `[rank, in]`, or `[rank, in, height, width]` of a convolution.
    up: the name of the tensor B `[out, rank]`.
    rank: of both.
    scale: the factor of the product B A.
  """

  piece: Piece
  down: str
  up: str
  rank: int
  scale: float


class LoraFile(NamedTuple):
  """What a LoRA file holds.

  Attributes:
    adapters: by the layer of the network.
    notes: lines for the user: what was left out, and where alpha is from.
  """

  adapters: dict[str, Adapter]
  notes: tuple[str, ...]


class _Group(NamedTuple):
  """The names of the tensors of one layer of the file."""

  down: str | None = None
  up: str | None = None
  alpha: str | None = None


def table_for(network: Table) -> Table:
  """The table of adapters of every dense layer that a network's table has, under the names that
  diffusers' `save_lora_weights` writes: `<network>.<module>.lora_A.weight [rank, in]` and
  `.lora_B.weight [out, rank]`.
  """
  rows, prefix = [], network.lora_prefix
  for row in network.rows:
    left, right = (side.split() for side in row.axes.split("->"))
    if row.target.endswith("/kernel") and left == ["o", "i"]:
      module = row.source.removesuffix(".weight")
      path = row.target.removesuffix("/kernel")
      stack = " ".join(right[:-2])
      rows += [
        Row(f"{prefix}.{module}.lora_A.weight", f"{path}/a", f"r i -> {stack} i r"),
        Row(f"{prefix}.{module}.lora_B.weight", f"{path}/b", f"o r -> {stack} r o"),
      ]
  return Table(f"adapters of {network.name}", tuple(rows), file=FILE)


def find(path: str | Path) -> Path:
  """The weight file of a LoRA: the file itself, or the one in a folder.

  Raises:
    ConversionError: there is none; the message says what is there.
  """
  path = installation.find(path)
  if path.is_file() and path.suffix == ".safetensors":
    return path
  if not path.is_dir():
    content, names = f"no such folder or .safetensors file (from {Path.cwd()})", []
  else:
    entries = sorted(entry.name for entry in path.iterdir())
    content = f"the folder holds {listed(entries, 6)}"
    weight_files = [name for name in entries if name.endswith(".safetensors")]
    names = [name for name in _FILES if name in entries]
    if not names and len(weight_files) == 1:
      names = weight_files
  if not names:
    raise ConversionError(
      f"{content}; expected a folder with {' or '.join(_FILES)}, or such a file"
    )
  return path / names[0]


# ---- Reading


def read(file: Path, layers: Layers, reader: Reader) -> LoraFile:
  """The adapters in a file.

  Args:
    file: the weight file.
    layers: of the network.
    reader: of the file.

  Raises:
    ConversionError: one line: the file holds no adapters, those of another model, or adapters of a
      kind that is not implemented.
  """
  names = {tensor: lora_names.parse(layers, tensor) for tensor in reader.specs}
  text = [tensor for tensor, name in names.items() if name.role == "text"]
  names = {tensor: name for tensor, name in names.items() if name.role != "text"}
  _check_kind(layers, names, text)
  settings = lora_strength.settings_of(file, layers.table.lora_prefix)
  groups = _groups(names)
  _check_model(layers, groups, reader.specs)
  adapters: dict[str, Adapter] = {}
  has_alphas = False
  for layer, (down, up, alpha) in groups.items():
    assert down is not None and up is not None  # as _check_model has found
    rank, value = reader.specs[down].shape[0], _scalar(reader, alpha)
    has_alphas = has_alphas or value is not None
    scale = lora_strength.scale_of(settings, value, layer, rank)
    for piece in lora_names.pieces(layers, layer):
      if piece.module in adapters:
        other = adapters[piece.module].down
        raise ConversionError(f"it holds two adapters of one layer: {other} and {down}")
      adapters[piece.module] = Adapter(piece=piece, down=down, up=up, rank=rank, scale=scale)
  notes = []
  if text:
    notes.append(
      f"its adapters of text encoders are left out, because only the {layers.table.name} is"
      f" adapted: {listed(text)}"
    )
  if settings.source.endswith(".json") and not has_alphas:
    notes.append(f"its alpha is that of {settings.source} beside it")
  return LoraFile(adapters=adapters, notes=tuple(notes))


def _scalar(reader: Reader, name: str | None) -> float | None:
  """The only element of a tensor; None where there is no such tensor."""
  if name is None:
    return None
  value = reader.read(name, (slice(None),) * len(reader.specs[name].shape))
  if value.size != 1:
    raise ConversionError(f"{name} has {value.size} elements; expected one number")
  return float(value.reshape(-1)[0])


def _check_kind(layers: Layers, names: dict[str, Name], text: list[str]) -> None:
  """ConversionError: not all tensors are parts of adapters, or they are of another kind."""
  kinds = {tensor: lora_names.other_kind(tensor) for tensor in names}
  other = [tensor for tensor, kind in kinds.items() if kind]
  if other:
    raise ConversionError(
      f"it holds {kinds[other[0]]}, which is not implemented: {listed(other)}; save it as a plain"
      " LoRA"
    )
  unknown = [tensor for tensor, name in names.items() if not name.role]
  if unknown or not names:
    if text and not unknown:
      raise ConversionError(
        f"it holds adapters of text encoders alone ({listed(text)}), and only the"
        f" {layers.table.name} is adapted"
      )
    example = f"{layers.table.lora_prefix}.{next(iter(layers.shapes), '<layer>')}.lora_A.weight"
    raise ConversionError(
      "not a LoRA in the layout of diffusers, peft or kohya: it holds"
      f" {listed(unknown)}; expected names as {example}"
    )


def _groups(names: dict[str, Name]) -> dict[str, _Group]:
  """The tensors by the file's layer. ConversionError: a factor is missing, or is there twice."""
  groups: dict[str, _Group] = {}
  for tensor, name in names.items():
    group = groups.get(name.layer, _Group())
    present = getattr(group, name.role)
    if present is not None:
      raise ConversionError(f"it holds two adapters of one layer: {present} and {tensor}")
    groups[name.layer] = group._replace(**{name.role: tensor})
  incomplete = [group for group in groups.values() if group.down is None or group.up is None]
  if incomplete:
    names_there = [str(group.down or group.up or group.alpha) for group in incomplete]
    raise ConversionError(f"it lacks a factor that belongs to {listed(names_there)}")
  return groups


def _check_model(layers: Layers, groups: dict[str, _Group], specs: dict[str, Spec]) -> None:
  """ConversionError where factors fit no layer of the network, or are no floating-point numbers."""
  whole = [
    name
    for group in groups.values()
    for name in (str(group.down), str(group.up))
    if not jnp.issubdtype(specs[name].dtype, jnp.floating)
  ]
  if whole:
    raise ConversionError(
      f"its factors are {specs[whole[0]].dtype}, and quantised ones are not implemented:"
      f" {listed(whole)}; save them in float16 or float32"
    )
  foreign = [
    str(group.down)
    for layer, group in groups.items()
    if not _fits(layers, layer, specs[str(group.down)].shape, specs[str(group.up)].shape)
  ]
  if foreign:
    raise ConversionError(
      f"of another model: the adapters of {len(foreign)} of its {len(groups)} layers fit no layer"
      f" of the {layers.table.name}, as {foreign[0]} {list(specs[foreign[0]].shape)}"
    )


def _fits(layers: Layers, layer: str, down: Shape, up: Shape) -> bool:
  """Whether factors of these shapes belong to a layer of the network, whatever their rank."""
  found = lora_names.pieces(layers, layer)
  if not found or len(down) < 2 or len(up) < 2 or not down[0]:
    return False
  weight = layers.shapes[found[0].module]
  # A convolution of one pixel and a dense layer are the same; their factors are spelt either way.
  kernel = [size for size in down[2:] if size != 1] == [size for size in weight[2:] if size != 1]
  return (
    kernel
    and down[1] == weight[1]
    and up[0] == found[-1].stop
    and up[1] == down[0]
    and set(up[2:]) <= {1}
  )


def factors(reader: Reader, adapter: Adapter) -> tuple[np.ndarray, np.ndarray]:
  """A `[rank, in]` and B `[out, rank]` of a layer of the network, float32 and without the scale. Of
  a convolution, "in" counts the elements of its window.
  """
  down, up = (
    np.asarray(reader.read(name, (slice(None),) * len(reader.specs[name].shape)), np.float32)
    for name in (adapter.down, adapter.up)
  )
  piece = adapter.piece
  up = up.reshape(len(up), adapter.rank)[piece.start : piece.stop]
  if piece.halves_swapped:
    up = np.roll(up, len(up) // 2, axis=0)
  return down.reshape(adapter.rank, -1), up

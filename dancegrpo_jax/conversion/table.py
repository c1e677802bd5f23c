"""Conversion tables: which tensors of a file are which parameters, as data.

A `Row` says that a tensor, or an equal part of it along one axis, is a parameter, or a part or one
layer of it, with its axes in another order. mapping.py matches a table with the tensors of a file
and the parameters of a network. Nothing in this folder imports JAX or knows a file format.
"""

import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import numpy as np

from dancegrpo_jax.errors import ConversionError


class Spec(NamedTuple):
  """Shape and dtype of a tensor or parameter."""

  shape: tuple[int, ...]
  dtype: np.dtype


class Part(NamedTuple):
  """Units `start` to `stop` of the `total` equal units that an axis is divided into.

  `axis` is the letter that names the axis in `Row.axes`.
  """

  axis: str
  start: int
  stop: int
  total: int


class Row(NamedTuple):
  """One correspondence of a tensor and a parameter.

  Attributes:
    source: tensor name; `{i}` stands for an index.
    target: parameter path, levels joined by "/"; uses the indices of `source`.
    axes: "o i h w -> h w i o". A 1 is an axis of length 1 that the other side lacks. An index of
      `source` on the right ("o i -> {n} i o") is an axis along which the tensors are stacked.
    source_part: the part of the tensor that this row takes; None is the whole tensor. Rows for the
      other parts take the rest.
    target_part: the part of the parameter that the tensor fills; None is the whole parameter.
  """

  source: str
  target: str
  axes: str
  source_part: Part | None = None
  target_part: Part | None = None


class Buffer(NamedTuple):
  """A tensor of the file that is no parameter. It is dropped on import; on export `make` says how
  it is made again: "arange" is 0, 1, 2 ...
  """

  source: str
  make: str


class LoraName(NamedTuple):
  """What LoRA files of another program call a layer, or several layers that it holds as one.

  Attributes:
    source: the layer's name; `{i}` stands for an index. "." and "_" are the same here, because some
      programs write every "." as "_".
    modules: the layers of the rows, without ".weight". Their outputs lie one after another in the
      output of `source`.
    halves_swapped: whether the first half of the output is the second half in the rows' layer.
  """

  source: str
  modules: tuple[str, ...]
  halves_swapped: bool = False


class Dialect(NamedTuple):
  """Another layout of a network's files, which other programs write.

  Attributes:
    title: what messages call it.
    marks: patterns of names. A file that has a tensor of each is in this layout.
    table: `(tensors that the network's own rows expect) -> table`. Its rows take the tensors of a
      file of this layout to those of the network's own.
  """

  title: str
  marks: tuple[str, ...]
  table: "Callable[[dict[str, Spec]], Table]"


class Table(NamedTuple):
  """All rows of one network.

  Where the names of several rows match a tensor, those rows count whose number of axes fits the
  tensor and whose parameter the network has. So one table serves stacked and single layers, and
  convolutions and dense projections. Where several rows are alternatives for one parameter, the
  first one names the tensor when a file is written from nothing.

  Attributes:
    name: the class name that config.json gives.
    rows: the correspondences.
    aliases: (other spelling, spelling of the rows); `{*}` stands for any text. Used for reading
      only.
    buffers: tensors that are no parameters.
    copies: (tensor, the tensor that it repeats), for weights that a network ties. Some files hold
      one of the names, some both. The first is read where the second is missing, and left out
      elsewhere.
    others: tensors of other networks in the same file, and what is no parameter and not written
      again. They are left out.
    prefixes: what the names of this network's tensors begin with in files that hold several
      networks.
    dialects: other layouts of the same network.
    file: stem of the weight file in this layout.
    lora_prefix: what the network is called in LoRA files of its pipeline.
    lora_names: what LoRA files of other programs call its layers.
  """

  name: str
  rows: tuple[Row, ...]
  aliases: tuple[tuple[str, str], ...] = ()
  buffers: tuple[Buffer, ...] = ()
  copies: tuple[tuple[str, str], ...] = ()
  others: tuple[str, ...] = ()
  prefixes: tuple[str, ...] = ()
  dialects: tuple[Dialect, ...] = ()
  file: str = "model"
  lora_prefix: str = "transformer"
  lora_names: tuple[LoraName, ...] = ()


# ---- Patterns


@cache
def _regex(pattern: str) -> re.Pattern:
  # Splitting at a group puts the placeholders' names at the odd positions.
  pieces = re.split(r"\{(\w+|\*)\}", pattern)
  texts, names = pieces[::2], pieces[1::2]
  groups = [r"(?P<rest>.*)" if name == "*" else rf"(?P<{name}>\d+)" for name in names]
  return re.compile("".join(re.escape(text) + group for text, group in zip(texts, [*groups, ""])))


def match_name(pattern: str, name: str) -> dict[str, str] | None:
  """What the placeholders of a pattern stand for in a name; None where it doesn't match."""
  result = _regex(pattern).fullmatch(name)
  return result.groupdict() if result else None


def rows_of(rows: tuple[Row, ...], name: str) -> list[tuple[Row, dict[str, str]]]:
  """The rows whose pattern a tensor's name matches, each with what its placeholders stand for.

  This is one function and not a call for each row, because files have thousands of tensors and
  tables dozens of rows.
  """
  found = ((row, _regex(row.source).fullmatch(name)) for row in rows)
  return [(row, result.groupdict()) for row, result in found if result]


def matches(pattern: str, name: str) -> bool:
  """Whether a name is of a pattern."""
  return match_name(pattern, name) is not None


def fill(pattern: str, values: dict[str, str]) -> str:
  """The name that a pattern gives with these values in the place of its placeholders."""
  return re.sub(r"\{(\w+|\*)\}", lambda m: values["rest" if m[1] == "*" else m[1]], pattern)


# ---- Axes


@cache
def axes_of(row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """The axis names of the tensor and of the parameter of a row.

  Raises:
    ValueError: an axis is named on one side only, which is a mistake in the table.
  """
  left, right = (tuple(side.split()) for side in row.axes.split("->"))
  stacked = {f"{{{index}}}" for index in _regex(row.source).groupindex}
  if set(left) - {"1"} != set(right) - {"1"} - stacked:
    raise ValueError(
      f"row {row.source} -> {row.target}: axes {row.axes!r} name an axis on one side only"
    )
  return left, right


def is_stacked(axis: str) -> bool:
  """Whether an axis name of a parameter is an index, along which tensors are stacked."""
  return axis.startswith("{")


def index_of(axis: str) -> str:
  """The name of the index of a stacked axis: "i" of "{i}"."""
  return axis[1:-1]


def span(part: Part | None, axis: str, size: int) -> tuple[int, int]:
  """Start and stop of a row's part on an axis of this size. ValueError: it does not divide."""
  if part is None or part.axis != axis:
    return 0, size
  if size % part.total:
    raise ValueError(f"an axis of {size} does not divide into {part.total} parts")
  unit = size // part.total
  return part.start * unit, part.stop * unit


# ---- Names of tensors


def _rows_of(table: Table, path: str, rank: int) -> list[tuple[Row, dict[str, str]]]:
  """The rows that fill a parameter with this number of axes, and the indices that its path gives.

  A fused parameter has one row for each part. Of alternatives for the same part, the first counts.
  """
  rows, filled = [], set()
  for row in table.rows:
    indices = match_name(row.target, path)
    if indices is None or len(axes_of(row)[1]) != rank or row.target_part in filled:
      continue
    filled.add(row.target_part)
    rows.append((row, indices))
  return rows


def tensors_of(table: Table, path: str, shape: tuple[int, ...]) -> list[tuple[Row, str]]:
  """The rows and tensor names that the table gives a parameter.

  A stacked parameter has one tensor for each layer, a fused one has one for each part.
  """
  tensors = []
  for row, indices in _rows_of(table, path, len(shape)):
    filled = [indices]
    for axis, size in zip(axes_of(row)[1], shape):
      if is_stacked(axis):
        filled = [known | {index_of(axis): str(k)} for known in filled for k in range(size)]
    tensors += [(row, fill(row.source, values)) for values in filled]
  return tensors


def _tensor_shape(row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape of a row's tensor, from the shape of its parameter."""
  left, right = axes_of(row)
  spans = {axis: span(row.target_part, axis, size) for axis, size in zip(right, shape)}
  sizes = {axis: stop - start for axis, (start, stop) in spans.items()}
  part = row.source_part
  if part is not None:
    sizes[part.axis] = sizes[part.axis] * part.total // (part.stop - part.start)
  return tuple(1 if axis == "1" else sizes[axis] for axis in left)


def expected_sources(table: Table, targets: dict[str, Spec]) -> dict[str, Spec]:
  """The tensors of the file that a network's parameters would be written to.

  Args:
    table: the network's rows.
    targets: the parameters, by path.

  Returns:
    Shapes and dtypes by tensor name.

  Raises:
    ConversionError: parameters that no row of the table names.
  """
  sources, unknown = {}, []
  for path, spec in targets.items():
    tensors = tensors_of(table, path, spec.shape)
    if not tensors:
      unknown.append(f"parameter {path} {show(spec.shape)}: no row of the table names it")
    for row, name in tensors:
      sources[name] = Spec(_tensor_shape(row, spec.shape), spec.dtype)
  raise_problems(table, unknown)
  return sources


def stacked_axes(table: Table, path: str, rank: int) -> int:
  """How many of a parameter's first axes count layers, because tensors are stacked along them.

  Args:
    table: the network's rows.
    path: of the parameter.
    rank: its number of axes.

  Returns:
    0 where the layers are held apart, and where no row names the parameter.
  """
  for row, _ in _rows_of(table, path, rank):
    right = axes_of(row)[1]
    return next((k for k, axis in enumerate(right) if not is_stacked(axis)), len(right))
  return 0


# ---- Messages


def show(shape: Iterable[int]) -> str:
  """A shape as messages write it: "[2, 3]"."""
  return "[" + ", ".join(map(str, shape)) + "]"


def problems_text(
  table: Table, problems: list[str], before: str = "", after: str = "", most: int = 6
) -> str:
  """A message of a few lines on tensors and parameters that don't fit.

  Args:
    table: of the network.
    problems: a line for each.
    before: a line in front of the problems; "" for none.
    after: a line behind them where not all are shown; "" for none.
    most: how many problems are shown.
  """
  count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
  lines = [f"{table.name}: {count} between the checkpoint and the network"]
  lines += [before] if before else []
  lines += problems[:most]
  if len(problems) > most:
    lines += [f"and {len(problems) - most} more", *([after] if after else [])]
  return "\n  ".join(lines)


def raise_problems(table: Table, problems: list[str]) -> None:
  """Raises the problems as one ConversionError, if there are any."""
  if problems:
    raise ConversionError(problems_text(table, problems))

"""Checkpoint tables: which tensors of a file are which parameters, as data that reads forwards,
backwards and by slices.

A `Row` says that a tensor (or an equal part of it along one axis) is a parameter (or a part or one
layer of it) with its axes in another order. So every row is a correspondence of boxes: `plan` turns
a table, the tensors of a file and the parameters of a network into `Block`s, and import, export and
the reading of one shard's slice all walk the same blocks. Nothing here knows JAX, a network or a
file format; tensors come through `read(name, slices)`.
"""

import math
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import cache
from typing import NamedTuple

import numpy as np

from dancegrpo_jax.errors import ConversionError

Slices = tuple[slice, ...]
Read = Callable[[str, Slices], np.ndarray]  # (name, slices) -> that part of the tensor
Box = tuple[tuple[int, int], ...]  # (start, stop) on every axis


class Spec(NamedTuple):
  """Shape and dtype of a tensor or parameter."""

  shape: tuple[int, ...]
  dtype: np.dtype


class Part(NamedTuple):
  """Units `start` to `stop` of `total` equal ones along an axis, which is named by its letter in
  `Row.axes`.
  """

  axis: str
  start: int
  stop: int
  total: int


class Row(NamedTuple):
  """One correspondence.

  Attributes:
    source: tensor name; `{i}` stands for an index.
    target: parameter path, levels joined by "/"; uses the indices of `source`.
    axes: "o i h w -> h w i o". A 1 is an axis of length 1 that the other side lacks. An index of
      `source` on the right ("o i -> {n} i o") is an axis along which the tensors are stacked.
    source_part: the part of the tensor that this row takes; None = all. Rows for the other parts
      take the rest.
    target_part: the part of the parameter that it fills; None = all.
  """

  source: str
  target: str
  axes: str
  source_part: Part | None = None
  target_part: Part | None = None


class Buffer(NamedTuple):
  """A tensor of the file that is no parameter: dropped on import. `make` regenerates it on export:
  "arange" = 0, 1, 2 ...
  """

  source: str
  make: str


class Table(NamedTuple):
  """All rows of one network.

  Where several rows fit a tensor's name, those count whose number of axes fits the tensor and whose
  target the network
  has: so one table serves stacked and unstacked layers, conv and linear projections. Of
    alternatives for one
  parameter, the first names the tensor when a file is written from nothing.

  Attributes:
    name: the class name that config.json gives.
    rows: the correspondences.
    aliases: (other spelling, spelling of the rows); `{*}` stands for any text. Only for reading.
    buffers: tensors that are no parameters.
    copies: (tensor, the tensor that it repeats), for weights that a network ties: some files hold
      one name, some both. Only for reading, where the second is missing; else left out.
    others: tensors of networks in the same file that aren't wanted here. Left out.
    file: stem of the weight file in this layout.
    lora_prefix: what the network is called in LoRA files of its pipeline.
  """

  name: str
  rows: tuple[Row, ...]
  aliases: tuple[tuple[str, str], ...] = ()
  buffers: tuple[Buffer, ...] = ()
  copies: tuple[tuple[str, str], ...] = ()
  others: tuple[str, ...] = ()
  file: str = "model"
  lora_prefix: str = "transformer"


class Block(NamedTuple):
  """A box of a tensor that is a box of a parameter. `axes[k]` is the tensor's axis that target axis
  k is; None = length 1.
  """

  source: str
  source_box: Box
  target: str
  target_box: Box
  axes: tuple[int | None, ...]


class Mapping(NamedTuple):
  """What `plan` found: every tensor's and every parameter's blocks. Tensors that the table leaves
  out aren't among `sources`.
  """

  sources: dict[str, Spec]
  targets: dict[str, Spec]
  by_source: dict[str, tuple[Block, ...]]
  by_target: dict[str, tuple[Block, ...]]
  buffers: dict[str, Buffer]


class Piece(NamedTuple):
  """One read of an import: `read` of tensor `source`, axes arranged by `axes`, goes to `place` of
  the result.
  """

  source: str
  read: Slices
  axes: tuple[int | None, ...]
  place: Slices


# ---- patterns
# -------------------------------------------------------------------------------------------------------


@cache
def _regex(pattern: str) -> re.Pattern:
  pieces = re.split(r"\{(\w+|\*)\}", pattern)
  groups = [
    (r"(?P<rest>.*)" if p == "*" else rf"(?P<{p}>\d+)") if k % 2 else re.escape(p)
    for k, p in enumerate(pieces)
  ]
  return re.compile("".join(groups))


def _match(pattern: str, name: str) -> dict[str, str] | None:
  found = _regex(pattern).fullmatch(name)
  return found.groupdict() if found else None


def _fill(pattern: str, values: dict) -> str:
  return re.sub(r"\{(\w+|\*)\}", lambda m: str(values["rest" if m[1] == "*" else m[1]]), pattern)


@cache
def _axes(row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """The axis names of both sides of a row, checked. ValueError: a mistake in the table."""
  left, right = (tuple(side.split()) for side in row.axes.split("->"))
  stacked = {f"{{{index}}}" for index in _regex(row.source).groupindex}
  if set(left) - {"1"} != set(right) - {"1"} - stacked:
    raise ValueError(
      f"row {row.source} -> {row.target}: axes {row.axes!r} name an axis on one side only"
    )
  return left, right


# ---- blocks
# ---------------------------------------------------------------------------------------------------------


def _span(part: Part | None, axis: str, size: int) -> tuple[int, int]:
  """Start and stop of a row's part on an axis of this size. ValueError: it does not divide."""
  if part is None or part.axis != axis:
    return 0, size
  if size % part.total:
    raise ValueError(f"an axis of {size} does not divide into {part.total} parts")
  unit = size // part.total
  return part.start * unit, part.stop * unit


def _block(
  row: Row, index: dict[str, str], name: str, source: Spec, path: str, target: Spec
) -> Block:
  """The block of one tensor. ValueError: the shapes do not fit."""
  left, right = _axes(row)
  source_box = tuple(
    (0, 1) if a == "1" else _span(row.source_part, a, n) for a, n in zip(left, source.shape)
  )
  length = {a: stop - start for a, (start, stop) in zip(left, source_box)}
  target_box, wanted = [], []
  for a, size in zip(right, target.shape):
    if a in length:
      start, stop = _span(row.target_part, a, size) if a != "1" else (0, 1)
      wanted.append(length[a] if (start, stop) == (0, size) else length[a] + size - stop + start)
    elif a == "1":
      start, stop = 0, 1
      wanted.append(1)
    else:
      start, stop = int(index[a[1:-1]]), int(index[a[1:-1]]) + 1
      wanted.append(max(size, stop))
    target_box.append((start, stop))
  # A 1 in the row must be a 1 in the tensor too, else its elements would be left out in silence.
  if any(a == "1" and n != 1 for a, n in zip(left, source.shape)):
    raise ValueError(f"expected {row.axes.split('->')[0].strip()!r} with 1 where it says 1")
  if tuple(wanted) != target.shape:
    raise ValueError(f"it would be {_show(wanted)}")
  axes = tuple(left.index(a) if a in length and a != "1" else None for a in right)
  return Block(name, source_box, path, tuple(target_box), axes)


def _volume(box: Box) -> int:
  return math.prod(stop - start for start, stop in box)


def _overlap(a: Box, b: Box) -> bool:
  return all(max(p[0], q[0]) < min(p[1], q[1]) for p, q in zip(a, b))


def _show(shape: Iterable[int]) -> str:
  return "[" + ", ".join(map(str, shape)) + "]"


def _names(table: Table, path: str, spec: Spec) -> list[tuple[Row, dict, str]]:
  """(row, indices, tensor name) that the table gives a parameter; stacked parameters have one a
  layer, fused ones one a part.
  """
  found, filled = [], set()
  for row in table.rows:
    index = _match(row.target, path)
    if index is None or len(_axes(row)[1]) != len(spec.shape) or row.target_part in filled:
      continue
    filled.add(row.target_part)
    left, right = _axes(row)
    indices = [index]
    for a, size in zip(right, spec.shape):
      if a.startswith("{"):
        indices = [known | {a[1:-1]: str(k)} for known in indices for k in range(size)]
    found += [(row, known, _fill(row.source, known)) for known in indices]
  return found


def expected_sources(table: Table, targets: dict[str, Spec]) -> dict[str, Spec]:
  """Names, shapes and dtypes of the file that a network's parameters would be written to.

  Raises:
    ConversionError: parameters that no row of the table names.
  """
  sources, unknown = {}, []
  for path, spec in targets.items():
    rows = _names(table, path, spec)
    if not rows:
      unknown.append(f"parameter {path} {_show(spec.shape)}: no row of the table names it")
    for row, _, name in rows:
      left, right = _axes(row)
      size = {
        a: stop - start
        for a, n in zip(right, spec.shape)
        for start, stop in [_span(row.target_part, a, n)]
      }
      part = row.source_part
      whole = {part.axis: size[part.axis] * part.total // (part.stop - part.start)} if part else {}
      sources[name] = Spec(tuple(1 if a == "1" else (size | whole)[a] for a in left), spec.dtype)
  _raise(table, unknown)
  return sources


# ---- plan
# -----------------------------------------------------------------------------------------------------------


def _left_out(table: Table, name: str, sources: dict[str, Spec]) -> bool:
  """Whether a tensor repeats one that is there, or belongs to another network of the file."""
  repeats = any(name == copy and own in sources for copy, own in table.copies)
  return repeats or any(_match(pattern, name) is not None for pattern in table.others)


def match(
  table: Table, sources: dict[str, Spec], targets: dict[str, Spec]
) -> tuple[Mapping, list[str]]:
  """As `plan`, but hands the problems back instead of raising them; for `inspect`."""
  sources = {name: spec for name, spec in sources.items() if not _left_out(table, name, sources)}
  by_source: dict[str, list[Block]] = {name: [] for name in sources}
  by_target: dict[str, list[Block]] = {path: [] for path in targets}
  buffers, problems, unknown, reported, seen = {}, [], [], set(), {}
  for name, spec in sources.items():
    canonical = next(
      (
        _fill(to, m)
        for other, to in table.aliases + table.copies
        if (m := _match(other, name)) is not None
      ),
      name,
    )
    if seen.setdefault(canonical, name) != name:
      problems.append(
        f"tensors {seen[canonical]} and {name}: two spellings of the same tensor {canonical}"
      )
      continue
    buffer = next((b for b in table.buffers if _match(b.source, canonical) is not None), None)
    if buffer:
      buffers[name] = buffer
      continue
    rows = [
      (row, index) for row in table.rows if (index := _match(row.source, canonical)) is not None
    ]
    paths = [(row, index, _fill(row.target, index)) for row, index in rows]
    present = [p for p in paths if p[2] in targets]
    fitting = [
      p
      for p in present
      if len(_axes(p[0])[0]) == len(spec.shape) and len(_axes(p[0])[1]) == len(targets[p[2]].shape)
    ]
    for row, index, path in fitting:
      try:
        block = _block(row, index, name, spec, path, targets[path])
      except ValueError as error:
        problems.append(
          f"tensor {name} {_show(spec.shape)} does not fit parameter {path}"
          f" {_show(targets[path].shape)}: {error}"
        )
        reported |= {name, path}
        continue
      by_source[name].append(block)
      by_target[path].append(block)
    if present and not fitting:
      path = present[0][2]
      problems.append(
        f"tensor {name} {_show(spec.shape)} does not fit parameter {path}"
        f" {_show(targets[path].shape)}: "
        f"expected axes {' or '.join(dict.fromkeys(repr(p[0].axes) for p in present))}"
      )
      reported |= {name, path}
    elif not present:
      unknown.append((name, list(dict.fromkeys(p[2] for p in paths))))
  problems += _uncovered(
    table, sources, targets, by_source, by_target, reported, unknown, set(buffers)
  )
  found = Mapping(
    sources=sources,
    targets=targets,
    by_source={name: tuple(blocks) for name, blocks in by_source.items()},
    by_target={path: tuple(blocks) for path, blocks in by_target.items()},
    buffers=buffers,
  )
  return found, problems


def _uncovered(
  table, sources, targets, by_source, by_target, reported, unknown, buffers
) -> list[str]:
  """Problems of tensors that go nowhere, go twice or go in part, and of parameters that stay empty
  or are filled twice.
  """
  problems, missing, extra = [], {}, {name for name, _ in unknown}
  for path, blocks in by_target.items():
    have = {block.source for block in blocks}
    if path not in reported and sum(_volume(b.target_box) for b in blocks) < math.prod(
      targets[path].shape
    ):
      missing[path] = [
        name for _, _, name in _names(table, path, targets[path]) if name not in have
      ]
  wanted = [name for names in missing.values() for name in names]
  for name, paths in unknown:
    tried = f"the network has no parameter {' or '.join(paths)}" if paths else "unknown name"
    problems.append(
      f"unexpected tensor {name} {_show(sources[name].shape)}:"
      f" {tried}{_hint(name, wanted, len(problems))}"
    )
  for path, names in missing.items():
    where = f"expected tensor {', '.join(names)}" if names else "no row of the table names it"
    hint = _hint(names[0], extra, len(problems)) if names else ""
    problems.append(
      f"parameter {path} {_show(targets[path].shape)} is not in the checkpoint: {where}{hint}"
    )
  for kind, side, specs, box in (
    ("tensor", by_source, sources, 1),
    ("parameter", by_target, targets, 3),
  ):
    for name, blocks in side.items():
      boxes = [block[box] for block in blocks]
      if any(_overlap(a, b) for k, a in enumerate(boxes) for b in boxes[:k]):
        others = sorted({block[2 if box == 1 else 0] for block in blocks})
        problems.append(f"{kind} {name}: the same elements belong to {' and '.join(others)}")
      elif (
        kind == "tensor"
        and blocks
        and name not in reported
        and sum(map(_volume, boxes)) < math.prod(specs[name].shape)
      ):
        problems.append(
          f"tensor {name} {_show(specs[name].shape)}: only a part of it is a parameter of the"
          " network"
        )
  return problems


def _hint(name: str, candidates: Iterable[str], count: int) -> str:
  """A did-you-mean. Left out past the first problems: a wholly wrong file would take minutes to
  compare.
  """
  close = get_close_matches(name, list(candidates), n=1, cutoff=0.8) if count < 50 else []
  return f" (similar: {close[0]})" if close else ""


def _raise(table: Table, problems: list[str]) -> None:
  if problems:
    head = f"{table.name}: {len(problems)} problem{'s' * (len(problems) > 1)} between the checkpoint and the network"
    raise ConversionError("\n  ".join([head, *problems]))


def plan(table: Table, sources: dict[str, Spec], targets: dict[str, Spec]) -> Mapping:
  """Matches a file's tensors with a network's parameters, strictly: nothing left over on either
  side.

  Args:
    table: the network's rows.
    sources: the file's tensors.
    targets: the parameters, by path.

  Raises:
    ConversionError: with every unexpected tensor, empty parameter, shape that does not fit and
      double spelling.
  """
  mapping, problems = match(table, sources, targets)
  _raise(table, problems)
  return mapping


def describe(mapping: Mapping) -> list[tuple[str, tuple[int, ...], str, str]]:
  """(name, shape, dtype, where it goes) for every tensor, in the file's order."""

  def place(block: Block) -> str:
    box = list(zip(block.target_box, mapping.targets[block.target].shape))
    parts = [
      ":" if span == (0, n) else str(span[0]) if span[1] - span[0] == 1 else f"{span[0]}:{span[1]}"
      for span, n in box
    ]
    return block.target + (f"[{', '.join(parts)}]" if set(parts) - {":"} else "")

  def goes(name: str) -> str:
    if name in mapping.buffers:
      return "(buffer: dropped, made again on export)"
    return ", ".join(place(block) for block in mapping.by_source[name]) or "(nowhere)"

  return [
    (name, spec.shape, np.dtype(spec.dtype).name, goes(name))
    for name, spec in mapping.sources.items()
  ]

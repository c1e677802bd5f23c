"""Matches the tensors of a file with the parameters of a network, by a conversion table.

A row of a table is a correspondence of boxes. `plan` turns a table, the tensors of a file and the
parameters of a network into `Block`s; import, export and the reading of one shard's slice
(transfer.py) all walk the same blocks.
"""

import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NamedTuple

import numpy as np

from dancegrpo_jax.conversion.table import (
  Buffer,
  Row,
  Spec,
  Table,
  axes_of,
  fill,
  index_of,
  is_stacked,
  match_name,
  matches,
  raise_problems,
  rows_of,
  show,
  span,
  tensors_of,
)
from dancegrpo_jax.errors import listed

Box = tuple[tuple[int, int], ...]  # (start, stop) on every axis


class Block(NamedTuple):
  """A box of a tensor that is a box of a parameter.

  `axes[k]` is the tensor's axis that axis k of the parameter is; None is an axis of length 1 that
  the tensor lacks.
  """

  source: str
  source_box: Box
  target: str
  target_box: Box
  axes: tuple[int | None, ...]


class Mapping(NamedTuple):
  """The result of `plan`: every tensor's and every parameter's blocks.

  Tensors that the table leaves out aren't among `sources`.
  """

  sources: dict[str, Spec]
  targets: dict[str, Spec]
  by_source: dict[str, tuple[Block, ...]]
  by_target: dict[str, tuple[Block, ...]]
  buffers: dict[str, Buffer]


# ---- Blocks


class _Candidate(NamedTuple):
  """A row whose `source` matches a tensor's name, with what the indices stand for and the parameter
  path that follows.
  """

  row: Row
  indices: dict[str, str]
  path: str


def _block(candidate: _Candidate, name: str, source: Spec, target: Spec) -> Block:
  """The block of a tensor in the parameter of a candidate.

  Raises:
    ValueError: the shapes do not fit.
  """
  row, indices, path = candidate
  left, right = axes_of(row)
  # A 1 in the row must be a 1 in the tensor too, or its elements would be left out silently.
  if any(axis == "1" and size != 1 for axis, size in zip(left, source.shape)):
    raise ValueError(f"expected {row.axes.split('->')[0].strip()!r} with 1 where it says 1")
  source_box = tuple(span(row.source_part, axis, size) for axis, size in zip(left, source.shape))
  lengths = {axis: stop - start for axis, (start, stop) in zip(left, source_box)}
  target_box, fitting_shape = [], []
  for axis, size in zip(right, target.shape):
    if axis == "1":
      start, stop, fitting_size = 0, 1, 1
    elif is_stacked(axis):
      start = int(indices[index_of(axis)])
      stop = start + 1
      fitting_size = max(size, stop)
    else:
      start, stop = span(row.target_part, axis, size)
      fitting_size = lengths[axis] + size - (stop - start)
    target_box.append((start, stop))
    fitting_shape.append(fitting_size)
  if tuple(fitting_shape) != target.shape:
    raise ValueError(f"it would be {show(fitting_shape)}")
  axes = tuple(left.index(axis) if axis in lengths and axis != "1" else None for axis in right)
  return Block(
    source=name, source_box=source_box, target=path, target_box=tuple(target_box), axes=axes
  )


def _volume(box: Box) -> int:
  return math.prod(stop - start for start, stop in box)


def _covers(boxes: Iterable[Box], shape: tuple[int, ...]) -> bool:
  """Whether boxes that don't overlap fill an array of this shape."""
  return sum(map(_volume, boxes)) >= math.prod(shape)


def _overlap(a: Box, b: Box) -> bool:
  return all(max(p[0], q[0]) < min(p[1], q[1]) for p, q in zip(a, b))


def _any_overlap(boxes: list[Box]) -> bool:
  return any(_overlap(a, b) for k, a in enumerate(boxes) for b in boxes[:k])


# ---- Plans


class _Matching(NamedTuple):
  """What `match` has worked out so far. The collections are filled in while it goes on.

  Attributes:
    table: the network's rows.
    sources: the file's tensors, without those that the table leaves out.
    targets: the parameters, by path.
    by_source: every tensor's blocks.
    by_target: every parameter's blocks.
    buffers: tensors that are no parameters.
    unexpected: tensors without a parameter, each with the paths that the table would give it.
    misfits: tensors and parameters whose shapes do not fit; nothing more is reported of them.
    problems: a line for each.
  """

  table: Table
  sources: dict[str, Spec]
  targets: dict[str, Spec]
  by_source: dict[str, list[Block]]
  by_target: dict[str, list[Block]]
  buffers: dict[str, Buffer]
  unexpected: dict[str, list[str]]
  misfits: set[str]
  problems: list[str]


def _is_left_out(table: Table, name: str, sources: dict[str, Spec]) -> bool:
  """Whether a tensor repeats one that is there, or belongs to another network of the file."""
  repeats = any(name == copy and original in sources for copy, original in table.copies)
  return repeats or any(matches(pattern, name) for pattern in table.others)


def canonical_name(table: Table, name: str) -> str:
  """The spelling of a tensor's name that the rows of a table use."""
  for spelling, canonical in table.aliases + table.copies:
    rest = match_name(spelling, name)
    if rest is not None:
      return fill(canonical, rest)
  return name


def _candidates(table: Table, canonical: str) -> list[_Candidate]:
  return [
    _Candidate(row, indices, fill(row.target, indices))
    for row, indices in rows_of(table.rows, canonical)
  ]


def match(
  table: Table, sources: dict[str, Spec], targets: dict[str, Spec]
) -> tuple[Mapping, list[str]]:
  """Matches a file's tensors with a network's parameters, whatever fits.

  Args:
    table: the network's rows.
    sources: the file's tensors.
    targets: the parameters, by path.

  Returns:
    The mapping of all that fits, and a line for every problem. `plan` raises them instead.
  """
  sources = {name: spec for name, spec in sources.items() if not _is_left_out(table, name, sources)}
  matching = _Matching(
    table=table,
    sources=sources,
    targets=targets,
    by_source={name: [] for name in sources},
    by_target={path: [] for path in targets},
    buffers={},
    unexpected={},
    misfits=set(),
    problems=[],
  )
  first_spellings: dict[str, str] = {}
  for name in sources:
    canonical = canonical_name(table, name)
    first = first_spellings.setdefault(canonical, name)
    buffer = next((b for b in table.buffers if matches(b.source, canonical)), None)
    if first != name:
      matching.problems.append(
        f"tensors {first} and {name}: two spellings of the same tensor {canonical}"
      )
    elif buffer is not None:
      matching.buffers[name] = buffer
    else:
      _place(matching, name, _candidates(table, canonical))
  problems = matching.problems + _without_counterpart(matching) + _used_wrongly(matching)
  mapping = Mapping(
    sources=sources,
    targets=targets,
    by_source={name: tuple(blocks) for name, blocks in matching.by_source.items()},
    by_target={path: tuple(blocks) for path, blocks in matching.by_target.items()},
    buffers=matching.buffers,
  )
  return mapping, problems


def _place(matching: _Matching, name: str, candidates: list[_Candidate]) -> None:
  """Adds the blocks of one tensor, or notes why it has none."""
  spec, targets = matching.sources[name], matching.targets
  present = [candidate for candidate in candidates if candidate.path in targets]
  if not present:
    paths = dict.fromkeys(candidate.path for candidate in candidates)
    matching.unexpected[name] = list(paths)
    return
  fitting = []
  for candidate in present:
    left, right = axes_of(candidate.row)
    if len(left) == len(spec.shape) and len(right) == len(targets[candidate.path].shape):
      fitting.append(candidate)
  if fitting and _is_whole(spec) and not _is_whole(targets[fitting[0].path]):
    _note_misfit(matching, name, fitting[0].path, f"{spec.dtype} numbers are no weights")
    return
  if not fitting:
    alternatives = dict.fromkeys(repr(candidate.row.axes) for candidate in present)
    _note_misfit(matching, name, present[0].path, f"expected axes {' or '.join(alternatives)}")
  for candidate in fitting:
    path = candidate.path
    try:
      block = _block(candidate, name, spec, targets[path])
    except ValueError as error:
      _note_misfit(matching, name, path, str(error))
    else:
      matching.by_source[name].append(block)
      matching.by_target[path].append(block)


def _is_whole(spec: Spec) -> bool:
  """Whether the elements are integers or truth values, as those of quantised weights."""
  return np.dtype(spec.dtype).kind in "iub"


def _note_misfit(matching: _Matching, name: str, path: str, reason: str) -> None:
  shape, target = matching.sources[name].shape, matching.targets[path].shape
  matching.problems.append(
    f"tensor {name} {show(shape)} does not fit parameter {path} {show(target)}: {reason}"
  )
  matching.misfits.update((name, path))


def _missing_tensors(matching: _Matching) -> dict[str, list[str]]:
  """The parameters that the file fills in part or not at all, with the tensors that would fill
  them.
  """
  missing = {}
  for path, blocks in matching.by_target.items():
    shape = matching.targets[path].shape
    if path not in matching.misfits and not _covers((b.target_box for b in blocks), shape):
      present = {block.source for block in blocks}
      names = [name for _, name in tensors_of(matching.table, path, shape)]
      missing[path] = [name for name in names if name not in present]
  return missing


def _without_counterpart(matching: _Matching) -> list[str]:
  """A line for every tensor without a parameter, and for every parameter without its tensors.

  Each is a hint for the other: one of them may be misspelt.
  """
  problems: list[str] = []
  missing = _missing_tensors(matching)
  missing_names = [name for names in missing.values() for name in names]
  for name, paths in matching.unexpected.items():
    reason = f"the network has no parameter {' or '.join(paths)}" if paths else "unknown name"
    shape, hint = matching.sources[name].shape, _hint(name, missing_names, len(problems))
    problems.append(f"unexpected tensor {name} {show(shape)}: {reason}{hint}")
  for path, names in missing.items():
    if names:
      hint = _hint(names[0], matching.unexpected, len(problems))
      reason = f"expected tensor {listed(names)}{hint}"
    else:
      reason = "no row of the table names it"
    shape = matching.targets[path].shape
    problems.append(f"parameter {path} {show(shape)} is not in the checkpoint: {reason}")
  return problems


def _used_wrongly(matching: _Matching) -> list[str]:
  """A line for every tensor that is used twice or in part, and every parameter filled twice."""
  problems = []
  for name, blocks in matching.by_source.items():
    boxes, shape = [block.source_box for block in blocks], matching.sources[name].shape
    if _any_overlap(boxes):
      problems.append(_shared("tensor", name, {block.target for block in blocks}))
    elif blocks and name not in matching.misfits and not _covers(boxes, shape):
      problems.append(
        f"tensor {name} {show(shape)}: only a part of it is a parameter of the network"
      )
  for path, blocks in matching.by_target.items():
    if _any_overlap([block.target_box for block in blocks]):
      problems.append(_shared("parameter", path, {block.source for block in blocks}))
  return problems


def _shared(kind: str, name: str, owners: set[str]) -> str:
  return f"{kind} {name}: the same elements belong to {listed(sorted(owners), between=' and ')}"


def _hint(name: str, candidates: Iterable[str], count: int) -> str:
  """The most similar name, where one is similar enough.

  Past `count` = 50 problems there are no hints: for a wholly wrong file they would take minutes.
  """
  close = get_close_matches(name, list(candidates), n=1, cutoff=0.8) if count < 50 else []
  return f" (similar: {close[0]})" if close else ""


def plan(table: Table, sources: dict[str, Spec], targets: dict[str, Spec]) -> Mapping:
  """Matches a file's tensors with a network's parameters; nothing may be left over on either side.

  Args:
    table: the network's rows.
    sources: the file's tensors.
    targets: the parameters, by path.

  Raises:
    ConversionError: counts the unexpected tensors, the empty parameters, the shapes that don't fit
      and the tensors that are there in two spellings, and names the first ones.
  """
  mapping, problems = match(table, sources, targets)
  raise_problems(table, problems)
  return mapping


def describe(mapping: Mapping) -> list[tuple[str, tuple[int, ...], str, str]]:
  """(name, shape, dtype, destination) of every tensor, in the file's order."""
  return [
    (name, spec.shape, np.dtype(spec.dtype).name, _destination(mapping, name))
    for name, spec in mapping.sources.items()
  ]


def _destination(mapping: Mapping, name: str) -> str:
  """Where a tensor goes, in words."""
  if name in mapping.buffers:
    return "(buffer: dropped, made again on export)"
  places = []
  for block in mapping.by_source[name]:
    shape = mapping.targets[block.target].shape
    parts = [_index_text(extent, size) for extent, size in zip(block.target_box, shape)]
    is_whole = all(part == ":" for part in parts)
    places.append(block.target if is_whole else f"{block.target}[{', '.join(parts)}]")
  return ", ".join(places) or "(nowhere)"


def _index_text(extent: tuple[int, int], size: int) -> str:
  """A box's extent along an axis of this size, as an index is written in Python."""
  start, stop = extent
  if extent == (0, size):
    return ":"
  return str(start) if stop - start == 1 else f"{start}:{stop}"

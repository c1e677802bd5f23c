"""Moves values along a `Mapping`: parameters out of tensors (whole or by slices), and tensors out
of parameters.
"""

from collections.abc import Callable

import numpy as np

from dancegrpo_jax.conversion.mapping import Box, Mapping, Piece, Read, Slices
from dancegrpo_jax.errors import ConversionError


def _slices(box: Box) -> Slices:
  return tuple(slice(start, stop) for start, stop in box)


def _lengths(box: Box) -> list[int]:
  return [stop - start for start, stop in box]


def _bounds(index: Slices, shape: tuple[int, ...]) -> Box:
  """An index as (start, stop) pairs. ValueError: a step, or an index that is no slice."""
  if len(index) != len(shape) or any(
    not isinstance(s, slice) or s.step not in (None, 1) for s in index
  ):
    raise ValueError(f"expected one slice without a step for each axis of {shape}, not {index}")
  return tuple(s.indices(n)[:2] for s, n in zip(index, shape))


def read_slice(mapping: Mapping, path: str, index: Slices) -> list[Piece]:
  """Which slices of which tensors make `parameter[index]`; nothing outside it is read.

  Args:
    mapping: from `plan`.
    path: the parameter.
    index: one slice an axis, as a sharding gives it.
  """
  wanted, pieces = _bounds(index, mapping.targets[path].shape), []
  for block in mapping.by_target[path]:
    common = tuple((max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(block.target_box, wanted))
    if any(start >= stop for start, stop in common):
      continue
    box = list(block.source_box)
    for axis, (start, stop), whole in zip(block.axes, common, block.target_box):
      if axis is not None:
        first = box[axis][0] - whole[0]
        box[axis] = (start + first, stop + first)
    place = tuple((start - w[0], stop - w[0]) for (start, stop), w in zip(common, wanted))
    pieces.append(Piece(block.source, _slices(tuple(box)), block.axes, _slices(place)))
  return pieces


def import_slice(mapping: Mapping, path: str, index: Slices, read: Read, dtype=None) -> np.ndarray:
  """`parameter[index]`, C-contiguous, in `dtype` (None: the parameter's own).

  Raises:
    ConversionError: `read` handed back another shape than the plan was made for.
  """
  dtype = np.dtype(mapping.targets[path].dtype if dtype is None else dtype)
  shape = tuple(_lengths(_bounds(index, mapping.targets[path].shape)))
  pieces = read_slice(mapping, path, index)
  out = None
  for piece in pieces:
    value = read(piece.source, piece.read)
    if value.shape != tuple(s.stop - s.start for s in piece.read):
      raise ConversionError(
        f"tensor {piece.source}: read {value.shape}, expected {piece.read}; has the file changed?"
      )
    axes = [a for a in piece.axes if a is not None]
    rest = [a for a in range(value.ndim) if a not in axes]  # of length 1
    value = value.transpose(axes + rest).reshape([s.stop - s.start for s in piece.place])
    if value.shape == shape:  # all of it: no buffer to gather in
      return np.asarray(value, dtype, order="C")
    out = np.empty(shape, dtype) if out is None else out
    out[piece.place] = value
  return np.empty(shape, dtype) if out is None else out


def import_tree(mapping: Mapping, read: Read, dtype=None) -> dict[str, np.ndarray]:
  """All parameters, whole, by path."""
  whole = {path: (slice(None),) * len(spec.shape) for path, spec in mapping.targets.items()}
  return {path: import_slice(mapping, path, index, read, dtype) for path, index in whole.items()}


def export_tensor(
  mapping: Mapping, name: str, read: Callable[[str, Slices], np.ndarray]
) -> np.ndarray:
  """One tensor of the file, in the dtype that the plan has for it.

  Args:
    mapping: from `plan`.
    name: the tensor.
    read: (parameter path, slices) -> that part of the parameter.
  """
  spec = mapping.sources[name]
  if name in mapping.buffers:
    return _MAKE[mapping.buffers[name].make](spec)
  out = np.empty(spec.shape, spec.dtype)
  for block in mapping.by_source[name]:
    value = np.asarray(read(block.target, _slices(block.target_box)))
    axes = [a for a in block.axes if a is not None]
    lengths = _lengths(block.source_box)
    value = value.reshape([lengths[a] for a in axes]).transpose(np.argsort(axes))
    out[_slices(block.source_box)] = value.reshape(lengths)
  return out


def export_tree(mapping: Mapping, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """All tensors of the file, from parameters by path."""
  return {
    name: export_tensor(mapping, name, lambda path, index: params[path][index])
    for name in mapping.sources
  }


# How a buffer is made again. arange: position_ids, [1, n] of 0 .. n - 1.
_MAKE = {
  "arange": lambda spec: np.arange(np.prod(spec.shape), dtype=spec.dtype).reshape(spec.shape)
}

"""Moves values along a `Mapping`: parameters out of tensors, whole or by slices, and tensors out of
parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dancegrpo_jax.conversion.mapping import Box, Mapping
from dancegrpo_jax.conversion.table import Spec
from dancegrpo_jax.errors import ConversionError

Slices = tuple[slice, ...]
Read = Callable[[str, Slices], np.ndarray]  # (name, slices) -> that part of the tensor


class Piece(NamedTuple):
  """One read of an import: the slices `read` of the tensor `source`, with its axes arranged by
  `axes`, go to `place` of the result.
  """

  source: str
  read: Slices
  axes: tuple[int | None, ...]
  place: Slices


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


def _moved(box: Box, origin: Box) -> Box:
  """A box relative to the start of another one."""
  return tuple((start - first, stop - first) for (start, stop), (first, _) in zip(box, origin))


def read_slice(mapping: Mapping, path: str, index: Slices) -> list[Piece]:
  """Which slices of which tensors make `parameter[index]`.

  Args:
    mapping: from `plan`.
    path: the parameter.
    index: one slice for each axis, as a sharding gives it.

  Returns:
    The reads; nothing outside of `parameter[index]` is read.
  """
  requested, pieces = _bounds(index, mapping.targets[path].shape), []
  for block in mapping.by_target[path]:
    common = tuple((max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(block.target_box, requested))
    if any(start >= stop for start, stop in common):
      continue
    source_box = list(block.source_box)
    for axis, (start, stop) in zip(block.axes, _moved(common, block.target_box)):
      if axis is not None:
        first = source_box[axis][0]
        source_box[axis] = (first + start, first + stop)
    pieces.append(
      Piece(
        source=block.source,
        read=_slices(tuple(source_box)),
        axes=block.axes,
        place=_slices(_moved(common, requested)),
      )
    )
  return pieces


def import_slice(
  mapping: Mapping, path: str, index: Slices, read: Read, dtype: Any = None
) -> np.ndarray:
  """`parameter[index]`, C-contiguous.

  Args:
    mapping: from `plan`.
    path: the parameter.
    index: one slice for each axis.
    read: (tensor name, slices) -> that part of the tensor.
    dtype: of the result; None is the parameter's dtype.

  Raises:
    ConversionError: `read` returned another shape than the mapping was made for.
  """
  dtype = np.dtype(mapping.targets[path].dtype if dtype is None else dtype)
  shape = tuple(_lengths(_bounds(index, mapping.targets[path].shape)))
  pieces = read_slice(mapping, path, index)
  result = None
  for piece in pieces:
    value = read(piece.source, piece.read)
    if value.shape != tuple(s.stop - s.start for s in piece.read):
      raise ConversionError(
        f"tensor {piece.source}: read {value.shape}, expected {piece.read}; has the file changed?"
      )
    axes = [axis for axis in piece.axes if axis is not None]
    units = [axis for axis in range(value.ndim) if axis not in axes]  # of length 1
    value = value.transpose(axes + units).reshape([s.stop - s.start for s in piece.place])
    if value.shape == shape:  # the whole slice: no array to gather pieces in is needed
      return np.asarray(value, dtype, order="C")
    result = np.empty(shape, dtype) if result is None else result
    result[piece.place] = value
  return np.empty(shape, dtype) if result is None else result


def import_tree(mapping: Mapping, read: Read, dtype: Any = None) -> dict[str, np.ndarray]:
  """All parameters, whole, by path."""
  whole = {path: (slice(None),) * len(spec.shape) for path, spec in mapping.targets.items()}
  return {path: import_slice(mapping, path, index, read, dtype) for path, index in whole.items()}


def _arange(spec: Spec) -> np.ndarray:
  """position_ids: [1, n] of 0 .. n - 1."""
  return np.arange(np.prod(spec.shape), dtype=spec.dtype).reshape(spec.shape)


_MAKE = {"arange": _arange}  # how a `Buffer` is made again


def export_tensor(
  mapping: Mapping, name: str, read: Callable[[str, Slices], np.ndarray]
) -> np.ndarray:
  """One tensor of the file, in the dtype that the mapping has for it.

  Args:
    mapping: from `plan`.
    name: the tensor.
    read: (parameter path, slices) -> that part of the parameter.
  """
  spec = mapping.sources[name]
  if name in mapping.buffers:
    return _MAKE[mapping.buffers[name].make](spec)
  tensor = np.empty(spec.shape, spec.dtype)
  for block in mapping.by_source[name]:
    value = np.asarray(read(block.target, _slices(block.target_box)))
    axes = [axis for axis in block.axes if axis is not None]
    lengths = _lengths(block.source_box)
    value = value.reshape([lengths[axis] for axis in axes]).transpose(np.argsort(axes))
    tensor[_slices(block.source_box)] = value.reshape(lengths)
  return tensor


def export_tree(mapping: Mapping, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """All tensors of the file, from parameters by path."""
  return {
    name: export_tensor(mapping, name, lambda path, index: params[path][index])
    for name in mapping.sources
  }

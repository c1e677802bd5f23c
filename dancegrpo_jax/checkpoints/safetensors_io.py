"""Weight files in the safetensors format: read by slices from a folder, written tensor by tensor.

A file is an 8-byte length, a JSON header (name -> dtype, shape, data_offsets) and the data,
little-endian and C-contiguous (https://github.com/huggingface/safetensors). The library
`safetensors` maps a file into memory, and pages that were read count as memory of this process
until the map is closed. The reader therefore reopens a file after every `_REOPEN` bytes.
"""

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dancegrpo_jax.checkpoints.weight_files import HOW
from dancegrpo_jax.conversion.table import Spec
from dancegrpo_jax.conversion.transfer import Slices
from dancegrpo_jax.errors import ConversionError

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U64": np.dtype(np.uint64),
  "U32": np.dtype(np.uint32),
  "U16": np.dtype(np.uint16),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_REOPEN = 2**26  # bytes


class Reader:
  """The tensors of one or more files as one flat dictionary, read by slices.

  Attributes:
    specs: shape and dtype of every tensor, by name.
  """

  def __init__(self, files: list[Path]):
    self.files = files
    self.specs: dict[str, Spec] = {}
    self._where: dict[str, Path] = {}
    self._open: tuple[Path, Any] | None = None
    self._read_bytes = 0
    for file in files:
      for name, spec in header(file).items():
        if name in self.specs:
          raise ConversionError(f"{file}: tensor {name} is in {self._where[name].name} as well")
        self.specs[name], self._where[name] = spec, file

  def read(self, name: str, index: Slices) -> np.ndarray:
    """`tensor[index]`, a new array."""
    file = self._where[name]
    if self._open is None or self._open[0] != file or self._read_bytes > _REOPEN:
      self._open = None  # closes the previous map first
      self._open, self._read_bytes = (file, safe_open(file, "np")), 0
    value = self._open[1].get_slice(name)[index]
    self._read_bytes += value.nbytes
    return value

  def __enter__(self) -> "Reader":
    return self

  def __exit__(self, *_) -> None:
    self._open = None  # closes the map


def header(file: Path) -> dict[str, Spec]:
  """The shapes and dtypes of a file's tensors, by name and in the order of the names.

  Raises:
    ConversionError: the file is not there, truncated or no safetensors file, or it holds a dtype
      that is not supported.
  """
  try:
    with safe_open(file, "np") as opened:
      slices = {name: opened.get_slice(name) for name in sorted(opened.keys())}
      kinds = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
  except FileNotFoundError as error:
    raise ConversionError(f"{file}: no such file; {HOW}") from error
  except (SafetensorError, OSError) as error:
    size = file.stat().st_size
    raise ConversionError(
      f"{file}: truncated or not a safetensors file ({size} bytes; {error}); {HOW}"
    ) from error
  other = sorted({kind for _, kind in kinds.values()} - set(DTYPES))
  if other:
    raise ConversionError(
      f"{file}: holds tensors of dtype {', '.join(other)}, which are not supported"
    )
  return {name: Spec(shape, DTYPES[kind]) for name, (shape, kind) in kinds.items()}


def metadata(file: Path) -> dict[str, str]:
  """The metadata of a file's header; {} where there is none."""
  with safe_open(file, "np") as opened:
    return opened.metadata() or {}


def write(
  file: str | Path,
  specs: dict[str, Spec],
  value: Callable[[str], np.ndarray],
  header: dict[str, str] | None = None,
) -> None:
  """Writes a file tensor by tensor, so that only one of them is in memory at a time.

  The file appears under its name when it is complete.

  Args:
    file: where to write.
    specs: shape and dtype of every tensor, by name.
    value: makes the tensor of a name, which must have that shape and dtype.
    header: metadata beside {"format": "pt"}.

  Raises:
    ConversionError: a tensor has another shape or dtype.
  """
  file = Path(file)
  # The order of the reference writer: wide dtypes first, so that all are aligned, then by name.
  order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
  # transformers refuses files without this entry.
  table: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"} | (header or {})}
  offset = 0
  for name in order:
    shape, dtype = specs[name]
    end = offset + math.prod(shape) * dtype.itemsize
    table[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
    offset = end
  text = json.dumps(table, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "wb") as out:
      out.write(struct.pack("<Q", len(text)) + text)
      for name in order:
        tensor = value(name)
        if tensor.shape != specs[name].shape or tensor.dtype != specs[name].dtype:
          raise ConversionError(
            f"{file}: tensor {name} is {tensor.shape} {tensor.dtype}, announced was {specs[name]}"
          )
        tensor = np.asarray(tensor, order="C")
        # Arrays of other dtypes, as bfloat16, have no buffer that can be written without a copy.
        out.write(tensor.data if tensor.dtype.kind in "fiub" else tensor.tobytes())
      out.flush()
      os.fsync(out.fileno())
    os.replace(temporary, file)
  finally:
    temporary.unlink(missing_ok=True)

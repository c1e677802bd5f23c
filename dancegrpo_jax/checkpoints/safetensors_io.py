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

from dancegrpo_jax.conversion.table import Spec
from dancegrpo_jax.conversion.transfer import Slices
from dancegrpo_jax.errors import ConversionError
from dancegrpo_jax.pipelines.layout import STEMS

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
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
HOW = "get it with `hf download <hub id> --local-dir <folder>` and point the config at that folder"


def find_files(folder: str | Path, variant: str = "", stem: str = "") -> list[Path]:
  """The weight files of one network.

  These are accepted: a .safetensors file itself; a folder with `<stem>.safetensors`, or with
  `<stem>.safetensors.index.json` and its shards, each also as a variant
  (`<stem>.fp16.safetensors`); and a folder with a single .safetensors file. The stem is the
  network's own, diffusion_pytorch_model, model or open_clip_model.

  Args:
    folder: where to look.
    variant: "fp16" prefers the files of this variant; files in full precision come next, then those
      of any other variant.
    stem: `Table.file` of the network, "" where it isn't known.

  Raises:
    ConversionError: there are no weights, only pickled ones, or not all shards of the index.
  """
  folder = Path(folder)
  if folder.is_file() and folder.suffix == ".safetensors":
    return [folder]
  if not folder.is_dir():
    raise ConversionError(f"{folder}: no such folder of weights; {HOW}")
  names = {path.name for path in folder.iterdir()}
  marks = [f".{variant}"] if variant else []
  stems = (stem, *STEMS) if stem and stem not in STEMS else STEMS
  for mark in [*marks, "", ".fp16", ".bf16"]:
    for stem in stems:
      if f"{stem}{mark}.safetensors" in names:
        return [folder / f"{stem}{mark}.safetensors"]
      # diffusers writes the variant behind "index", transformers in front of "safetensors".
      for index in (f"{stem}.safetensors.index{mark}.json", f"{stem}{mark}.safetensors.index.json"):
        if index in names:
          return _shards(folder / index)
  alone = [name for name in sorted(names) if name.endswith(".safetensors")]
  if len(alone) == 1:
    return [folder / alone[0]]
  pickled = [name for name in sorted(names) if name.endswith(_PICKLED)]
  if pickled:
    raise ConversionError(
      f"{folder}: holds pickled weights only ({', '.join(pickled)}), not .safetensors; {HOW}"
    )
  expected = "expected " + " or ".join(f"{stem}.safetensors" for stem in stems)
  expected += f", or {stems[0]}.safetensors.index.json"
  raise ConversionError(
    f"{folder}: no weights; {expected}; found {', '.join(sorted(names)) or 'nothing'}; {HOW}"
  )


def _shards(index: Path) -> list[Path]:
  """The files that an index of shards names. ConversionError: some are missing."""
  try:
    files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ConversionError(
      f"{index}: not an index of safetensors shards ({error}); {HOW}"
    ) from error
  missing = [name for name in files if not (index.parent / name).is_file()]
  if missing:
    raise ConversionError(f"{index}: names shards that are not there: {', '.join(missing)}; {HOW}")
  return [index.parent / name for name in files]


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

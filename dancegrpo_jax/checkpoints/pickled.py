"""Pickled weight files (.pt, .pth, .bin), through torch's `weights_only` loader, which refuses
whatever is not tensors and plain containers. A pickle can run code where it is read otherwise, so
nothing here is reached unless the user allows it.
"""

import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

from dancegrpo_jax.conversion.mapping import Slices, Spec
from dancegrpo_jax.errors import ConversionError

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_NAMES = ("diffusion_pytorch_model.bin", "pytorch_model.bin", "open_clip_pytorch_model.bin")


def find(path: str | Path) -> Path | None:
  """The pickled file that a path names: itself, or in a folder the library's own name, or the only
  one. None: there is none.
  """
  path = Path(path)
  if path.is_file():
    return path if path.suffix in SUFFIXES else None
  files = sorted(file for file in path.glob("*") if file.suffix in SUFFIXES)
  named = [path / name for name in _NAMES if path / name in files]
  return named[0] if named else files[0] if len(files) == 1 else None


class Reader:
  """The tensors of a pickled state_dict, as `safetensors_io.Reader`; the one under the key
  "state_dict" where there is one.

  Attributes:
    specs: name -> shape and dtype, of every tensor.
  """

  def __init__(self, file: Path):
    """Raises ConversionError: torch is not installed, or the file is damaged, holds code, or is no
    state_dict.
    """
    self.file = file
    self._tensors = _tensors(file)
    self.specs = {
      name: Spec(tuple(x.shape), _dtype(file, name, x)) for name, x in sorted(self._tensors.items())
    }

  def read(self, name: str, index: Slices) -> np.ndarray:
    """`tensor[index]`, a new array."""
    import torch

    part = self._tensors[name][index].contiguous()
    if part.dtype == torch.bfloat16:  # which numpy lacks
      return part.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return part.numpy().copy()

  def __enter__(self) -> "Reader":
    return self

  def __exit__(self, *_) -> None:
    self._tensors = {}  # closes the map


def _tensors(file: Path) -> dict:
  try:
    import torch
  except ImportError as error:
    raise ConversionError(
      f"{file}: pickled weights are read by torch, which is not installed; `pip install torch`"
    ) from error
  try:
    # mapped where the format has an index: a tensor is then in memory when it is read, and not
    # before
    loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
  except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
    reason = " ".join(str(error).split())[:200]
    raise ConversionError(
      f"{file}: torch's weights_only loader refuses it ({type(error).__name__}: {reason})"
    ) from error
  state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
  if (
    not isinstance(state, dict)
    or not state
    or not all(isinstance(value, torch.Tensor) for value in state.values())
  ):
    raise ConversionError(
      f'{file}: expected a state_dict (names -> tensors), alone or under the key "state_dict"'
    )
  return state


def _dtype(file: Path, name: str, tensor) -> np.dtype:
  import torch

  if tensor.dtype == torch.bfloat16:
    return np.dtype(ml_dtypes.bfloat16)
  try:
    return tensor[:0].numpy().dtype if tensor.ndim else tensor.numpy().dtype
  except (TypeError, RuntimeError) as error:
    raise ConversionError(
      f"{file}: tensor {name} is of dtype {tensor.dtype}, which is not supported"
    ) from error

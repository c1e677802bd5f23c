"""Pickled weight files (.pt, .pth, .bin), read through torch's `weights_only` loader.

That loader refuses everything but tensors and plain containers. Any other way to read a pickle can
run code, so this module is used only where the user allows it. torch is an optional package, and is
imported where it is used.
"""

import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

from dancegrpo_jax.conversion.table import Spec
from dancegrpo_jax.conversion.transfer import Slices
from dancegrpo_jax.errors import ConversionError

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_NAMES = ("diffusion_pytorch_model.bin", "pytorch_model.bin", "open_clip_pytorch_model.bin")


def find(path: str | Path) -> Path | None:
  """The pickled file of a path: the path itself, or the file in a folder that has a name of
  diffusers, transformers or open_clip, or else the folder's only pickled file.

  Returns:
    None where there is no such file.
  """
  path = Path(path)
  if path.is_file():
    return path if path.suffix in SUFFIXES else None
  files = sorted(file for file in path.glob("*") if file.suffix in SUFFIXES)
  for name in _NAMES:
    if path / name in files:
      return path / name
  return files[0] if len(files) == 1 else None


class Reader:
  """The tensors of a pickled state_dict, with the methods of `safetensors_io.Reader`.

  The state_dict is the file's content, or what lies under the key "state_dict".

  Attributes:
    specs: shape and dtype of every tensor, by name.
  """

  def __init__(self, file: Path):
    """Opens a file.

    Raises:
      ConversionError: torch is not installed, or the file is damaged, holds code, or is no
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
    if part.dtype == torch.bfloat16:  # numpy lacks this dtype
      return part.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return part.numpy().copy()

  def __enter__(self) -> "Reader":
    return self

  def __exit__(self, *_) -> None:
    self._tensors = {}  # unmaps the file


def _tensors(file: Path) -> dict:
  """The tensors of a file, by name. ConversionError as `Reader`."""
  try:
    import torch
  except ImportError as error:
    raise ConversionError(
      f"{file}: pickled weights are read by torch, which is not installed; `pip install torch`"
    ) from error
  try:
    # torch can map files in its zip format only. A tensor of a mapped file takes no memory before
    # it is read.
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

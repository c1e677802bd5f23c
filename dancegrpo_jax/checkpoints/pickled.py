"""Pickled weight files (.pt, .pth, .bin), read through torch's `weights_only` loader.

That loader refuses everything but tensors and plain containers. Any other way to read a pickle can
run code, so this module is used only where the user allows it. torch is an optional package, and is
imported where it is used.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dancegrpo_jax.conversion.table import Spec
from dancegrpo_jax.conversion.transfer import Slices
from dancegrpo_jax.errors import ConversionError, listed

# Where trainers save the network's state_dict among other things.
_PLACES = (
  "state_dict",
  "model",
  "model_state_dict",
  "module",
  "net",
  "network",
  "params",
  "weights",
  "generator",
  "unet",
  "transformer",
)
# Where they save an average of the same weights.
_AVERAGES = ("ema", "ema_state_dict", "model_ema", "params_ema", "state_dict_ema", "ema_model")


class Reader:
  """The tensors of one or more pickled files, with the methods of `safetensors_io.Reader`.

  A state_dict is a file's content, or what lies under one of the keys under which trainers save it,
  as "state_dict".

  Attributes:
    specs: shape and dtype of every tensor, by name.
  """

  def __init__(self, files: list[Path]):
    """Opens files.

    Raises:
      ConversionError: one line: torch is not installed, or a file is damaged, holds code, is no
        state_dict, or holds several.
    """
    self._tensors: dict[str, Any] = {}
    self.specs: dict[str, Spec] = {}
    for file in files:
      for name, tensor in sorted(_tensors(file).items()):
        if name in self._tensors:
          raise ConversionError(f"{file}: tensor {name} is in another shard as well")
        self._tensors[name] = tensor
        self.specs[name] = Spec(tuple(tensor.shape), _dtype(file, name, tensor))

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


def _tensors(file: Path) -> dict[str, Any]:
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
      f"{file}: torch's weights_only loader refuses it ({type(error).__name__}: {reason}); it is"
      " truncated, or holds more than tensors: save its state_dict alone, best as .safetensors"
    ) from error
  tensors = _state_of(file, loaded)
  if not tensors:
    raise ConversionError(
      f'{file}: expected a state_dict (names -> tensors), alone or under a key as "state_dict"'
    )
  return tensors


def _state_of(file: Path, loaded: Any) -> dict[str, Any]:
  """The only state_dict in what a file holds; {} where there is none.

  Raises:
    ConversionError: there are several, as weights and their average.
  """
  import torch

  if not isinstance(loaded, dict):
    return {}
  tensors = {
    name: value
    for name, value in loaded.items()
    if isinstance(name, str) and isinstance(value, torch.Tensor)
  }
  inner = {
    key: found
    for key in (*_PLACES, *_AVERAGES)
    if isinstance(loaded.get(key), dict) and (found := _state_of(file, loaded[key]))
  }
  if len(inner) > 1 or (inner and len(tensors) > 1):
    raise ConversionError(
      f"{file}: holds several state_dicts ({listed(inner, 4)}"
      f"{', and tensors beside them' if tensors else ''}); save the one that is meant alone"
    )
  return next(iter(inner.values()), tensors)


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

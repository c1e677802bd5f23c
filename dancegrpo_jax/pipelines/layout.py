"""What a checkpoint on disk consists of, and how its location is written."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dancegrpo_jax import installation
from dancegrpo_jax.conversion.mapping import Table
from dancegrpo_jax.types import PyTree

RANDOM = "random:"  # before a folder: its networks get random weights
INDEX = "model_index.json"  # diffusers' list of a pipeline's parts
# Of weight files: diffusers, transformers, open_clip
STEMS = ("diffusion_pytorch_model", "model", "open_clip_model")


class Component(NamedTuple):
  """One network's weights, still to be loaded.

  Attributes:
    folder: inside the checkpoint; a reward's is the whole location.
    table: which tensors are which parameters.
    abstract: tree of shapes and dtypes.
  """

  folder: str
  table: Table
  abstract: PyTree


class Network(NamedTuple):
  """A network as PyTorch libraries publish it.

  Attributes:
    table: which tensors are which parameters.
    abstract: `(config.json) -> tree of shapes and dtypes`. ValueError, KeyError or TypeError where
      the file describes no network that is implemented.
  """

  table: Table
  abstract: Callable[[dict], PyTree]


class TokenizerKind(NamedTuple):
  """A kind of tokenizer.

  Attributes:
    files: that its folder must hold.
    load: `(folder) -> tokenizer`; a tokenizer is `(texts) -> int32 [n, tokens]`, or with a second
      argument for the number of tokens.
    optional: files that other programs read; they are fetched where they exist.
  """

  files: tuple[str, ...]
  load: Callable[[str], Callable[..., np.ndarray]]
  optional: tuple[str, ...] = ()


class Layout(NamedTuple):
  """The files of a checkpoint; paths are relative to its folder, "" is the folder itself.

  Attributes:
    files: JSON files, by the name that the builder of its networks knows them by.
    tokenizers: the kind of each tokenizer's folder: a name in `data.tokenizers.KINDS`, or a kind.
    networks: folders with weights.
    index_file: names the parts of a diffusers pipeline; export alone needs it. "" where the layout
      has none.
    stems: of the names of weight files that may be fetched.
  """

  files: dict[str, str]
  tokenizers: dict[str, str | TokenizerKind]
  networks: tuple[str, ...]
  index_file: str = ""
  stems: tuple[str, ...] = STEMS


def layout_of(files: dict[str, str], tokenizers: dict[str, str | TokenizerKind]) -> Layout:
  """The layout in which every folder with a config.json has weights."""
  networks = tuple(
    str(Path(file).parent) for file in files.values() if Path(file).name == "config.json"
  )
  return Layout(files=files, tokenizers=tokenizers, networks=networks)


def is_random(name: str) -> bool:
  """Whether a checkpoint's name asks for random weights."""
  return name.startswith(RANDOM)


def without_mark(name: str) -> str:
  """A checkpoint's name without the mark of random weights."""
  return name.removeprefix(RANDOM)


def local_path(name: str) -> Path:
  """The local path that a checkpoint's name means, as `installation.find` has it. It need not
  exist.
  """
  return installation.find(without_mark(name))


def location_of(name: str, folder: Path) -> str:
  """Where a checkpoint's weights are, from its name and its local folder: random weights stay
  marked as such.
  """
  return f"{RANDOM}{folder}" if is_random(name) else str(folder)

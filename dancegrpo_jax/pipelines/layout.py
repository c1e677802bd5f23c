"""The files of a checkpoint, and the notation of its location."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dancegrpo_jax import installation
from dancegrpo_jax.conversion.table import Table
from dancegrpo_jax.types import PyTree

RANDOM = "random:"  # a prefix of folders whose networks get random weights
INDEX = "model_index.json"  # diffusers' list of a pipeline's parts
# A file that newer libraries do not write: the file that has its content, and under which key.
# transformers 5 saves the parts of a processor in one file.
NEWER_FORMS = {"preprocessor_config.json": ("processor_config.json", "image_processor")}
PADDING = -1  # what follows a text's ids, where its tokenizer leaves it to others to mark its end
# The stems of the names of weight files in diffusers, transformers and open_clip.
STEMS = ("diffusion_pytorch_model", "model", "open_clip_model")


class Component(NamedTuple):
  """The weights of one network, before they are loaded.

  Attributes:
    folder: the folder inside the checkpoint; for a reward, the whole location.
    table: the parameters that the tensors of the files become.
    abstract: the tree of the parameters' shapes and dtypes.
    unread: patterns of tensors that belong to the published network and that nothing here computes
      with. They are not read, and copied with the network's folder.
  """

  folder: str
  table: Table
  abstract: PyTree
  unread: tuple[str, ...] = ()


class Network(NamedTuple):
  """A network as PyTorch libraries publish it.

  Attributes:
    table: the parameters that the tensors of the files become.
    abstract: `(config.json) -> tree of shapes and dtypes`. It raises ValueError, KeyError or
      TypeError where the file describes no network that is implemented.
    unread: as of a `Component`.
  """

  table: Table
  abstract: Callable[[dict], PyTree]
  unread: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A function from texts to ids that also knows how long texts are before it cuts them.

  Attributes:
    kind: for messages, as "CLIP".
    encode: `(texts) -> int32 [n, tokens]`, or with the number of tokens as a second argument.
    lengths: `(texts) -> tokens of each`, with the special ones, where nothing is cut or padded.
    ids: the number of ids, added tokens included.
    marks: the tokens that were added to the vocabulary, such as "<|eot_id|>". A text may contain
      them.
  """

  kind: str
  encode: Callable[..., np.ndarray]
  lengths: Callable[[list[str]], list[int]]
  ids: int
  marks: frozenset[str] = frozenset()

  def __call__(self, texts: list[str], *length: int) -> np.ndarray:
    """`encode`."""
    return self.encode(texts, *length)


class TokenizerKind(NamedTuple):
  """A kind of tokenizer.

  Attributes:
    files: the files that its folder must hold.
    load: `(folder) -> tokenizer`. A tokenizer is a `Tokenizer`, or any function
      `(texts) -> int32 [n, tokens]`; it may have the number of tokens as a second argument.
    optional: files for other programs, which are fetched where they exist.
    instead: the files of a newer form. A folder that holds all of them needs none of `files`.
  """

  files: tuple[str, ...]
  load: Callable[[str], Callable[..., np.ndarray]]
  optional: tuple[str, ...] = ()
  instead: tuple[str, ...] = ()

  def missing(self, folder: Path) -> list[str]:
    """The names of the files that a folder lacks; [] where either form is complete."""
    if self.instead and all((folder / name).is_file() for name in self.instead):
      return []
    absent = [name for name in self.files if not (folder / name).is_file()]
    older = [name for name in absent if name not in self.instead]
    newer = " + ".join(name for name in self.instead if name not in self.files)
    if older and newer:
      older[-1] += f" (or {newer})"
    return older + [name for name in absent if name in self.instead]


class Layout(NamedTuple):
  """The files of a checkpoint. Paths are relative to its folder; "" is the folder itself.

  Attributes:
    files: the JSON files, by the key under which the builder of its networks gets them.
    tokenizers: the kind of each tokenizer, by folder: a name in `data.tokenizers.KINDS`, or a
      `TokenizerKind`.
    networks: the folders with weights.
    index_file: the file in which diffusers reads a pipeline's parts, which only an export needs;
      "" where the layout has none.
    stems: the stems of the names of weight files that may be fetched.
    pipelines: the classes that `index_file` may name; () where that isn't checked.
  """

  files: dict[str, str]
  tokenizers: dict[str, str | TokenizerKind]
  networks: tuple[str, ...]
  index_file: str = ""
  stems: tuple[str, ...] = STEMS
  pipelines: tuple[str, ...] = ()


def layout_of(files: dict[str, str], tokenizers: dict[str, str | TokenizerKind]) -> Layout:
  """The layout in which every folder with a config.json has weights."""
  networks = tuple(
    str(Path(file).parent) for file in files.values() if Path(file).name == "config.json"
  )
  return Layout(files=files, tokenizers=tokenizers, networks=networks)


def forms_of(file: str) -> list[str]:
  """A JSON file of a layout, and the file that newer libraries write in its place, if there is one.

  Both are paths relative to the checkpoint's folder.
  """
  path = Path(file)
  newer = NEWER_FORMS.get(path.name)
  return [file] if newer is None else [file, str(path.parent / newer[0])]


def is_random(name: str) -> bool:
  """Whether the name of a checkpoint means random weights."""
  return name.startswith(RANDOM)


def without_mark(name: str) -> str:
  """The name of a checkpoint without the prefix of random weights."""
  return name.removeprefix(RANDOM)


def local_path(name: str) -> Path:
  """The local path that the name of a checkpoint means, see `installation.find`.

  It need not exist.
  """
  return installation.find(without_mark(name))


def location_of(name: str, folder: Path) -> str:
  """The location of a checkpoint's weights, which has the prefix of random weights if `name` has.

  Args:
    name: the name of the checkpoint.
    folder: its local folder.
  """
  return f"{RANDOM}{folder}" if is_random(name) else str(folder)

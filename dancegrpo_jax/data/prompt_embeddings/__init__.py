"""Prompt embeddings on disk: a TFDS data set in ArrayRecord format for each part of the prompts,
and a file that says which prompts and which encoder they belong to.

A part appears when it is complete, so that an interrupted run continues with the first one that is
missing. This module is light to import: TensorFlow Datasets is imported on first use.
"""

import contextlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PART = 128  # prompts in a part: half a gigabyte with 512 tokens of T5-XXL in bfloat16
FILE = "identity.json"
HOW = "name another folder, or delete this one to encode again"


class Leaf(NamedTuple):
  """The shape and dtype of one array of a prompt's embedding."""

  shape: tuple[int, ...]
  dtype: Any


class Identity(NamedTuple):
  """Which embeddings a folder holds. The digests are compared; the other fields are for messages.

  Attributes:
    prompts: digest of the texts, in order.
    encoder: digest of the networks' configs and weights.
    tokens: digest of the texts' tokens, and so of the tokenizer and its length.
    count: number of texts.
    checkpoint: the model's name.
  """

  prompts: str
  encoder: str
  tokens: str
  count: int  # type: ignore[assignment]  # It hides tuple.count; files contain the name.
  checkpoint: str


def claim(folder: Path, identity: Identity, write: bool) -> None:
  """Checks that a folder belongs to an identity.

  Args:
    folder: of the embeddings; need not exist.
    identity: of the embeddings that it should hold.
    write: whether to mark a folder that is empty or missing as the identity's.

  Raises:
    ValueError: the folder belongs to other prompts or another encoder, or holds something else; one
      line that ends with the remedy.
  """
  file = folder / FILE
  if file.is_file():
    _check_identity(file, identity)
    return
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f"is not empty and has no {FILE}, so it is no cache of embeddings; {HOW}")
  if write:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(identity._asdict(), indent=1) + "\n")
    os.replace(temporary, file)


def _check_identity(file: Path, identity: Identity) -> None:
  """Raises ValueError where a file doesn't contain this identity."""
  try:
    stored = Identity(**json.loads(file.read_text()))
  except (ValueError, TypeError) as error:
    raise ValueError(f"{FILE} can't be read; {HOW}") from error
  for field, what in (
    ("prompts", "other prompts"),
    ("encoder", "another text encoder"),
    ("tokens", "another tokenizer"),
  ):
    theirs, ours = (
      f"{one.count} texts of {one.checkpoint!r}, digest {getattr(one, field)}"
      for one in (stored, identity)
    )
    if getattr(stored, field) != getattr(identity, field):
      raise ValueError(f"belongs to {what} ({theirs}; this run has {ours}); {HOW}")


def _place(folder: Path, part: int) -> Path:
  return folder / f"part_{part:05d}"


def _builder(
  folder: Path, leaves: dict[str, Leaf], part: int, texts: list[str], encode: Callable | None = None
):
  import tensorflow_datasets as tfds

  from dancegrpo_jax.data.prompt_embeddings.builder import PromptEmbeddings

  tfds.disable_progress_bar()  # It would be a part's; the caller prints the progress of them all.
  return PromptEmbeddings(
    data_dir=str(_place(folder, part)), leaves=leaves, texts=texts, encode=encode
  )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences TFDS, which prints lines about downloads and warns of parts that aren't there yet."""
  logging.disable(logging.WARNING)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.disable(logging.NOTSET)


def parts(texts: list[str]) -> list[list[str]]:
  """The texts, divided into parts."""
  return [texts[i : i + PART] for i in range(0, len(texts), PART)]


def missing(folder: Path, leaves: dict[str, Leaf], texts: list[str]) -> list[int]:
  """The numbers of the parts that are not there yet."""
  with _quiet():
    return [
      i
      for i, part in enumerate(parts(texts))
      if not _builder(folder, leaves, i, part).is_prepared()
    ]


def write(
  folder: Path, leaves: dict[str, Leaf], part: int, texts: list[str], arrays: dict[str, np.ndarray]
) -> None:
  """Writes a part.

  Args:
    folder: of the embeddings.
    leaves: shapes and dtypes of a prompt's arrays, by name.
    part: its number.
    texts: of the part.
    arrays: of the texts, `[n, ...]` by name.
  """
  shutil.rmtree(_place(folder, part), ignore_errors=True)  # a killed run may have left files
  with _quiet():
    _builder(folder, leaves, part, texts, lambda _: arrays).download_and_prepare()


def _open(builder: Any, texts: list[str]):
  """A part, for random access. ValueError: its last text is not the last one of `texts`."""
  try:
    source = builder.as_data_source("train")
    reason = "" if source[len(texts) - 1]["prompt"].decode() == texts[-1] else "other texts"
  except Exception as error:  # TFDS raises a dozen types, with messages of many lines
    reason = str(error).strip().split("\n")[0][:200]
  if reason:
    raise ValueError(
      f"{builder.data_dir} is damaged ({reason}); delete it to encode that part again"
    )
  return source


class Table:
  """The embeddings of all texts, read from disk row by row."""

  def __init__(self, folder: Path, leaves: dict[str, Leaf], texts: list[str]):
    """Opens the parts of a folder. ValueError: one is damaged."""
    self._leaves = leaves
    self._places = {}  # (part, row) by text
    self._parts = []
    for number, part in enumerate(parts(texts)):
      self._places.update({text: (number, row) for row, text in enumerate(part)})
      self._parts.append(_open(_builder(folder, leaves, number, part), part))

  def rows(self, texts: list[str]) -> dict[str, np.ndarray]:
    """The arrays `[n, ...]` of these texts, by name. KeyError: a text isn't in the table."""
    places = [self._places[text] for text in texts]
    read = {(part, row): self._parts[part][row] for part, row in dict.fromkeys(places)}

    def array(name: str, leaf: Leaf) -> np.ndarray:
      return np.stack([read[place][name].view(leaf.dtype).reshape(leaf.shape) for place in places])

    return {name: array(name, leaf) for name, leaf in self._leaves.items()}

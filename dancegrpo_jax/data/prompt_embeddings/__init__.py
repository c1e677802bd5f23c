"""Prompt embeddings on disk: TFDS data sets in ArrayRecord format, one for each part of the
prompts, and whose they are.

A part appears when it is whole, so that an interrupted run goes on with the first one that is
missing. Light to import; TensorFlow Datasets is imported on first use.
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

PART = 128  # prompts; with T5-XXL's 512 tokens in bfloat16 half a gigabyte
FILE = "identity.json"
HOW = "name another folder, or delete this one to encode again"


class Leaf(NamedTuple):
  """An array of one prompt's embedding."""

  shape: tuple[int, ...]
  dtype: Any


class Identity(NamedTuple):
  """Whose embeddings a folder holds. The digests are compared, the rest is for messages.

  Attributes:
    prompts: digest of the texts, in order.
    encoder: digest of the networks' configs and weights.
    tokens: digest of the texts' tokens, so of the tokenizer and its length.
    count: texts.
    checkpoint: the model's name.
  """

  prompts: str
  encoder: str
  tokens: str
  count: int  # type: ignore[assignment]  # hides tuple.count; the name is in files
  checkpoint: str


def claim(folder: Path, identity: Identity, write: bool) -> None:
  """Checks that a folder is this identity's, and marks an empty one as such where `write`.

  Raises:
    ValueError: it belongs to other prompts or another encoder, or holds something else; one line
      that ends with the remedy.
  """
  file = folder / FILE
  if file.is_file():
    try:
      found = Identity(**json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
      raise ValueError(f"{FILE} can't be read; {HOW}") from error
    for field, what in (
      ("prompts", "other prompts"),
      ("encoder", "another text encoder"),
      ("tokens", "another tokenizer"),
    ):
      both = [
        f"{who.count} texts of {who.checkpoint!r}, digest {getattr(who, field)}"
        for who in (found, identity)
      ]
      if getattr(found, field) != getattr(identity, field):
        raise ValueError(f"belongs to {what} ({both[0]}; this run has {both[1]}); {HOW}")
    return
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f"is not empty and has no {FILE}, so it is no cache of embeddings; {HOW}")
  if write:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(identity._asdict(), indent=1) + "\n")
    os.replace(temporary, file)


def _place(folder: Path, part: int) -> Path:
  return folder / f"part_{part:05d}"


def _builder(
  folder: Path, leaves: dict[str, Leaf], part: int, texts: list[str], encode: Callable | None = None
):
  import tensorflow_datasets as tfds

  from dancegrpo_jax.data.prompt_embeddings.builder import PromptEmbeddings

  tfds.disable_progress_bar()  # of a part; the caller says how far it is
  return PromptEmbeddings(
    data_dir=str(_place(folder, part)), leaves=leaves, texts=texts, encode=encode
  )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """TFDS speaks of downloads, and warns of each part that isn't there yet."""
  logging.disable(logging.WARNING)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.disable(logging.NOTSET)


def parts(texts: list[str]) -> list[list[str]]:
  """The texts of every part."""
  return [texts[i : i + PART] for i in range(0, len(texts), PART)]


def missing(folder: Path, leaves: dict[str, Leaf], texts: list[str]) -> list[int]:
  """The parts that are not there yet."""
  with _quiet():
    return [
      i
      for i, part in enumerate(parts(texts))
      if not _builder(folder, leaves, i, part).is_prepared()
    ]


def write(
  folder: Path, leaves: dict[str, Leaf], part: int, texts: list[str], arrays: dict[str, np.ndarray]
) -> None:
  """Writes a part: its texts, and their arrays `[n, ...]` by name."""
  shutil.rmtree(_place(folder, part), ignore_errors=True)  # what a killed run left of it
  with _quiet():
    _builder(folder, leaves, part, texts, lambda _: arrays).download_and_prepare()


def _open(builder: Any, texts: list[str]):
  """A part for random access. ValueError where it doesn't end with the last of its texts."""
  try:
    source = builder.as_data_source("train")
    reason = "" if source[len(texts) - 1]["prompt"].decode() == texts[-1] else "other texts"
  except Exception as error:  # TFDS has a dozen kinds, of many lines each
    reason = str(error).strip().split("\n")[0][:200]
  if reason:
    raise ValueError(
      f"{builder.data_dir} is damaged ({reason}); delete it to encode that part again"
    )
  return source


class Table:
  """The embeddings of all texts, read from disk row by row."""

  def __init__(self, folder: Path, leaves: dict[str, Leaf], texts: list[str]):
    """ValueError: a part is damaged."""
    self._leaves = leaves
    self._where = {
      text: (i, row) for i, part in enumerate(parts(texts)) for row, text in enumerate(part)
    }
    self._parts = [
      _open(_builder(folder, leaves, i, part), part) for i, part in enumerate(parts(texts))
    ]

  def rows(self, texts: list[str]) -> dict[str, np.ndarray]:
    """Arrays `[n, ...]` by name. KeyError for a text that isn't in the table."""
    places = [self._where[text] for text in texts]
    read = {(part, row): self._parts[part][row] for part, row in dict.fromkeys(places)}

    def array(name: str, leaf: Leaf) -> np.ndarray:
      return np.stack([read[place][name].view(leaf.dtype).reshape(leaf.shape) for place in places])

    return {name: array(name, leaf) for name, leaf in self._leaves.items()}

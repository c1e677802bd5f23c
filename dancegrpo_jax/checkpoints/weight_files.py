"""Which files of a folder hold a network's weights: whole or in shards, in safetensors or pickled,
in full precision or as a variant such as "fp16".
"""

import json
from collections.abc import Iterator
from pathlib import Path

from dancegrpo_jax.errors import ConversionError, listed
from dancegrpo_jax.pipelines.layout import STEMS

SAFETENSORS = ".safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
HOW = "get it with `hf download <hub id> --local-dir <folder>` and point the config at that folder"
# The stems of the names of pickled files in diffusers, transformers and open_clip.
_PICKLED_STEMS = ("diffusion_pytorch_model", "pytorch_model", "open_clip_pytorch_model")


def is_pickled(file: Path) -> bool:
  """Whether a weight file is a pickle, by its extension."""
  return file.suffix in PICKLED


def indices(stem: str, mark: str = "", suffix: str = SAFETENSORS) -> list[str]:
  """The names that the index of a network's shards may have.

  Args:
    stem: of the weight files.
    mark: of a variant, as ".fp16"; "" for none.
    suffix: of the weight files.
  """
  names = [
    f"{stem}{suffix}.index{mark}.json",  # diffusers
    f"{stem}{mark}{suffix}.index.json",  # transformers
    f"{stem}{suffix}{mark}.index.json",  # diffusers, for a time in 2024
  ]
  return list(dict.fromkeys(names))


def find(path: str | Path, variant: str = "", stem: str = "") -> list[Path]:
  """The weight files of one network.

  These are accepted: a weight file itself; a folder with `<stem>.safetensors`, or with an index of
  shards and all of them, each also as a variant (`<stem>.fp16.safetensors`); a folder with a single
  .safetensors file; and the same with pickled files. The stem is the network's own,
  diffusion_pytorch_model, model or open_clip_model.

  Args:
    path: where to look.
    variant: "fp16" prefers the files of this variant; files in full precision come next, then those
      of any other variant.
    stem: `Table.file` of the network, "" where it isn't known.

  Raises:
    ConversionError: one line: there are no weights, not all shards of an index, or several files of
      which none has a known name.
  """
  path = Path(path)
  if path.is_file():
    if path.suffix != SAFETENSORS and not is_pickled(path):
      raise ConversionError(
        f"{path}: not a weight file that is read; those end with {SAFETENSORS} or, pickled, with"
        f" {' or '.join(PICKLED)}"
      )
    return [path]
  if not path.is_dir():
    raise ConversionError(f"{path}: no such folder of weights; {HOW}")
  names = {entry.name for entry in path.iterdir() if entry.is_file()}
  stems = (stem, *STEMS) if stem and stem not in STEMS else STEMS
  pickled_stems = dict.fromkeys((*_PICKLED_STEMS, *stems))
  for name in (*_names(stems, variant, SAFETENSORS), *_alone(names, (SAFETENSORS,))):
    if name in names:
      return _shards(path / name) if name.endswith(".json") else [path / name]
  for name in (*_names(tuple(pickled_stems), variant, ".bin"), *_alone(names, PICKLED)):
    if name in names:
      return _shards(path / name) if name.endswith(".json") else [path / name]
  raise ConversionError(f"{path}: {_absence(path, names, stems)}; {HOW}")


def _names(stems: tuple[str, ...], variant: str, suffix: str) -> Iterator[str]:
  """The names of weight files and of indices of shards, the preferred ones first."""
  marks = [f".{variant}"] if variant else []
  for mark in [*marks, "", ".fp16", ".bf16"]:
    for stem in stems:
      yield f"{stem}{mark}{suffix}"
      yield from indices(stem, mark, suffix)


def _alone(names: set[str], suffixes: tuple[str, ...]) -> list[str]:
  """The only file with one of these extensions; [] where there is none, or where there are more."""
  found = [name for name in names if name.endswith(suffixes)]
  return found if len(found) == 1 else []


def _absence(path: Path, names: set[str], stems: tuple[str, ...]) -> str:
  """What a folder holds in place of weights that can be told apart."""
  several = sorted(name for name in names if name.endswith((SAFETENSORS, *PICKLED)))
  if any("-of-" in name for name in several):
    return f"shards without their index {stems[0]}{SAFETENSORS}.index.json ({listed(several)})"
  if several:
    return (
      f"{len(several)} weight files of which none is named {stems[0]}{SAFETENSORS}"
      f" ({listed(several)}); keep the one that is meant in a folder of its own"
    )
  expected = " or ".join(f"{stem}{SAFETENSORS}" for stem in stems)
  found = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in path.iterdir())
  return f"no weights; expected {expected}, or {indices(stems[0])[0]}; found {listed(found, 6)}"


def _shards(index: Path) -> list[Path]:
  """The files that an index of shards names. ConversionError: one line: some are missing."""
  try:
    files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    paths = [index.parent / name for name in files]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ConversionError(f"{index}: not an index of shards ({error}); {HOW}") from error
  if not paths:
    raise ConversionError(f"{index}: names no shards; {HOW}")
  missing = [name for name, path in zip(files, paths) if not path.is_file()]
  if missing:
    raise ConversionError(f"{index}: names shards that are not there: {listed(missing)}; {HOW}")
  return paths

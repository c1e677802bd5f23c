"""What a run will write, and whether there is room for it."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ml_collections import ConfigDict

from dancegrpo_jax import buckets
from dancegrpo_jax.dry_run.findings import NOTE, OK, PROBLEM, Finding

Free = Callable[[Path], float]  # folder -> bytes that are free in its file system


def free_bytes(folder: Path) -> float:
  """Bytes that are free where a folder is, or would be made."""
  place = next(path for path in (folder, *folder.parents) if path.exists())
  return float(shutil.disk_usage(place).free)


def rows(
  config: ConfigDict, workdir: Path, state: int, sample: int, download: int, free: Free
) -> Iterator[Finding]:
  """Rows about the workdir and the cache of the hub.

  Args:
    config: validated.
    workdir: of the run.
    state: bytes of a checkpoint.
    sample: bytes of the pixels of one sample, a byte for each value.
    download: bytes that are to be fetched.
    free: tells what is free.
  """
  kept = config.checkpoint.keep + 1  # a new one is written before the oldest is removed
  every = config.evaluation.every
  shown = config.iterations // every + 1 if every else 2
  pictures = shown * config.evaluation.prompts * sample
  parts = f"{kept} checkpoints of {_size(state)}, pictures {_size(pictures)} at most"
  yield from _room("disk", f"{workdir}: {parts}", workdir, kept * state + pictures, free)
  if download:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    yield from _room("disk", f"{folder}: to be fetched {_size(download)}", folder, download, free)


def _room(check: str, text: str, folder: Path, need: float | int, free: Free) -> Iterator[Finding]:
  if buckets.is_url(url := buckets.behind(folder)):
    yield Finding(check, NOTE, f"{text}, for {url}; what is free in a bucket isn't known")
    return
  there = free(folder)
  text = f"{text}; {_size(there)} free"
  if need <= there:
    yield Finding(check, OK, text)
  else:
    short = f"{_size(need - there)} too few"
    remedy = "free some, name another --workdir, or lower config.checkpoint.keep"
    yield Finding(check, PROBLEM, f"{text}, {short}; {remedy}")


def _size(number: float | int) -> str:
  """Bytes as text, as "1.23 GB"."""
  for unit, scale in (("GB", 1e9), ("MB", 1e6)):
    if number >= scale:
      return f"{number / scale:.2f} {unit}"
  return f"{number / 1e3:.0f} kB"

"""The workdir of a run in a bucket.

The run writes its files into a local folder, from which a thread copies to the bucket what has
changed, because an object can't be appended to. Checkpoints are written into the bucket by Orbax
and are never here, see `store.folder_of`. A run that goes on fetches the files first, so that it
may do so on another machine. When a copy fails, the files stay in the local folder.
"""

import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dancegrpo_jax import buckets
from dancegrpo_jax.devices import processes, workdir_lock
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.report.progress import Progress, phase

EVERY = 5.0  # seconds between two looks for changed files
ATTEMPTS = 5  # at the end of a run
PAUSE = 1.0  # seconds after the first of them, and twice as many after each further one
_SENT = ".sent.json"  # of the local folder: what the bucket has of each file
_NOT_COPIED = ("checkpoints/", workdir_lock.FILE)


class Sent(NamedTuple):
  """A file as it was when it was copied, in either direction.

  Attributes:
    time: of its last change, in nanoseconds.
    size: in bytes.
    version: of the object.
  """

  time: int
  size: int
  version: str


@contextlib.contextmanager
def opened(name: str) -> Iterator[Path]:
  """The local folder of a workdir: the folder itself, or that of a bucket's URL.

  Args:
    name: a folder, or gs://BUCKET/NAME.

  Raises:
    ConfigError: the bucket can't be read; or, at the end, files of the run are in the local folder
      alone.
  """
  if not buckets.is_url(name):
    yield Path(name)
    return
  folder = buckets.cache("workdirs", name)
  buckets.mark(folder, name)
  if not processes.is_first():
    yield folder
    return
  with Progress(), phase(f"reading the files of {name}"):
    fetch(name, folder)
  stop = threading.Event()
  thread = threading.Thread(target=_copy_on, args=(name, folder, stop), name="bucket", daemon=True)
  thread.start()
  failed_run = False
  try:
    yield folder
  except BaseException:
    failed_run = True
    raise
  finally:
    stop.set()
    thread.join()
    with Progress(), phase(f"copying the last files to {name}"):
      left = _finish(name, folder)
    if left and failed_run:  # the run's own error is what is raised
      print(f"error: {left}", file=sys.stderr, flush=True)
    elif left:
      raise ConfigError(left)


@contextlib.contextmanager
def looked_at(name: str) -> Iterator[Path]:
  """As `opened`, for a command that neither reads nor writes the files of the workdir itself, but
  only its checkpoints. A run may be going on there.
  """
  if not buckets.is_url(name):
    yield Path(name)
    return
  with tempfile.TemporaryDirectory() as folder:
    buckets.mark(Path(folder), name)
    yield Path(folder)


def fetch(url: str, folder: Path) -> None:
  """Copies the objects of a workdir into its local folder, where they are newer.

  A file that has changed here since it was copied, as after a run that could not reach the bucket,
  stays as it is. Where its object has changed too, the object counts, and the file is renamed.

  Raises:
    BucketError: the bucket can't be read.
  """
  sent = _read_sent(folder)
  for name, found in buckets.listing(url).items():
    if not name or name.startswith(_NOT_COPIED):
      continue
    file, before = folder / name, sent.get(name)
    if before and before.version == found.version and file.is_file():
      continue
    if file.is_file() and (before is None or _now(file, "")[:2] != before[:2]):
      kept = file.replace(file.with_name(f".{file.name}.of-this-machine"))
      print(f"note: another machine has gone on with {url}; this one's file is kept as {kept}")
    buckets.fetch(f"{url.rstrip('/')}/{name}", file)
    sent[name] = _now(file, found.version)
  _write_sent(folder, sent)


def send(url: str, folder: Path) -> dict[str, str]:
  """Copies what has changed into the bucket.

  Returns:
    What could not be copied: the reason by the name of the file.
  """
  sent, failed = _read_sent(folder), {}
  for file in sorted(path for path in folder.rglob("*") if path.is_file()):
    name = file.relative_to(folder).as_posix()
    if name.startswith(_NOT_COPIED) or any(part.startswith(".") for part in Path(name).parts):
      continue
    try:
      now, before = _now(file, ""), sent.get(name)
      if before and (before.time, before.size) == (now.time, now.size):
        continue
      found = buckets.send(f"{url.rstrip('/')}/{name}", file)
      sent[name] = now._replace(version=found.version)
    except FileNotFoundError:
      continue  # it was renamed in this moment
    except OSError as error:
      failed[name] = str(error)
  _write_sent(folder, sent)
  return failed


def _copy_on(url: str, folder: Path, stop: threading.Event) -> None:
  """Copies again and again, until `stop`. The first failure is said."""
  was_said = False
  while not stop.wait(EVERY):
    failed = send(url, folder)
    if failed and not was_said:
      was_said = True
      print(
        f"note: {len(failed)} files could not be copied into the bucket, and will be tried again:"
        f" {next(iter(failed.values()))}",
        flush=True,
      )


def _finish(url: str, folder: Path) -> str:
  """Copies what is left. Returns a line about what could not be copied, "" where all is there."""
  failed: dict[str, str] = {}
  for attempt in range(ATTEMPTS):
    failed = send(url, folder)
    if not failed:
      return ""
    if attempt < ATTEMPTS - 1:
      time.sleep(PAUSE * 2**attempt)
  return (
    f"--workdir={url}: {len(failed)} files of the run are not in the bucket, but in {folder}"
    f" ({next(iter(failed.values()))}); when the bucket can be written again, the same command on"
    " this machine copies them"
  )


def _now(file: Path, version: str) -> Sent:
  stat = file.stat()
  return Sent(stat.st_mtime_ns, stat.st_size, version)


def _read_sent(folder: Path) -> dict[str, Sent]:
  with contextlib.suppress(OSError, ValueError):
    return {name: Sent(*row) for name, row in json.loads((folder / _SENT).read_text()).items()}
  return {}


def _write_sent(folder: Path, sent: dict[str, Sent]) -> None:
  partial = folder / f"{_SENT}.partial"
  partial.write_text(json.dumps(sent))
  partial.replace(folder / _SENT)

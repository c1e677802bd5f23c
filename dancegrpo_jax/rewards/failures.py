"""Errors of rewards, as lines that name the user's own file and line, and as tracebacks in a
file.
"""

import os
import sysconfig
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

FILE = "reward_errors.txt"  # of tracebacks, in a workdir
_PACKAGE = f"{Path(__file__).parent.parent}{os.sep}"
_LIBRARIES = tuple(
  f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "purelib", "platlib")
)
_LONGEST = 300  # characters of an error's own message


class NotReadyError(RuntimeError):
  """A reward that can't be asked now and perhaps can be later, as one whose server is not up.

  Before a run it is a notice and not a mistake. In a run the samples that are left of the call are
  not asked for.
  """


class Failure(NamedTuple):
  """Samples of one call that a reward could not score.

  Attributes:
    error: what it raised.
    samples: how many they are.
  """

  error: BaseException
  samples: int


def place(error: BaseException) -> str:
  """The last line of the user's own files that an error came through, as "my_module.py:12".

  Files of Python and of libraries are passed over where there are others. "" if the error comes
  from this package alone.
  """
  frames = [
    (frame.filename, frame.lineno)
    for frame in traceback.extract_tb(error.__traceback__)
    if not frame.filename.startswith((_PACKAGE, "<"))
  ]
  own = [frame for frame in frames if not frame[0].startswith(_LIBRARIES)]
  if not own:
    # In a library that a reward of this package called, there is nothing of the user's.
    return ""
  file, line = own[-1]
  path = Path(file)
  return f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}:{line}"


def described(error: BaseException) -> str:
  """An error in one line: its type, its message, and its `place`."""
  message = " ".join(str(error).split())
  if len(message) > _LONGEST:
    message = f"{message[:_LONGEST]}..."
  text = f"{type(error).__name__}: {message}" if message else type(error).__name__
  where = place(error)
  return f"{text} ({where})" if where else text


def report(name: str, failures: Sequence[Failure], file: Path | None) -> list[str]:
  """Lines about the failures of one call, one for each different error.

  Args:
    name: of the reward.
    failures: of the call.
    file: the traceback of each different error is appended to it; None for no file.
  """
  first: dict[str, BaseException] = {}
  counts: dict[str, int] = {}
  for error, samples in failures:
    text = described(error)
    first.setdefault(text, error)
    counts[text] = counts.get(text, 0) + samples
  lines = []
  for text, error in first.items():
    line = f"reward {name} failed for {counts[text]} samples: {text}"
    if file is not None and append(file, line, error):
      line = f"{line}; traceback: {file}"
    lines.append(line)
  return lines


def append(file: Path, title: str, error: BaseException) -> bool:
  """Appends a traceback to a file, and makes the file's folder.

  Args:
    file: which threads and processes share.
    title: the line above the traceback.
    error: whose traceback it is.

  Returns:
    Whether it could be written; a full disk must not end the run.
  """
  text = "".join(traceback.format_exception(error))
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as opened:
      opened.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n{text}\n")
  except OSError:
    return False
  return True

"""What a command is doing, and for how long, while it does it.

Any function of any thread says what it is about to do:

    with progress.phase("reading the weights"):
      ...

That shows nothing by itself, so that a library is silent. A command opens a `Progress`, which shows
the phases of all threads: on a terminal in a line that is rewritten, elsewhere in a few lines, so
that a log is neither empty nor full.
"""

import contextlib
import functools
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from dancegrpo_jax.devices import interrupts
from dancegrpo_jax.report.metrics import Row, duration

LOG_EVERY = 30.0  # seconds between two lines of a log about the same phase
_SILENCE = 1.0  # seconds without a line after which a log names a phase for the first time
_BAR = 24  # columns
_SHOW_CURSOR = "\x1b[?25h"  # which rich hides


class Phase:
  """What a thread is doing.

  Args:
    text: may be changed while it lasts.
    begin: of `time.monotonic`; now where it is None.
  """

  def __init__(self, text: str, begin: float | None = None):
    self.name = self.text = text
    self.begin = time.monotonic() if begin is None else begin
    self.is_main = threading.current_thread() is threading.main_thread()


_phases: list[Phase] = []  # of all threads, those that were begun last at the end
_lock = threading.Lock()


@contextlib.contextmanager
def phase(text: str, begin: float | None = None) -> Iterator[Phase]:
  """Inside, `text` is what this thread is doing. Arguments as for `Phase`."""
  now = Phase(text, begin)
  with _lock:
    _phases.append(now)
  try:
    yield now
  finally:
    with _lock:
      _phases.remove(now)


def steps(text: str, items: Any) -> Iterator[Any]:
  """The items of a sequence or an array, with a phase that counts them, as "sampling, 3 of 40"."""
  with phase(text) as now:
    for number, item in enumerate(items, 1):
      now.text = f"{text}, {number} of {len(items)}"
      yield item


def current() -> list[Phase]:
  """The phases to show: that of another thread, which waits for the devices, where there is one,
  and otherwise those of the main thread, the outer ones first.
  """
  with _lock:
    others = [each for each in _phases if not each.is_main]
    return others[-1:] or list(_phases)


class Progress:
  """Shows the phases, messages, and the iterations of a run. Processes other than 0 show warnings
  alone.

  Args:
    total: iterations of the whole run; 0 in a command that has none.
    first_iteration: the iteration with which this process starts.
    stream: a text stream; sys.stdout by default.
    every: seconds between two lines of a log about the same phase.
  """

  def __init__(
    self,
    total: int = 0,
    first_iteration: int = 0,
    stream: Any = None,
    every: float = LOG_EVERY,
  ):
    self._total, self._done, self._stream = total, first_iteration, stream or sys.stdout
    # Ends of the last iterations. The duration of the first one, which compiles, is not measured.
    self._times = deque(maxlen=21)
    self._status, self._every = "", every
    self._is_quiet, self._live = jax.process_index() != 0, None
    self._named: set[str] = set()  # phases that the log has named
    self._last, self._closed = time.monotonic(), threading.Event()
    self._close = contextlib.ExitStack()
    if self._is_quiet:
      return
    if self._stream.isatty():
      console = Console(file=self._stream)
      self._live = Live(
        console=console, get_renderable=self._line, refresh_per_second=4, transient=not total
      )
      self._close.enter_context(self._live)
      # rich hides the cursor, which a process that is ended has to show again.
      show = functools.partial(print, _SHOW_CURSOR, file=self._stream, flush=True)
      self._close.enter_context(interrupts.undone(show))
    else:
      log = threading.Thread(target=self._write_log, name="progress", daemon=True)
      log.start()
      self._close.callback(log.join)
      self._close.callback(self._closed.set)

  def update(self, iteration: int, values: Row) -> None:
    """Shows an iteration that is done.

    Args:
      iteration: counted from 0.
      values: its metrics, of which `reward/mean` and `samples_per_second` are shown.
    """
    self._times.append(time.monotonic())
    left = ""
    if len(self._times) > 1:
      seconds = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
      left = f"  {duration(seconds * (self._total - iteration - 1))} left"
    reward, speed = values.get("reward/mean", math.nan), values.get("samples_per_second", math.nan)
    self._status = f"reward {reward:.4f}  {speed:.1f} samples/s{left}"
    self._done = iteration + 1
    if self._live is None:
      self.message(f"iteration {iteration + 1}/{self._total}  {self._status}")

  def message(self, text: str) -> None:
    """Prints a line, on a terminal above that which is rewritten."""
    if self._live is not None:
      self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
    elif not self._is_quiet:
      print(text, file=self._stream, flush=True)
      self._last = time.monotonic()

  def warning(self, text: str) -> None:
    """Prints a line from any process and any thread, as about a reward that has failed there."""
    if self._is_quiet:
      print(f"process {jax.process_index()}: {text}", file=self._stream, flush=True)
    else:
      self.message(text)

  def _line(self) -> Table:
    """The line of a terminal."""
    parts: list[Any] = []
    if self._total:
      bar = ProgressBar(total=self._total, completed=self._done, width=_BAR)
      parts = [f"iteration {self._done}/{self._total}", bar, self._status]
    if doing := current():
      parts.append(_sentence(doing))
    line = Table.grid(padding=(0, 1))
    for _ in parts:
      line.add_column(no_wrap=True, overflow="ellipsis")
    line.add_row(*parts)
    return line

  def _write_log(self) -> None:
    """Names a phase in a line when it begins, unless an earlier one had its name. Then says from
    time to time how long it has taken.
    """
    while not self._closed.wait(0.2):
      doing, silence = current(), time.monotonic() - self._last
      if not doing:
        continue
      if doing[-1].name not in self._named and silence >= min(_SILENCE, self._every):
        self._named.add(doing[-1].name)
        self.message(": ".join(each.text for each in doing))
      elif silence >= self._every:
        self.message(_sentence(doing))

  def close(self) -> None:
    """Ends the line of a terminal, or the lines of a log."""
    self._close.close()

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_) -> None:
    self.close()


def _sentence(doing: Sequence[Phase]) -> str:
  """The phases, the outer ones first, and how long the innermost one has taken."""
  text = ": ".join(each.text for each in doing)
  return f"{text}: {duration(time.monotonic() - doing[-1].begin)}"

"""Ctrl-C (SIGINT) in a command: one line, exit code 130, and nothing half-written.

Python runs a signal's handler only when the main thread comes back from what it is doing, which may
be minutes of compiling. So a thread listens too: it answers at once, and ends the process where the
main thread does not.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

EXIT_CODE = 130  # 128 + SIGINT, as shells have it
LINE = "stopped by Ctrl-C"
# Seconds that the main thread has to notice a Ctrl-C and clean up, before the process is ended.
PATIENCE = 3.0
# Two signals within so many seconds count as one: a wrapper may pass on what the terminal has sent
# to all of its processes.
_SAME = 0.2

_undo: list[Callable[[], object]] = []  # of `undone`
_notices: list[str] = []  # of `deferred`


def watch() -> None:
  """Makes Ctrl-C end this process with one line. A command calls it first, in its main thread.

  What the main thread does is interrupted by a KeyboardInterrupt, so that it cleans up. A second
  Ctrl-C ends the process at once. Where SIGINT is ignored, as in a script's background jobs, it
  stays so.
  """
  if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
    return
  sys.excepthook, sys.unraisablehook = _excepthook, _unraisablehook
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  threading.Thread(target=_listen, args=(reader,), name="interrupts", daemon=True).start()


@contextlib.contextmanager
def undone(undo: Callable[[], object]) -> Iterator[None]:
  """Inside, `undo` is called should the process be ended without coming back to the caller."""
  _undo.append(undo)
  try:
    yield
  finally:
    _undo.remove(undo)


@contextlib.contextmanager
def deferred(handler: Callable, notice: str = "") -> Iterator[None]:
  """Inside, the first Ctrl-C calls a handler, and the process goes on.

  Outside of the main thread, where Python allows no handler, it has no effect.

  Args:
    handler: of SIGINT, for `signal.signal`.
    notice: printed at the first Ctrl-C, if `watch` was called; "" prints nothing.
  """
  is_main = threading.current_thread() is threading.main_thread()
  if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
    yield
    return
  previous = signal.signal(signal.SIGINT, handler)
  _notices.append(notice)
  try:
    yield
  finally:
    _notices.pop()
    signal.signal(signal.SIGINT, previous)


def _listen(reader: int) -> None:
  """Answers each SIGINT as soon as it arrives."""
  first = None
  while True:
    if signal.SIGINT not in os.read(reader, 1):
      continue
    now = time.monotonic()
    if first is not None:
      if now - first > _SAME:
        _end()
      continue
    first = now
    if not _notices:
      timer = threading.Timer(PATIENCE, _end)
      timer.daemon = True
      timer.start()
    elif _notices[-1]:
      print(_notices[-1], file=sys.stderr, flush=True)


def _excepthook(kind: type, error: BaseException, traceback: object) -> None:
  """Ends the process after a Ctrl-C, whatever a library has made of the KeyboardInterrupt."""
  cause: BaseException | None = error
  while cause is not None:
    if isinstance(cause, KeyboardInterrupt):
      _end()
    cause = cause.__cause__ or cause.__context__
  sys.__excepthook__(kind, error, traceback)  # type: ignore[arg-type]


def _unraisablehook(unraisable: "sys.UnraisableHookArgs") -> None:
  """Ends the process where Python would drop a KeyboardInterrupt, as in a collector's callback."""
  if issubclass(unraisable.exc_type, KeyboardInterrupt):
    _end()
  sys.__unraisablehook__(unraisable)


def end(line: str, exit_code: int) -> None:
  """Ends the process with a line, without waiting for its threads, which may compile for minutes.

  What `undone` was given is called before.
  """
  for undo in reversed(_undo):
    with contextlib.suppress(Exception):
      undo()
  with contextlib.suppress(Exception):  # as where the reader of a pipe is gone
    print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
  os._exit(exit_code)


def _end() -> None:
  end(LINE, EXIT_CODE)

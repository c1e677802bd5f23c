"""Measures the seconds of each phase of an iteration without making the loop wait."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from dancegrpo_jax.report import progress

_UPDATE = "update"


class Clock:
  """The times of one iteration. A thread waits for the results of the phases in order, so that the
  loop can go on dispatching.

  Args:
    pool: an executor with one thread, the same for all iterations.
    before: the clock of the previous iteration. The devices do its work first, so this clock starts
      when that one ends.
  """

  def __init__(self, pool: ThreadPoolExecutor, before: "Clock | None" = None):
    self._pool, self._before = pool, before
    self._start = self._end = time.monotonic()
    self._seconds: dict[str, float] = {}
    self._begins: dict[str, float] = {}
    self._waits: list[Future] = []

  def phase(self, name: str, result: Any) -> None:
    """Ends a phase. It lasts from the end of the previous one until `result` is ready.

    Args:
      name: of the phase. Phases of the same name are added.
      result: arrays that are not donated later.
    """

    def wait() -> None:
      if self._before is not None:
        self._start = self._end = max(self._start, self._before._end)
        self._before = None
      # Chunks are sampled and scored in turns, which is one thing to whoever waits for them.
      text = "updating the weights" if name == _UPDATE else "sampling and scoring"
      with progress.phase(text, self._begins.setdefault(text, self._end)):
        jax.block_until_ready(result)
      now = time.monotonic()
      self._seconds[name] = self._seconds.get(name, 0.0) + now - self._end
      self._end = now

    self._waits.append(self._pool.submit(wait))

  def read(self) -> dict[str, float]:
    """Waits until all phases are done. Returns `time/<phase>` and `time/total`, in seconds."""
    for wait in self._waits:
      wait.result()
    phases = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
    return phases | {"time/total": self._end - self._start}

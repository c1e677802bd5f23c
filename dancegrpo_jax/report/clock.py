"""Seconds of each phase of an iteration, measured without holding up the loop."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax


class Clock:
  """One iteration's times. A thread waits for the phases' results in order, so that the loop can go
  on dispatching.

  Args:
    pool: an executor with one thread, the same for all iterations.
    before: the last iteration's clock; its work comes first on the devices, so this one's time
      starts when it ends.
  """

  def __init__(self, pool: ThreadPoolExecutor, before: "Clock | None" = None):
    self._pool, self._before = pool, before
    self._start = self._end = time.monotonic()
    self._seconds: dict[str, float] = {}
    self._waits: list[Future] = []

  def phase(self, name: str, result: Any) -> None:
    """The time from the last phase's end until `result` is ready is this one's. Arrays donated
    later can't be given.
    """

    def wait() -> None:
      if self._before is not None:
        self._start = self._end = max(self._start, self._before._end)
        self._before = None
      jax.block_until_ready(result)
      now = time.monotonic()
      self._seconds[name] = self._seconds.get(name, 0.0) + now - self._end
      self._end = now

    self._waits.append(self._pool.submit(wait))

  def read(self) -> dict[str, float]:
    """Blocks until all phases are done; `time/<phase>` and `time/total` in seconds."""
    for wait in self._waits:
      wait.result()
    return {f"time/{name}": seconds for name, seconds in self._seconds.items()} | {
      "time/total": self._end - self._start
    }

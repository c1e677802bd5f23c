"""Seconds of each phase of an iteration, measured without holding up the loop."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax


class Clock:
  """One iteration's times. A thread waits for the phases' results in order, so that the loop can go on dispatching.

  Args:
    pool: an executor with one thread.
  """

  def __init__(self, pool: ThreadPoolExecutor):
    self._pool, self._start = pool, time.monotonic()
    self._last, self._seconds = self._start, {}
    self._waits: list[Future] = []

  def phase(self, name: str, result: Any) -> None:
    """The time from the last phase's end until `result` is ready is this one's. Arrays donated later can't be given."""

    def wait() -> None:
      jax.block_until_ready(result)
      now = time.monotonic()
      self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
      self._last = now

    self._waits.append(self._pool.submit(wait))

  def read(self) -> dict[str, float]:
    """Blocks until all phases are done; `time/<phase>` and `time/total` in seconds."""
    for wait in self._waits:
      wait.result()
    return {f"time/{name}": seconds for name, seconds in self._seconds.items()} | {"time/total": self._last - self._start}

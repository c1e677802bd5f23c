"""SIGTERM, which schedulers and spot machines send before they take a machine away: a request to save and end."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class Preemption:
  """Knows whether the run was asked to stop. A context manager around the loop: outside it SIGTERM ends a single process at once.

  Of several processes any may get the signal, from `jax.distributed.initialize` on; JAX keeps it, tells the others and picks a
  call of `reached` at which all stop.
  """

  def __init__(self):
    self._asked = False
    self._together = jax.distributed.is_initialized()  # JAX then has a handler of its own, which stays
    self._before = None
    self._calls = 0

  def reached(self) -> bool:
    """Whether to stop now. All processes call it equally often, at the same points."""
    self._calls += 1  # JAX names the call at which all stop, so none may be left out
    return multihost_utils.reached_preemption_sync_point(self._calls) if self._together else self._asked

  def __enter__(self) -> "Preemption":
    if not self._together and threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
      self._before = signal.signal(signal.SIGTERM, self._ask)
    return self

  def __exit__(self, *_) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def _ask(self, *_) -> None:
    self._asked = True

"""SIGTERM, which schedulers and spot machines send before they take a machine away: a request to save and end."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class Preemption:
  """Knows whether the run was asked to stop. A context manager around the loop: outside it SIGTERM ends the process at once.

  Of several processes any may get the signal; JAX tells the others and picks an iteration at which all stop.
  """

  def __init__(self):
    self._asked = False
    self._together = jax.distributed.is_initialized()  # JAX then has a handler of its own, which stays
    self._before = None

  def reached(self, done: int) -> bool:
    """Whether to stop now. All processes call it after every iteration, with the number of iterations done."""
    return multihost_utils.reached_preemption_sync_point(done) if self._together else self._asked

  def __enter__(self) -> "Preemption":
    if not self._together and threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
      self._before = signal.signal(signal.SIGTERM, self._ask)
    return self

  def __exit__(self, *_) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def _ask(self, *_) -> None:
    self._asked = True

"""Signals as a request to save and stop: SIGTERM, which schedulers and spot machines send before
they take a machine away, and SIGINT, which is Ctrl-C.
"""

import contextlib
import signal
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dancegrpo_jax.devices import interrupts

_ORDER = (0, signal.SIGINT, signal.SIGTERM)  # by place; of two signals the later one here counts
_NAMES = ("", "Ctrl-C", "SIGTERM")  # by the same places
_NOTICE = (
  "Ctrl-C: the run ends as soon as the devices allow it, with the last whole iteration saved;"
  " again ends it at once"
)


class Preemption:
  """A context manager that catches SIGTERM, which ends the process at once outside of it. Ctrl-C is
  caught inside of `catching_interrupts` only, because before that there is nothing to save.

  Any of several processes may get the signal, and all stop at the same call of `reached`, because
  each call sends the state of every process to all of them. JAX has a service for this, which
  `processes.start` turns off: it compares how often each process has called it, but Orbax calls it
  at every save with the number of the checkpoint, so that a signal during a save is lost.

  Args:
    mesh: all devices of the run.
  """

  def __init__(self, mesh: Mesh):
    self._received = self._agreed = 0  # places in _ORDER
    self._sharding = NamedSharding(mesh, P(mesh.axis_names)) if jax.process_count() > 1 else None
    self._sent: jax.Array | None = None
    self._previous_handler: Any = None

  def reached(self, wait: bool = False) -> bool:
    """Whether to stop now. All processes must call it equally often, at the same points.

    Args:
      wait: whether to wait for the state that this call sends. Without it, several processes return
        the state that the previous call sent, so that the devices have work meanwhile. Python runs
        the signal's handler only while the process is not waiting for the devices.
    """
    if self._sharding is None:
      self._agreed = self._received
      return self._agreed > 0
    flags = jax.make_array_from_callback(
      (jax.device_count(),), self._sharding, lambda _: np.array([self._received])
    )
    previous, self._sent = self._sent, jnp.max(flags)
    answer = self._sent if wait else previous
    self._agreed = 0 if answer is None else int(answer)
    return self._agreed > 0

  @property
  def name(self) -> str:
    """The signal for which `reached` has said to stop, the same in all processes."""
    return _NAMES[self._agreed]

  @property
  def exit_code(self) -> int:
    """Of a run that has ended: 130 after Ctrl-C, 0 after SIGTERM and where nothing has come."""
    return interrupts.EXIT_CODE if _ORDER[self._agreed] == signal.SIGINT else 0

  def catching_interrupts(self) -> contextlib.AbstractContextManager:
    """Inside, a first Ctrl-C is what SIGTERM is, and a second one is a KeyboardInterrupt."""
    return interrupts.deferred(self._handle, _NOTICE if jax.process_index() == 0 else "")

  def __enter__(self) -> "Preemption":
    if threading.current_thread() is threading.main_thread():  # Python allows no handler elsewhere
      self._previous_handler = signal.signal(signal.SIGTERM, self._handle)
    return self

  def __exit__(self, *_) -> None:
    if self._previous_handler is not None:
      signal.signal(signal.SIGTERM, self._previous_handler)

  def _handle(self, number: int, _) -> None:
    if number == signal.SIGINT and _ORDER[self._received] == signal.SIGINT:
      raise KeyboardInterrupt
    self._received = max(self._received, _ORDER.index(number))

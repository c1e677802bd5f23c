"""SIGTERM, which schedulers and spot machines send before they take a machine away, as a request to
save and stop.
"""

import signal
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


class Preemption:
  """A context manager that catches SIGTERM, which ends the process at once outside of it.

  Any of several processes may get the signal, and all stop at the same call of `reached`, because
  each call sends the state of every process to all of them. JAX has a service for this, which
  `processes.start` turns off: it compares how often each process has called it, but Orbax calls it
  at every save with the number of the checkpoint, so that a signal during a save is lost.

  Args:
    mesh: all devices of the run.
  """

  def __init__(self, mesh: Mesh):
    self._is_signaled = False
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
      return self._is_signaled
    flags = jax.make_array_from_callback(
      (jax.device_count(),), self._sharding, lambda _: np.array([self._is_signaled])
    )
    previous, self._sent = self._sent, jnp.any(flags)
    answer = self._sent if wait else previous
    return answer is not None and bool(answer)

  def __enter__(self) -> "Preemption":
    if threading.current_thread() is threading.main_thread():  # Python allows no handler elsewhere
      self._previous_handler = signal.signal(signal.SIGTERM, self._handle)
    return self

  def __exit__(self, *_) -> None:
    if self._previous_handler is not None:
      signal.signal(signal.SIGTERM, self._previous_handler)

  def _handle(self, *_) -> None:
    self._is_signaled = True

"""SIGTERM, which schedulers and spot machines send before they take a machine away: a request to
save and end.
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
  """Knows whether the run was asked to stop. A context manager: outside it SIGTERM ends a process
  at once.

  Of several processes any may get the signal, and all stop at the same call of `reached`: each call
  sends this process's answer around the devices. JAX's own service for this is off
  (`distributed.start`): it compares numbers of calls, and Orbax, which asks it at each save, puts a
  checkpoint's number in their place, so that a signal during a save is lost.
  """

  def __init__(self, mesh: Mesh):
    self._asked = False
    self._sharding = NamedSharding(mesh, P(mesh.axis_names)) if jax.process_count() > 1 else None
    self._sent: jax.Array | None = None
    self._before: Any = None

  def reached(self, wait: bool = False) -> bool:
    """Whether to stop now. All processes call it equally often, at the same points.

    Args:
      wait: for what is sent now. Otherwise several processes answer what was sent at the call
        before, so that the devices have work meanwhile. A process hears of a signal when it isn't
        waiting for the devices, whatever it asks.
    """
    if self._sharding is None:
      return self._asked
    flags = jax.make_array_from_callback(
      (jax.device_count(),), self._sharding, lambda _: np.array([self._asked])
    )
    before, self._sent = self._sent, jnp.any(flags)
    answer = self._sent if wait else before
    return answer is not None and bool(answer)

  def __enter__(self) -> "Preemption":
    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
      self._before = signal.signal(signal.SIGTERM, self._ask)
    return self

  def __exit__(self, *_) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def _ask(self, *_) -> None:
    self._asked = True

"""Compiles the programs of a run in threads, all at once, while the weights are read."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import jax

from dancegrpo_jax.compilation.calls import SHOW, Call
from dancegrpo_jax.devices import out_of_memory
from dancegrpo_jax.programs import Programs
from dancegrpo_jax.report import progress

# Bytes of host memory that a compilation is expected to take. The largest for TPUs took 14 GiB.
MEMORY = 8 * 2**30
# The programs that take longest to compile, the longest first.
LARGEST_FIRST = ("update accumulate", "rollout", "update remember", "sample")
# Held while a program is traced: tracing is Python, so that several threads would only slow each
# other down.
_TRACING = threading.Lock()

Compiling = dict[str, futures.Future]  # by the name of the call; equal calls share a future


def start(listed: list[Call], mesh: jax.sharding.Mesh, pool: futures.Executor) -> Compiling:
  """Begins to compile every call, each in a thread.

  Every process queues the programs in the same order. XLA's autotuner exchanges results between
  processes, program by program, and would otherwise wait for one that another process has not
  begun.

  Args:
    listed: of `calls.of_run`.
    mesh: the devices.
    pool: of `compilers`.

  Returns:
    Futures of the compiled programs, by the names of their calls.
  """
  rank = {name: number for number, name in enumerate(LARGEST_FIRST)}
  ordered = sorted(listed, key=lambda call: rank.get(call.name, len(rank)))
  started: dict[Any, futures.Future] = {}
  result = {}
  for call in ordered:
    leaves, structure = jax.tree.flatten(call.arguments)
    key = (call.program, structure, tuple((x.shape, x.dtype, x.sharding) for x in leaves))
    if key not in started:
      started[key] = pool.submit(_compile, call, mesh)
    result[call.name] = started[key]
  return result


def _compile(call: Call, mesh: jax.sharding.Mesh) -> Callable:
  with out_of_memory.named(call.name):
    with jax.set_mesh(mesh), _TRACING:
      lowered = call.program.trace(*call.arguments).lower()
    return lowered.compile()


@contextlib.contextmanager
def compilers() -> Iterator[futures.Executor]:
  """Threads to compile in.

  After an error inside, compilations that have not begun are cancelled, so that it shows at once.
  """
  pool = futures.ThreadPoolExecutor(threads())
  try:
    yield pool
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def threads() -> int:
  """How many programs are compiled at once: one for each core that memory allows, at most 8."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  return max(1, min(8, cores, free_memory() // MEMORY))


def free_memory() -> int:
  """Bytes of memory that this process can still take, of the machine or of its container.

  Linux tells this in files. Where they are missing, it is assumed to be enough for two threads.
  """
  try:
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(rows["MemAvailable"].split()[0]) * 1024
  except (OSError, KeyError, ValueError, IndexError):
    return 2 * MEMORY
  # There may be no container, or one without a limit, whose file contains "max".
  with contextlib.suppress(OSError, ValueError):
    group = Path("/sys/fs/cgroup")
    limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    free = min(free, max(limit, 0))
  return free


def wait(compiling: Compiling) -> dict[str, Callable]:
  """Waits until all programs are compiled. Meanwhile the progress names those that are missing.

  Args:
    compiling: of `start`.

  Returns:
    The compiled programs by the names of their calls.

  Raises:
    Exception: what the compilation of a program raised.
  """
  with progress.phase("compiling") as now:
    while True:
      left = [name for name, future in compiling.items() if not future.done()]
      now.text = f"compiling {described(left)} of {len(compiling)} programs"
      done, pending = futures.wait(
        set(compiling.values()), timeout=0.5, return_when=futures.FIRST_EXCEPTION
      )
      for future in done:
        future.result()
      if not pending:
        break
  return {name: future.result() for name, future in compiling.items()}


def described(left: list[str], most: int = 3) -> str:
  """The programs that are missing, of which the first ones are named, as "rollout, decode"."""
  named = ", ".join(left[:most])
  return f"{named} and {len(left) - most} more" if len(left) > most else named


def put_together(jitted: Programs, compiled: dict[str, Callable], prefix: str = "") -> Programs:
  """Replaces jitted programs by compiled ones.

  Args:
    jitted: all programs; those that were not compiled stay as they are.
    compiled: by the names of their calls.
    prefix: `calls.SHOW` for the programs of an evaluation inside training. Those of an iteration
      are taken where the shapes are the same.
  """

  def replaced(name: str, program: Any) -> Any:
    return compiled.get(prefix + name, compiled.get(name, program))

  fields: dict[str, Any] = {}
  for field, program in jitted._asdict().items():
    if isinstance(program, dict):
      fields[field] = {name: replaced(f"{field} {name}", each) for name, each in program.items()}
    else:
      fields[field] = replaced(field, program)
  return Programs(**fields)


def ready(compiling: Compiling, jitted: Programs) -> tuple[Programs, Programs]:
  """Waits until all programs are compiled.

  Args:
    compiling: of `start`.
    jitted: the same programs.

  Returns:
    The compiled programs of an iteration, and those of an evaluation inside training.

  Raises:
    Exception: what the compilation of a program raised.
  """
  compiled = wait(compiling)
  return put_together(jitted, compiled), put_together(jitted, compiled, SHOW)

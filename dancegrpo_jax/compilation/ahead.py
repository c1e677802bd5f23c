"""Compiles the programs of a run in threads, all at once, while the weights are read."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import jax

from dancegrpo_jax.compilation.calls import SHOW, Call
from dancegrpo_jax.devices import out_of_memory
from dancegrpo_jax.programs import Programs
from dancegrpo_jax.report.metrics import Progress, duration

# Bytes that a compilation is expected to take. The largest ones for TPUs were seen to take 14 GiB.
MEMORY = 8 * 2**30
# The programs that take longest to compile, the longest first.
LARGEST_FIRST = ("update accumulate", "rollout", "update remember", "sample")
# Tracing is Python, so threads that trace at the same time would only slow each other down.
_TRACING = threading.Lock()

Compiling = dict[str, futures.Future]  # by the name of the call; equal calls share a future


def start(listed: list[Call], mesh: jax.sharding.Mesh, pool: futures.Executor) -> Compiling:
  """Begins to compile every call.

  Every process queues the programs in the same order: XLA's autotuner exchanges results between
  processes, program by program, and would otherwise wait for one that another process has not
  begun.

  Args:
    listed: of `calls.of_run`.
    mesh: the devices.
    pool: of `compilers`.
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
  """Threads to compile in. An error inside cancels what has not begun, so that it shows at once."""
  pool = futures.ThreadPoolExecutor(threads())
  try:
    yield pool
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def threads() -> int:
  """How many programs are compiled at once: one a core, as far as memory allows, and at most 8."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  return max(1, min(8, cores, free_memory() // MEMORY))


def free_memory() -> int:
  """Bytes of memory that this process can still take, of the machine or of its container.

  Where Linux's files that say so are missing, it is enough for two threads.
  """
  try:
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(rows["MemAvailable"].split()[0]) * 1024
  except (OSError, KeyError, ValueError, IndexError):
    return 2 * MEMORY
  # There may be no container, or one without a limit, which reads "max".
  with contextlib.suppress(OSError, ValueError):
    group = Path("/sys/fs/cgroup")
    limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    free = min(free, max(limit, 0))
  return free


def wait(compiling: Compiling, progress: Progress) -> dict[str, Callable]:
  """Waits until all programs are compiled. Meanwhile the progress line names those that are left,
  and the time that has passed.

  Args:
    compiling: of `start`.
    progress: of the run.

  Returns:
    The compiled programs by the names of their calls.

  Raises:
    Exception: what the compilation of a program raised.
  """
  begin, pause = time.monotonic(), 5.0
  while True:
    done, pending = futures.wait(
      set(compiling.values()), timeout=pause, return_when=futures.FIRST_EXCEPTION
    )
    for future in done:
      future.result()
    if not pending:
      break
    left = [name for name, future in compiling.items() if not future.done()]
    progress.status(f"compiling {', '.join(left)}: {duration(time.monotonic() - begin)}")
    pause = min(2 * pause, 60.0) if not progress.is_live else 1.0
  return {name: future.result() for name, future in compiling.items()}


def put_together(run: Programs, compiled: dict[str, Callable], prefix: str = "") -> Programs:
  """Replaces jitted programs by compiled ones.

  Args:
    run: jitted.
    compiled: by name.
    prefix: `calls.SHOW` for the programs of an evaluation inside training, where their shapes
      differ from those of an iteration.
  """

  def best(name: str, jitted: Any) -> Any:
    return compiled.get(prefix + name, compiled.get(name, jitted))

  fields: dict[str, Any] = {}
  for field, program in run._asdict().items():
    if isinstance(program, dict):
      fields[field] = {name: best(f"{field} {name}", each) for name, each in program.items()}
    else:
      fields[field] = best(field, program)
  return Programs(**fields)


def ready(compiling: Compiling, run: Programs, progress: Progress) -> tuple[Programs, Programs]:
  """Waits for the programs of an iteration and of an evaluation inside training."""
  compiled = wait(compiling, progress)
  return put_together(run, compiled), put_together(run, compiled, SHOW)

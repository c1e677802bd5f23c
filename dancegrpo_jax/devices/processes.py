"""Several processes as one run: joining them before anything touches a device, and finding out that
they disagree.

A TPU pod and Slurm say in the environment who takes part; elsewhere the flags of main do. Alone,
nothing happens at all. JAX is imported where it is used: flags are read, and a misspelt one
answered, without that second.
"""

import argparse
import importlib.util
import os
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dancegrpo_jax.errors import ConfigError

FLAGS = ("coordinator", "num_processes", "process_id")
JOIN_SECONDS = 300  # how long a process waits for the coordinator, as JAX does
# how long for a file that process 0 has written: NFS clients may remember a folder's contents for
# so long
SHARE_SECONDS = 60
# What srun sets for each task, all of which JAX reads; a batch script outside srun lacks the
# step's.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def add_flags(parser: argparse.ArgumentParser) -> None:
  """--coordinator, --num-processes and --process-id."""
  where = "not needed on a TPU pod or under Slurm"
  parser.add_argument(
    "--coordinator",
    metavar="HOST:PORT",
    help=f"of process 0, for a run of several processes; {where}",
  )
  parser.add_argument("--num-processes", metavar="N", help="all processes of the run")
  parser.add_argument("--process-id", metavar="I", help="this one, 0 to N - 1")


def start(flags: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> None:
  """Joins the run's other processes, if there are any; returns when all are there.

  Args:
    flags: what `add_flags` added; they come before what the environment says.
    environment: variables, those of the process.

  Raises:
    ConfigError: flags that are wrong or incomplete, or a coordinator of the flags that doesn't
      answer. Where process 0 waits in vain for another one, JAX ends it.
  """
  arguments = _from_flags(flags)
  if arguments is None:
    arguments = _from_environment(environment)
  if arguments is None or arguments.get("num_processes") == 1:
    return
  if arguments.get("process_id"):
    _await_coordinator(arguments["coordinator_address"])
  import jax

  jax.config.update("jax_enable_preemption_service", False)  # devices/preemption.py has its own
  try:
    jax.distributed.initialize(**arguments)
  except (RuntimeError, ValueError) as error:
    who = (
      ", ".join(f"{name} {value}" for name, value in arguments.items())
      or "as the TPU's metadata says"
    )
    reason = " ".join(str(error).split())[:200]
    raise ConfigError(
      f"can't join the other processes ({who}): {reason}; start all, with the same coordinator"
    ) from error


def require_same(value: str | int, problem: str, remedy: str) -> None:
  """Stops all processes where they disagree; all must call it at the same point.

  Raises:
    ConfigError: on every process: the problem, each value with the processes that have it, the
      remedy.
  """
  import jax
  import numpy as np
  from jax.experimental import multihost_utils

  if not jax.distributed.is_initialized():
    return
  own = np.frombuffer(str(value).encode().ljust(32), np.uint8)
  rows = np.asarray(multihost_utils.process_allgather(own))
  values: dict[str, list[str]] = {}
  for process, row in enumerate(rows.astype(np.uint8)):
    values.setdefault(row.tobytes().decode().strip(), []).append(str(process))
  if len(values) > 1:
    found = "; ".join(
      f"{text} on process {', '.join(owners[:8])}" for text, owners in values.items()
    )
    raise ConfigError(f"{problem}: {found}; {remedy}")


def require_shared(folder: Path) -> None:
  """Stops all processes unless all see the same folder, which is made; all must call it at the same
  point.

  Raises:
    ConfigError: on every process: those that don't see what process 0 writes there. Checkpoints
      would wait for them for ever.
  """
  import jax
  import numpy as np
  from jax.experimental import multihost_utils

  if not jax.distributed.is_initialized() or jax.process_count() == 1:
    return
  number = multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))
  file = folder / f".shared-{int(number)}"
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    file.touch()
  for _ in range(SHARE_SECONDS):  # together: a collective on CPUs gives up after 30 s
    everyone = np.asarray(multihost_utils.process_allgather(np.bool_(file.exists()))).reshape(-1)
    if everyone.all():
      break
    time.sleep(1)
  if jax.process_index() == 0:
    file.unlink()
  if not everyone.all():
    blind = ", ".join(map(str, np.flatnonzero(~everyone)[:8]))
    raise ConfigError(
      f"--workdir={folder}: what process 0 writes there isn't seen by process {blind}; give a"
      " folder on a file system that all"
      " hosts share"
    )


def _await_coordinator(address: str) -> None:
  """Waits until process 0 listens. JAX (0.10) would wait as well, but then abort the process with a
  stack trace.
  """
  host, _, port = address.rpartition(":")
  deadline = time.monotonic() + JOIN_SECONDS
  while True:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() > deadline:
        raise ConfigError(
          f"--coordinator={address}: process 0 does not answer there after {JOIN_SECONDS} s"
          f" ({error}); start it with the"
          " same coordinator, and let the hosts reach each other"
        ) from error
    time.sleep(0.5)


def _from_flags(flags: argparse.Namespace) -> dict[str, Any] | None:
  """Arguments of `jax.distributed.initialize`; None where no flag is given."""
  given = {name: getattr(flags, name) for name in FLAGS if getattr(flags, name) is not None}
  if not given:
    return None
  missing = [_spelt(name) for name in FLAGS if name not in given]
  if missing:
    have = " and ".join(f"{_spelt(name)}={value}" for name, value in given.items())
    raise ConfigError(
      f"{have}: without {' and '.join(missing)}; give all three, or none for a single process"
    )
  host, colon, port = flags.coordinator.rpartition(":")
  if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
    raise ConfigError(
      f"--coordinator={flags.coordinator}: write host:port of process 0, as"
      " --coordinator=10.0.0.1:1234"
    )
  count, number = (
    _number("num_processes", flags.num_processes),
    _number("process_id", flags.process_id),
  )
  if count < 1:
    raise ConfigError(f"--num-processes={count}: must be at least 1")
  if number >= count:
    raise ConfigError(f"--process-id={number}: the {count} processes are 0 to {count - 1}")
  # "deactivate": else JAX looks for a cluster all the same, to learn which devices are meant
  return {
    "coordinator_address": flags.coordinator,
    "num_processes": count,
    "process_id": number,
    "cluster_detection_method": "deactivate",
  }


def _number(name: str, text: str) -> int:
  if not text.isdecimal():
    least = "at least 1" if name == "num_processes" else "0 or more"
    raise ConfigError(f"{_spelt(name)}={text}: must be a whole number, {least}")
  return int(text)


def _spelt(name: str) -> str:
  return "--" + name.replace("_", "-")


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any] | None:
  """As `_from_flags`, for clusters that JAX knows; None for a single process."""
  if all(name in environment for name in _SLURM):
    return {"cluster_detection_method": "slurm"} if int(environment["SLURM_NTASKS"]) > 1 else None
  platforms = environment.get("JAX_PLATFORMS", "")
  if platforms and "tpu" not in platforms.split(","):
    return None
  hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
  if hosts is not None:  # GKE
    several = "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1
    return {} if several else None
  # A TPU VM's metadata server knows its neighbours; JAX asks it, unless that is forbidden.
  return {} if has_tpu() and "TPU_SKIP_MDS_QUERY" not in environment else None


def has_tpu() -> bool:
  """Whether this host has a TPU and libtpu, found without starting either."""
  devices = Path(os.devnull).parent
  return importlib.util.find_spec("libtpu") is not None and any(
    [*devices.glob("accel[0-9]*"), *devices.glob("vfio/[0-9]*")]
  )

"""Runs of several processes: joining them, and checking that they agree.

On a TPU pod and under Slurm the environment describes the processes; elsewhere the flags of `main`
do. In a run of one process nothing here does anything.

JAX is imported inside of functions, because importing it takes a second and a misspelt flag should
be answered at once.
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

from dancegrpo_jax import buckets
from dancegrpo_jax.errors import ConfigError

FLAGS = ("coordinator", "num_processes", "process_id")
JOIN_SECONDS = 300  # how long a process waits for the coordinator, as JAX does
# How long a process waits for a file that process 0 has written. NFS clients may cache the contents
# of a folder for so long.
SHARE_SECONDS = 60
_LONGEST = 2000  # bytes of a message that is sent to all processes
# The variables that srun sets for each task; JAX reads all of them. A batch script outside of srun
# lacks those of the step.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds --coordinator, --num-processes and --process-id."""
  where = "not needed on a TPU pod or under Slurm"
  parser.add_argument(
    "--coordinator",
    metavar="HOST:PORT",
    help=f"address of process 0, for a run of several processes; {where}",
  )
  parser.add_argument("--num-processes", metavar="N", help="number of processes of the run")
  parser.add_argument("--process-id", metavar="I", help="number of this process, 0 to N - 1")


def start(flags: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> None:
  """Joins the run's other processes, if there are any. Returns when all have joined.

  Must be called before anything touches a device.

  Args:
    flags: those that `add_flags` adds. They override the environment.
    environment: the environment variables.

  Raises:
    ConfigError: flags are wrong or incomplete, or the coordinator of the flags does not answer. If
      process 0 waits too long for another process, JAX ends it.
  """
  arguments = _from_flags(flags)
  if arguments is None:
    arguments = _from_environment(environment)
  if arguments is None or arguments.get("num_processes") == 1:
    return
  if arguments.get("process_id"):
    _await_coordinator(arguments["coordinator_address"])
  import jax

  jax.config.update("jax_enable_preemption_service", False)  # devices/preemption.py replaces it
  try:
    jax.distributed.initialize(**arguments)
  except (RuntimeError, ValueError) as error:
    where = ", ".join(f"{name} {value}" for name, value in arguments.items())
    where = where or "from the TPU's metadata"
    reason = " ".join(str(error).split())[:200]
    raise ConfigError(
      f"can't join the other processes ({where}): {reason}; start all, with the same coordinator"
    ) from error


def is_first() -> bool:
  """Whether this is process 0. In a run of one process no device is touched."""
  import jax

  return not jax.distributed.is_initialized() or jax.process_index() == 0


def require_none(mistake: str) -> None:
  """Raises a mistake that process 0 has found on every process. All must call it at the same point.

  Args:
    mistake: the message; "" is none. That of other processes than 0 does not count.

  Raises:
    ConfigError: on every process, if process 0 has found one.
  """
  import jax
  import numpy as np
  from jax.experimental import multihost_utils

  if jax.distributed.is_initialized():
    text = np.frombuffer(mistake.encode()[:_LONGEST].ljust(_LONGEST), np.uint8)
    sent = np.asarray(multihost_utils.broadcast_one_to_all(text))
    mistake = sent.astype(np.uint8).tobytes().decode(errors="replace").strip()
  if mistake:
    raise ConfigError(mistake)


def require_same(value: str | int, problem: str, remedy: str) -> None:
  """Checks that a value is the same on all processes. All must call it at the same point.

  Args:
    value: its text may have 32 bytes.
    problem: the beginning of the message.
    remedy: the end of the message.

  Raises:
    ConfigError: on every process, if values differ. The message has each value with its processes.
  """
  import jax
  import numpy as np
  from jax.experimental import multihost_utils

  if not jax.distributed.is_initialized():
    return
  local = np.frombuffer(str(value).encode().ljust(32), np.uint8)
  rows = np.asarray(multihost_utils.process_allgather(local))
  values: dict[str, list[str]] = {}
  for process, row in enumerate(rows.astype(np.uint8)):
    values.setdefault(row.tobytes().decode().strip(), []).append(str(process))
  if len(values) > 1:
    listed = [f"{text} on process {', '.join(owners[:8])}" for text, owners in values.items()]
    raise ConfigError(f"{problem}: {'; '.join(listed)}; {remedy}")


def require_shared(folder: Path) -> None:
  """Makes a folder and checks that all processes see it. Otherwise a save would never end.

  All processes must call it at the same point.

  Raises:
    ConfigError: on every process, if one does not see what process 0 writes into the folder.
  """
  import jax
  import numpy as np
  from jax.experimental import multihost_utils

  if not jax.distributed.is_initialized() or jax.process_count() == 1:
    return
  if buckets.is_url(buckets.behind(folder)):
    return  # all processes see a bucket, and those that don't can't read its checkpoints
  number = multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))
  file = folder / f".shared-{int(number)}"
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    file.touch()
  # All processes exchange what they see every second, because a collective on CPUs waits for 30 s
  # at most.
  for _ in range(SHARE_SECONDS):
    sees = np.asarray(multihost_utils.process_allgather(np.bool_(file.exists()))).reshape(-1)
    if sees.all():
      break
    time.sleep(1)
  if jax.process_index() == 0:
    file.unlink()
  if not sees.all():
    blind = ", ".join(map(str, np.flatnonzero(~sees)[:8]))
    raise ConfigError(
      f"--workdir={folder}: what process 0 writes there isn't seen by process {blind}; give a"
      " folder on a file system that all hosts share"
    )


def _await_coordinator(address: str) -> None:
  """Waits until process 0 listens. JAX (0.10) waits too, but then aborts with a stack trace."""
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
          f" ({error}); start it with the same coordinator, and let the hosts reach each other"
        ) from error
    time.sleep(0.5)


def _from_flags(flags: argparse.Namespace) -> dict[str, Any] | None:
  """Arguments of `jax.distributed.initialize` from the flags; None if no flag is given."""
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
  count = _number("num_processes", flags.num_processes)
  number = _number("process_id", flags.process_id)
  if count < 1:
    raise ConfigError(f"--num-processes={count}: must be at least 1")
  if number >= count:
    raise ConfigError(f"--process-id={number}: the {count} processes are 0 to {count - 1}")
  return {
    "coordinator_address": flags.coordinator,
    "num_processes": count,
    "process_id": number,
    # Otherwise JAX looks for a cluster all the same, to learn which devices it may use.
    "cluster_detection_method": "deactivate",
  }


def _number(name: str, text: str) -> int:
  """The value of a flag that must be a whole number."""
  if not text.isdecimal():
    least = "at least 1" if name == "num_processes" else "0 or more"
    raise ConfigError(f"{_spelt(name)}={text}: must be a whole number, {least}")
  return int(text)


def _spelt(name: str) -> str:
  return "--" + name.replace("_", "-")


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any] | None:
  """As `_from_flags`, for clusters that JAX detects; None for a single process."""
  if all(name in environment for name in _SLURM):
    return {"cluster_detection_method": "slurm"} if int(environment["SLURM_NTASKS"]) > 1 else None
  platforms = environment.get("JAX_PLATFORMS", "")
  if platforms and "tpu" not in platforms.split(","):
    return None
  hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
  if hosts is not None:  # GKE
    several = "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1
    return {} if several else None
  # JAX asks the metadata server of a TPU VM for the other hosts, unless that is turned off.
  return {} if has_tpu() and "TPU_SKIP_MDS_QUERY" not in environment else None


def has_tpu() -> bool:
  """Whether this host has a TPU and libtpu. Starts neither."""
  if importlib.util.find_spec("libtpu") is None:
    return False
  devices = Path(os.devnull).parent
  return any([*devices.glob("accel[0-9]*"), *devices.glob("vfio/[0-9]*")])

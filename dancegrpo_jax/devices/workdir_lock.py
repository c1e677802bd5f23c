"""One run at a time in a workdir.

The run that owns a workdir keeps running.json there, which says where it runs, and touches the file
every few seconds. A run that is killed can't remove it. On the same machine the process's
number and the time at which it was started tell at once that it is gone. On another machine the
newcomer watches the file: one that nobody touches means the same. Clocks are never compared.
"""

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from dancegrpo_jax.devices import interrupts, lock_files, processes
from dancegrpo_jax.devices.lock_files import LockFile, Seen
from dancegrpo_jax.errors import ConfigError

FILE = "running.json"
BEAT = 2.0  # seconds from one sign of life to the next
PATIENCE = 8.0  # seconds without a sign after which a run on another machine counts as gone


@contextlib.contextmanager
def held(workdir: Path | str) -> Iterator[None]:
  """Inside, this run owns a workdir; afterwards the file is gone, and the folder where it was made
  for the file and is empty.

  Should another run take the workdir over, as while this machine sleeps, the process is ended with
  one line and exit code 2, since it must not write any more. All processes of a run must enter, and
  process 0 holds the file.

  Args:
    workdir: a local folder, or the URL of one in a bucket.

  Raises:
    ConfigError: on every process: another run owns the workdir, or the file can't be written.
  """
  with contextlib.ExitStack() as stack:
    mistake = ""
    if processes.is_first():
      try:
        stack.enter_context(_held(workdir))
      except ConfigError as error:
        mistake = str(error)
      except OSError as error:
        mistake = (
          f"--workdir={workdir}: {FILE} can't be written there ({error}); use another folder"
        )
    processes.require_none(mistake)
    yield


@contextlib.contextmanager
def _held(workdir: Path | str) -> Iterator[None]:
  file, me, stop = lock_files.of(workdir, FILE), _myself(), threading.Event()
  arguments = (file, me, stop, workdir)
  beat = threading.Thread(target=_beat, args=arguments, name="workdir", daemon=True)

  def release() -> None:
    stop.set()
    if threading.current_thread() is not beat:
      beat.join(timeout=BEAT)  # not for ever, as where a file server is gone
    seen = file.read()
    if seen is not None and seen.owner.get("id") == me["id"]:
      file.remove()
    file.tidy()

  _take(file, me, workdir)
  beat.start()
  with interrupts.undone(release):
    try:
      yield
    finally:
      with contextlib.suppress(OSError):
        release()


def _take(file: LockFile, me: dict[str, str], workdir: Path | str) -> None:
  """Makes a file that this process owns, in the place of one whose owner is gone.

  Of several newcomers one wins: who has found that an owner is gone must first own a file with the
  name of that owner, and look again.

  Raises:
    ConfigError: the owner of the file is alive.
  """
  while not file.make(me):
    before = file.read()
    if before is None or not _is_gone(file, before, workdir):
      time.sleep(0.1)  # it was released, or taken over, in this moment
      continue
    claim = file.beside(before.owner.get("id", "spoilt"))
    _take(claim, me, workdir)
    try:
      again = file.read()
      if again is not None and again.owner == before.owner:
        file.replace(me)
        return
    finally:
      claim.remove()


def _is_gone(file: LockFile, before: Seen, workdir: Path | str) -> bool:
  """Whether the owner of a file is gone; False where the file has another owner by now.

  Raises:
    ConfigError: the owner is alive.
  """
  owner = before.owner
  lives = _lives(owner)
  if lives is False:
    return True
  end = time.monotonic() + PATIENCE
  if lives is None:
    who = f"process {owner.get('process')} on {owner.get('host')}"
    print(
      f"{workdir} was in use by {who}: looking for a sign of life for {PATIENCE:.0f} s", flush=True
    )
  while lives is None and time.monotonic() < end:
    time.sleep(0.2)
    now = file.read()
    if now is None or now.owner != owner:
      return False
    if now.stamp != before.stamp:
      lives = True
  if not lives:
    return True
  raise ConfigError(
    f"--workdir={workdir}: a run is going on there, process {owner.get('process')} on"
    f" {owner.get('host')}, begun {owner.get('begun')}; wait for its end or stop it, or name"
    " another --workdir"
  )


def _lives(owner: dict[str, str]) -> bool | None:
  """Whether the process of an owner is alive; None where this process can't see it."""
  me = _myself()
  if not me["machine"] or owner.get("machine") != me["machine"]:
    return None
  fields = _stat(owner["process"])
  if fields is not None:  # a zombie is dead, too
    return fields[0] not in "XZ" and fields[19] == owner["started"]
  try:
    os.kill(int(owner["process"]), 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return None  # hidden, as the processes of other users may be


def _stat(process: str) -> list[str] | None:
  """The fields of /proc/PROCESS/stat from the third on: first the state, and, at 19, when the
  process was started, in ticks since the machine was. None where there is no such process.
  """
  try:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return None


def _myself() -> dict[str, str]:
  """This process, as running.json has it. `machine` is the same for processes that see each other's
  numbers, those of one boot and one container; "" where that is unknown.
  """
  try:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    machine = f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    machine = ""
  stat = _stat("self")
  return {
    "id": secrets.token_hex(8),
    "host": socket.gethostname(),
    "process": str(os.getpid()),
    "begun": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    "machine": machine,
    "started": stat[19] if stat else "",
  }


def _beat(file: LockFile, me: dict[str, str], stop: threading.Event, workdir: Path | str) -> None:
  """Gives signs of life until `stop`. Ends the process where the workdir belongs to another run."""
  while not stop.wait(BEAT):
    # An OSError may be a slow server or a full disk, and the next time may do.
    with contextlib.suppress(OSError):
      owner = file.touch(me)
      if owner.get("id") != me["id"] and not stop.is_set():
        interrupts.end(
          f"error: {workdir}: process {owner.get('process')} on {owner.get('host')} has taken this"
          " workdir over while this process was suspended; it ends here and writes nothing more",
          exit_code=2,
        )

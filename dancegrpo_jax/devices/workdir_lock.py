"""One run at a time in a workdir.

The run that owns a workdir keeps running.json there, which says where it runs, and sets the file's
time every few seconds. A run that is killed can't remove it. On the same machine the process's
number and the time at which it was started tell at once that it is gone. On another machine the
newcomer watches the file: a time that does not change means the same. Clocks are never compared.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from dancegrpo_jax.devices import interrupts, processes
from dancegrpo_jax.errors import ConfigError

FILE = "running.json"
BEAT = 2.0  # seconds from one sign of life to the next
PATIENCE = 8.0  # seconds without a sign after which a run on another machine counts as gone


class Seen(NamedTuple):
  """What running.json was when it was read.

  Attributes:
    owner: its content; {} where a power cut or a full disk has spoilt it.
    time: of the last sign of life, in nanoseconds of the file server's clock.
  """

  owner: dict[str, str]
  time: int


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
  """Inside, this run owns a workdir; afterwards the file is gone, and the folder where it was made
  for the file and is empty.

  Should another run take the workdir over, as while this machine sleeps, the process is ended with
  one line and exit code 2, since it must not write any more. All processes of a run must enter, and
  process 0 holds the file.

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
def _held(workdir: Path) -> Iterator[None]:
  file, me = workdir.absolute() / FILE, _myself()
  made = [folder for folder in file.parents if not folder.exists()]
  stop = threading.Event()
  beat = threading.Thread(target=_beat, args=(file, me, stop), name="workdir", daemon=True)

  def release() -> None:
    stop.set()
    if threading.current_thread() is not beat:
      beat.join(timeout=BEAT)  # not for ever, as where a file server is gone
    if _is_mine(file, me):
      file.unlink()
    with contextlib.suppress(OSError):  # what holds files stays
      for folder in made:
        folder.rmdir()

  _take(file, me, workdir)
  beat.start()
  with interrupts.undone(release):
    try:
      yield
    finally:
      with contextlib.suppress(OSError):
        release()


def _take(file: Path, me: dict[str, str], workdir: Path) -> None:
  """Makes a file that this process owns, in the place of one whose owner is gone.

  Of several newcomers one wins: who has found that an owner is gone must first own a file with the
  name of that owner, and look again.

  Raises:
    ConfigError: the owner of the file is alive.
  """
  while not _made(file, me):
    before = _read(file)
    if before is None or not _is_gone(file, before, workdir):
      time.sleep(0.1)  # it was released, or taken over, in this moment
      continue
    claim = file.with_name(f"{file.name}.{before.owner.get('id', 'spoilt')}")
    _take(claim, me, workdir)
    try:
      again = _read(file)
      if again is not None and again.owner == before.owner:
        _put(file, me, os.replace)
        return
    finally:
      claim.unlink(missing_ok=True)


def _is_gone(file: Path, before: Seen, workdir: Path) -> bool:
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
    now = _read(file)
    if now is None or now.owner != owner:
      return False
    if now.time != before.time:
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


def _made(file: Path, me: dict[str, str]) -> bool:
  """Whether this process has made a file that was not there."""
  try:
    _put(file, me, os.link)
  except FileExistsError:
    return False
  return True


def _put(file: Path, me: dict[str, str], place: Callable[[Path, Path], None]) -> None:
  """Writes a file that appears whole.

  Args:
    file: the file.
    me: its content.
    place: `os.link` where it must not be there, `os.replace` where it is.
  """
  file.parent.mkdir(parents=True, exist_ok=True)
  partial = file.with_name(f".{file.name}.{me['id']}")
  try:
    with partial.open("w") as stream:
      json.dump(me, stream, indent=2)
      stream.flush()
      os.fsync(stream.fileno())
    try:
      place(partial, file)
    except OSError as error:
      if place is not os.link or isinstance(error, FileExistsError):
        raise
      with file.open("x") as stream:  # the file system has no links
        json.dump(me, stream, indent=2)
  finally:
    partial.unlink(missing_ok=True)


def _read(file: Path) -> Seen | None:
  """What a file is now, None where there is none. It is opened, since NFS asks its server then."""
  try:
    with file.open() as stream:
      when = os.fstat(stream.fileno()).st_mtime_ns
      owner = json.load(stream)
  except FileNotFoundError:
    return None
  except ValueError:
    return Seen({}, when)
  return Seen(owner, when)


def _is_mine(file: Path, me: dict[str, str]) -> bool:
  seen = _read(file)
  return seen is not None and seen.owner.get("id") == me["id"]


def _beat(file: Path, me: dict[str, str], stop: threading.Event) -> None:
  """Gives signs of life until `stop`. Ends the process where the workdir belongs to another run."""
  while not stop.wait(BEAT):
    # An OSError may be a slow server or a full disk, and the next time may do.
    with contextlib.suppress(OSError, ValueError):
      if not file.exists():  # somebody has deleted it
        if file.parent.is_dir():
          _made(file, me)
        continue
      with file.open("r+") as stream:  # should another run replace it now, its own is not touched
        owner = json.load(stream)
        if owner["id"] == me["id"]:
          os.utime(stream.fileno())
          continue
      if not stop.is_set():
        interrupts.end(
          f"error: {file.parent}: process {owner['process']} on {owner['host']} has taken this"
          " workdir over while this process was suspended; it ends here and writes nothing more",
          exit_code=2,
        )

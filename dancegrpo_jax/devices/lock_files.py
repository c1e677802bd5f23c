"""The file by which a run owns its workdir, in a local folder or in a bucket."""

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dancegrpo_jax import buckets

# Seconds after which an object that was made is read again. Google's buckets make it once only, but
# a stand-in for them may let two processes do so.
_SETTLE = 0.5


class Seen(NamedTuple):
  """What the file was when it was read.

  Attributes:
    owner: its content; {} where a power cut or a full disk has spoilt it.
    stamp: changes whenever the file is touched.
  """

  owner: dict[str, str]
  stamp: str


class InFolder:
  """The file in a folder. All methods raise OSError where the place can't be used.

  Args:
    file: its path.
    made: folders that are made for it, the inner ones first.
  """

  def __init__(self, file: Path, made: list[Path]):
    self._file, self._made = file, made

  def make(self, me: dict[str, str]) -> bool:
    """Writes the file where there is none. Returns whether this process has made it."""
    try:
      self._put(me, os.link)
    except FileExistsError:
      return False
    return True

  def replace(self, me: dict[str, str]) -> None:
    """Writes the file where there is one."""
    self._put(me, os.replace)

  def read(self) -> Seen | None:
    """What it is now; None where there is none."""
    try:  # It is opened, since NFS asks its server then.
      with self._file.open() as stream:
        stamp = str(os.fstat(stream.fileno()).st_mtime_ns)
        return Seen(_parsed(stream.read()), stamp)
    except FileNotFoundError:
      return None

  def touch(self, me: dict[str, str]) -> dict[str, str]:
    """Touches it, or makes it again where somebody has deleted it. Another owner's stays as it is.
    Returns the owner.
    """
    if not self._file.exists():
      if self._file.parent.is_dir():
        self.make(me)
      return me
    with self._file.open("r+") as stream:  # should another run replace it now, its own stays
      owner = _parsed(stream.read())
      if owner.get("id") == me["id"]:
        os.utime(stream.fileno())
    return owner

  def remove(self) -> None:
    """Removes the file, if it is there."""
    self._file.unlink(missing_ok=True)

  def tidy(self) -> None:
    """Removes the folders that were made for the file and are empty."""
    with contextlib.suppress(OSError):  # what holds files stays
      for folder in self._made:
        folder.rmdir()

  def beside(self, name: str) -> "InFolder":
    """Another file, whose name begins with that of this one."""
    return InFolder(self._file.with_name(f"{self._file.name}.{name}"), [])

  def _put(self, me: dict[str, str], place: Callable[[Path, Path], None]) -> None:
    """Writes the file whole, by os.link where it must not be there, or by os.replace."""
    self._file.parent.mkdir(parents=True, exist_ok=True)
    partial = self._file.with_name(f".{self._file.name}.{me['id']}")
    try:
      with partial.open("w") as stream:
        stream.write(json.dumps(me, indent=2))
        stream.flush()
        os.fsync(stream.fileno())
      try:
        place(partial, self._file)
      except OSError as error:
        if place is not os.link or isinstance(error, FileExistsError):
          raise
        with self._file.open("x") as stream:  # the file system has no links
          stream.write(json.dumps(me, indent=2))
    finally:
      partial.unlink(missing_ok=True)


class InBucket:
  """The object of a URL, with the methods of `InFolder`."""

  def __init__(self, url: str):
    self._url = url

  def make(self, me: dict[str, str]) -> bool:
    if self.read() is not None:
      return False
    try:
      buckets.write(self._url, json.dumps(me, indent=2).encode(), True)
    except FileExistsError:
      return False
    time.sleep(_SETTLE)
    seen = self.read()
    return seen is not None and seen.owner.get("id") == me["id"]

  def replace(self, me: dict[str, str]) -> None:
    buckets.write(self._url, json.dumps(me, indent=2).encode())

  def read(self) -> Seen | None:
    try:
      stamp = buckets.stat(self._url).version
      return Seen(_parsed(buckets.read(self._url).decode(errors="replace")), stamp)
    except FileNotFoundError:
      return None

  def touch(self, me: dict[str, str]) -> dict[str, str]:
    seen = self.read()
    if seen is None:
      self.make(me)
      return me
    if seen.owner.get("id") == me["id"]:
      buckets.touch(self._url)  # of the object's metadata, so that no owner is overwritten
    return seen.owner

  def remove(self) -> None:
    with contextlib.suppress(FileNotFoundError):
      buckets.remove(self._url)

  def tidy(self) -> None:
    """Buckets have no folders."""

  def beside(self, name: str) -> "InBucket":
    return InBucket(f"{self._url}.{name}")


LockFile = InFolder | InBucket


def of(workdir: Path | str, name: str) -> LockFile:
  """The file of this name in a workdir, which is a folder or the URL of one in a bucket."""
  if buckets.is_url(str(workdir)):
    url = f"{str(workdir).rstrip('/')}/{name}"
    probe = f"{url}.probe-{secrets.token_hex(4)}"
    buckets.write(probe, b"")  # a mistake in the permissions shows here
    buckets.touch(probe)
    buckets.remove(probe)
    return InBucket(url)
  file = Path(workdir).absolute() / name
  return InFolder(file, [folder for folder in file.parents if not folder.exists()])


def _parsed(text: str) -> dict[str, str]:
  try:
    return json.loads(text)
  except ValueError:
    return {}

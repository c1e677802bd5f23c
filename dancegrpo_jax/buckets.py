"""Google Cloud Storage: objects and local copies of them. A URL is gs://BUCKET/NAME.

Published files are read as those of the Hugging Face hub are: they are copied into a cache folder,
from which everything goes on. An object that has changed is copied again, and an object that is
gone is removed there.
"""

import contextlib
import fnmatch
import functools
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dancegrpo_jax.errors import ConfigError

PREFIX = "gs://"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # a Path has joined the two slashes
_MARK = ".bucket"  # the file of a local folder that names the URL whose files it holds
_VERSIONS = ".versions.json"  # in a local copy: by name, the versions of the objects
# Weights for other frameworks, which may be as large as those that are read.
_LEFT_OUT = ("*.h5", "*.msgpack", "*.ot", "*.onnx", "*.gguf", "*.ckpt")


class BucketError(ConfigError, OSError):
  """A bucket can't be read or written. The message is one line."""


class Object(NamedTuple):
  """An object of a bucket.

  Attributes:
    version: changes whenever the object does.
    size: in bytes.
  """

  version: str
  size: int


def is_url(name: str) -> bool:
  """Whether a name is that of a bucket or of something in it."""
  return name.startswith(PREFIX)


def require_path(label: str, name: object, remote: bool) -> None:
  """Checks that a value which names a file or a folder is no URL that can't be used there.

  Args:
    label: the field or the flag, for the message.
    name: its value; other types than text are no URLs.
    remote: whether a bucket may stand there.

  Raises:
    ConfigError: another URL, a bucket where none may be, or no library that reads it.
  """
  if not isinstance(name, str) or not _URL.match(name.removeprefix("random:")):
    return
  url = name.removeprefix("random:")
  if not is_url(url):
    raise ConfigError(
      f"{label} = {name!r}: such a URL can't be used there; give a local path"
      + (f", or a Google Cloud Storage bucket as {PREFIX}BUCKET/NAME" if remote else "")
    )
  if not remote:
    raise ConfigError(f"{label} = {name!r}: a bucket can't be used there; give a local path")
  if not re.fullmatch(r"gs://[\w.-]+(/[^/]+)+/?", url):
    raise ConfigError(f"{label} = {name!r}: must be {PREFIX}BUCKET/NAME")
  filesystem()


@functools.cache
def filesystem() -> Any:
  """gcsfs, which sees what others have changed. ConfigError where it is not installed."""
  try:
    import fsspec
    import gcsfs
  except ImportError as error:
    raise ConfigError(
      "gs://... needs gcsfs, which is not installed; pip install -r requirements-gcs.txt"
    ) from error
  # etils, and so Orbax, makes its own file system, which has to see changes, too.
  for name in ("gs", "gcs"):
    fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
  # Without credentials for another interface of the cloud it says so for every object.
  logging.getLogger("gcsfs").addFilter(lambda record: record.levelno >= logging.ERROR)
  return gcsfs.GCSFileSystem()


def _one_line(function: Callable) -> Callable:
  """Makes a BucketError of what gcsfs raises. That something is there, or is not, passes."""

  @functools.wraps(function)
  def call(url: str, *args: Any) -> Any:
    try:
      return function(url, *args)
    except (FileNotFoundError, FileExistsError, ConfigError):
      raise
    except Exception as error:  # gcsfs, aiohttp and google.auth raise a dozen types
      text = " ".join(str(error).split())[:200] or type(error).__name__
      raise BucketError(f"{url}: {text}") from error

  return call


@_one_line
def read(url: str) -> bytes:
  """The content of an object. Raises FileNotFoundError and BucketError."""
  return filesystem().cat_file(url)


@_one_line
def write(url: str, content: bytes, create: bool = False) -> None:
  """Writes an object. With `create`, FileExistsError where there is one. Raises BucketError."""
  filesystem().pipe_file(url, content, mode="create" if create else "overwrite")


@_one_line
def remove(url: str) -> None:
  """Removes an object. Raises FileNotFoundError and BucketError."""
  filesystem().rm_file(url)


@_one_line
def touch(url: str) -> None:
  """Changes the version of an object, and not its content. Errors as `remove`."""
  filesystem().setxattrs(url, touched=secrets.token_hex(8))


@_one_line
def stat(url: str) -> Object:
  """An object's version and size. Errors as `remove`."""
  return _object(filesystem().info(url))


@_one_line
def listing(url: str) -> dict[str, Object]:
  """The objects below a URL, by their names relative to it; the object itself has the name "".

  Raises:
    BucketError: the bucket can't be read.
  """
  files, place = filesystem(), url.removeprefix(PREFIX).rstrip("/")
  with contextlib.suppress(FileNotFoundError):
    found = files.find(place, detail=True)
    return {
      name.removeprefix(place).lstrip("/"): _object(info)
      for name, info in found.items()
      if not name.endswith("/")  # what stands for an empty folder
    }
  return {}


def _object(info: dict) -> Object:
  if info.get("type") == "directory":
    raise FileNotFoundError(info["name"])
  return Object(f"{info.get('generation')}.{info.get('metageneration')}", int(info["size"]))


@_one_line
def fetch(url: str, file: Path) -> None:
  """Copies an object into a file, which appears whole or not at all. Errors as `remove`."""
  file.parent.mkdir(parents=True, exist_ok=True)
  partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
  try:
    filesystem().get_file(url, str(partial))
    os.replace(partial, file)
  finally:
    partial.unlink(missing_ok=True)


@_one_line
def send(url: str, file: Path) -> Object:
  """Copies a file into an object, and returns it. Raises BucketError."""
  filesystem().put_file(str(file), url)
  return _object(filesystem().info(url))


# Local copies


def cache(kind: str, url: str) -> Path:
  """The folder of a kind of local copies that belongs to a URL."""
  base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
  return base / "dancegrpo_jax" / kind / url.removeprefix(PREFIX).rstrip("/")


def copy_of(url: str) -> Path:
  """Where `mirrored` puts the copy of a URL. It need not be there."""
  return cache("buckets", url)


def mirrored(url: str, wanted: Iterable[str] = ("*",)) -> Path:
  """The local copy of an object, or of the objects below a URL.

  Args:
    url: of an object or of a folder.
    wanted: patterns of the names, relative to the URL, that are needed of a folder.

  Returns:
    The copy, `copy_of(url)`. It is not there where the bucket has nothing of that name.

  Raises:
    BucketError: the bucket can't be read.
  """
  from filelock import FileLock  # other processes of this machine may want the same files

  copy, base, patterns, found = copy_of(url), url.rstrip("/"), list(wanted), listing(url)
  place = copy
  if "" in found or copy.is_file():  # an object, now or before
    base, _, name = base.rpartition("/")
    place, patterns = copy.parent, [name]
    found = {name: found[""]} if "" in found else {}
  if not found and not place.is_dir():
    return copy

  def is_wanted(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, each) for each in patterns) and not any(
      fnmatch.fnmatchcase(name, each) for each in _LEFT_OUT
    )

  place.mkdir(parents=True, exist_ok=True)
  with FileLock(place / ".lock"):
    versions = _read_versions(place)
    for name in filter(is_wanted, versions.keys() - found.keys()):
      (place / name).unlink(missing_ok=True)
    for name in filter(is_wanted, found):
      if versions.get(name) != found[name].version or not (place / name).is_file():
        fetch(f"{base}/{name}", place / name)
        versions[name] = found[name].version
        (place / _VERSIONS).write_text(json.dumps(versions))
  return copy


def _read_versions(place: Path) -> dict[str, str]:
  with contextlib.suppress(OSError, ValueError):
    return json.loads((place / _VERSIONS).read_text())
  return {}


def mark(folder: Path, url: str) -> None:
  """Notes in a local folder that it holds files of a URL."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / _MARK).write_text(url)


def behind(folder: str | os.PathLike) -> str:
  """The URL whose files a local folder holds, or the folder itself."""
  file = Path(folder) / _MARK
  return file.read_text() if file.is_file() else str(folder)

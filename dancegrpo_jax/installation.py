"""Finds the files that a config or a command line names, among them those that come with the
package: `configs/` and `assets/`.

In a checkout they are beside the package. In a wheel they are inside the package, in `_data/`, so
that an installation adds only `dancegrpo_jax` to a user's site-packages.
"""

import functools
from pathlib import Path

from dancegrpo_jax import buckets

_INSIDE = Path(__file__).parent / "_data"
ROOT = _INSIDE if _INSIDE.is_dir() else Path(__file__).parent.parent
SHIPPED = ("configs", "assets")


def places(path: str | Path) -> list[Path]:
  """The existing files that a path in a config or on a command line can mean, best first.

  A relative path is looked up in the working folder first. If it begins with `configs` or `assets`,
  it is then looked up among the files that come with the package. The user's file is therefore
  preferred, and `assets/prompts/emoji_run.txt` exists from any folder.
  """
  path = Path(path)
  files = [path] if path.exists() else []
  if not path.is_absolute() and path.parts[:1] and path.parts[0] in SHIPPED:
    shipped = ROOT / path
    if shipped.exists() and not (files and shipped.samefile(path)):
      files.append(shipped)
  return files


def find(path: str | Path) -> Path:
  """The first of `places`, or the path itself if there is none, for the caller's message.

  What lies in a bucket is copied into a local folder, which is returned. A process looks at the
  bucket once for each name.
  """
  if isinstance(path, str) and buckets.is_url(path):
    return _copied(path)
  return next(iter(places(path)), Path(path))


_copied = functools.cache(buckets.mirrored)

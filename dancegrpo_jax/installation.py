"""Where the files that come with the package are: `configs/` and `assets/`.

In a checkout they lie beside the package. A wheel has them inside it, in `_data/`, so that an
installation adds nothing but `dancegrpo_jax` to a user's site-packages.
"""

from pathlib import Path

_INSIDE = Path(__file__).parent / "_data"
ROOT = _INSIDE if _INSIDE.is_dir() else Path(__file__).parent.parent
SHIPPED = ("configs", "assets")


def places(path: str | Path) -> list[Path]:
  """Where a path of a config or of a command line is, the one that counts first; [] where nowhere.

  A relative path is looked up in the working folder, and then, if it begins with `configs` or
  `assets`, among the files that come with the package. The user's own file is therefore always
  preferred, and `assets/prompts/emoji_run.txt` is found from any folder.
  """
  path = Path(path)
  found = [path] if path.exists() else []
  if not path.is_absolute() and path.parts[:1] and path.parts[0] in SHIPPED:
    shipped = ROOT / path
    if shipped.exists() and not (found and shipped.samefile(path)):
      found.append(shipped)
  return found


def find(path: str | Path) -> Path:
  """The first of `places`; the path itself where there is none, for the caller's message."""
  return next(iter(places(path)), Path(path))

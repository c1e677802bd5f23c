"""Where a checkpoint's files are: a local folder, the Hugging Face cache, or the hub, from which
only what is missing is fetched.

A name is a folder in diffusers' or transformers' layout, a hub id ("owner/name"), or
"random:FOLDER": a folder of JSON files and tokenizers alone, whose networks get random weights in
memory (`weights.draw`).
"""

import re
from pathlib import Path

from dancegrpo_jax.data.tokenizers import kind_of
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.pipelines.layout import RANDOM, Layout, is_random, local_path

# folder of a checkpoint that `convert import` wrote: all networks' parameters as one Orbax tree
ORBAX = "orbax"
_WEIGHTS = (
  ".safetensors",
  ".bin",
  ".pt",
  ".pth",
  ".ckpt",
)  # pickled ones count as found: their reader says what to do
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def tokenizer_files(layout: Layout, optional: bool = False) -> list[str]:
  """The files of all tokenizers: those that must be there, or those that may."""
  kinds = {place: kind_of(named) for place, named in layout.tokenizers.items()}
  return [
    str(Path(place) / file)
    for place, kind in kinds.items()
    for file in (kind.optional if optional else kind.files)
  ]


def folder(field: str, name: str, layout: Layout, variant: str = "") -> Path:
  """The local folder of a checkpoint. Nothing but file names is looked at, so a mistake shows
  before weights are read.

  Args:
    field: of the config, for messages.
    name: a folder, a hub id or "random:FOLDER".
    layout: what must be there.
    variant: which weight files to fetch, as "fp16"; "" the full ones.

  Raises:
    ConfigError: one line that says what is missing, what was found and how to get it.
  """
  path = local_path(name)
  if path.is_dir():
    absent = missing(path, layout._replace(networks=()) if is_random(name) else layout)
    if absent:
      found = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
      raise ConfigError(
        f"config.{field} = {name!r}: the folder lacks {', '.join(absent)}; found {found};"
        f" {_accepted(layout)}"
      )
    return path
  if is_random(name):
    raise ConfigError(
      f"config.{field} = {name!r}: no such folder {path} (from {Path.cwd()}); give one with the"
      " JSON files"
    )
  if not _HUB_ID.fullmatch(name):
    raise ConfigError(
      f"config.{field} = {name!r}: no such folder (from {Path.cwd()}) and not a hub id;"
      f" {_accepted(layout)}"
    )
  return _cached(name, layout) or _download(field, name, layout, variant)


def described(field: str, name: str, layout: Layout, published: Path) -> str:
  """A checkpoint as "random:FOLDER", for those who ask what its networks are and need neither
  weights nor tokenizers.

  Args:
    field, name, layout: as `folder` takes them.
    published: folder with JSON files of some hub ids, for those that aren't here.

  Raises:
    ConfigError: its JSON files are nowhere.
  """
  files = layout._replace(tokenizers={}, networks=())
  path = local_path(name)
  for place in (path, None if is_random(name) else _cached(name, files), published / name):
    if place is not None and place.is_dir() and not missing(place, files):
      return f"{RANDOM}{place}"
  raise ConfigError(
    f"config.{field} = {name!r}: needs {', '.join(files.files.values())} of it, which are in no"
    " folder of"
    " that name, not in the Hugging"
    f" Face cache and not in {published}"
  )


def missing(path: Path, layout: Layout) -> list[str]:
  """What of the layout is not in the folder; [] where it is whole."""
  absent = [
    file
    for file in (*layout.files.values(), *tokenizer_files(layout))
    if not (path / file).is_file()
  ]
  if (path / ORBAX).is_dir():
    return absent
  names = {place: [entry.name for entry in (path / place).glob("*")] for place in layout.networks}
  return absent + [
    str(Path(place) / "*.safetensors") for place, found in names.items() if not _has_weights(found)
  ]


def _has_weights(names: list[str]) -> bool:
  return any(name.endswith(_WEIGHTS) for name in names)


def patterns(layout: Layout, variant: str = "") -> list[str]:
  """The files to fetch, as `allow_patterns`: of a repository that holds every weight file several
  times, one set alone.
  """
  mark = f".{variant}" if variant else ""
  kinds = [f"{mark}.safetensors", f"{mark}-*-of-*.safetensors", f"-*-of-*{mark}.safetensors"]
  kinds += [f"{mark}.safetensors.index.json", f".safetensors.index{mark}.json"]
  weights = [
    str(Path(place) / f"{stem}{kind}")
    for place in layout.networks
    for stem in layout.stems
    for kind in kinds
  ]
  tokenizers = tokenizer_files(layout) + tokenizer_files(layout, optional=True)
  index = [layout.index] if layout.index else []
  return list(dict.fromkeys([*index, *layout.files.values(), *tokenizers, *weights]))


def _cached(name: str, layout: Layout) -> Path | None:
  """The folder in the Hugging Face cache, where all that is needed is there in some precision."""
  from huggingface_hub import snapshot_download
  from huggingface_hub.errors import LocalEntryNotFoundError

  try:  # the JSON files alone are asked for: which weight files there are is seen below
    path = Path(
      snapshot_download(name, allow_patterns=list(layout.files.values()), local_files_only=True)
    )
  except (LocalEntryNotFoundError, ValueError):  # ValueError: not a valid id
    return None
  return None if missing(path, layout) else path


def _download(field: str, name: str, layout: Layout, variant: str) -> Path:
  """Fetches what is needed: the variant's weight files, the full ones, else those in half
  precision. ConfigError as `folder`.
  """
  from huggingface_hub import constants, snapshot_download

  where = (
    f"config.{field} = {name!r}: no such folder (from {Path.cwd()}), not in the Hugging Face cache"
  )
  if constants.HF_HUB_OFFLINE:
    raise ConfigError(
      f"{where}, and HF_HUB_OFFLINE=1 forbids downloads; {_remedy(field, name, layout)}"
    )
  absent: list[str] = []
  for kind in dict.fromkeys((variant, "", "fp16", "bf16")):
    try:
      path = Path(snapshot_download(name, allow_patterns=patterns(layout, kind)))
    # no network, no such repository, gated, disk full: a dozen classes, of several lines each
    except Exception as error:
      reason = " ".join(str(error).split())[:200]
      raise ConfigError(
        f"{where}, and not downloaded ({type(error).__name__}: {reason});"
        f" {_remedy(field, name, layout)}"
      ) from error
    absent = missing(path, layout)
    if not absent:
      return path
  raise ConfigError(
    f"config.{field} = {name!r}: the hub's files lack {', '.join(absent)}; {_accepted(layout)}"
  )


def _remedy(field: str, name: str, layout: Layout) -> str:
  local = f"checkpoints/{name.split('/')[-1]}"
  return (
    f"where there is a network run `hf download {name} --local-dir {local}` (a gated one: accept"
    " its licence on its page and"
    f" `hf auth login` first), copy the folder here and set --config.{field}={local};"
    f" {_accepted(layout)}"
  )


def _accepted(layout: Layout) -> str:
  tokenizers = [
    str(Path(place) / " + ".join(n for n in kind_of(named).files if n != "tokenizer_config.json"))
    for place, named in layout.tokenizers.items()
  ]
  networks = [str(Path(place) / "*.safetensors") for place in layout.networks]
  accepted = [*layout.files.values(), *tokenizers, *networks]
  return f"accepted is a folder with {', '.join(accepted)}"

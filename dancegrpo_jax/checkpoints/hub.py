"""Finds a checkpoint's files: in a local folder, in the Hugging Face cache, or on the hub, from
which only missing files are fetched.

A checkpoint's name is a folder in the layout of diffusers or transformers, a hub id ("owner/name"),
or "random:FOLDER". The last is a folder with JSON files and tokenizers only, whose networks get
random weights in memory (`weights.draw`).
"""

import json
import re
from pathlib import Path

from dancegrpo_jax.checkpoints import recognition, safetensors_io, weight_files
from dancegrpo_jax.data.tokenizers import kind_of
from dancegrpo_jax.errors import ConfigError, ConversionError, listed
from dancegrpo_jax.pipelines.families import FAMILIES
from dancegrpo_jax.pipelines.layout import RANDOM, Layout, forms_of, is_random, local_path

# The folder, in a checkpoint that `convert import` wrote, of all networks' parameters as one Orbax
# tree.
ORBAX = "orbax"
# Pickled files count as weights here: the error of their reader says what to do.
_WEIGHTS = (weight_files.SAFETENSORS, *weight_files.PICKLED)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def tokenizer_files(layout: Layout) -> list[str]:
  """All files that the tokenizers of a layout may have, in whatever form."""
  kinds = {place: kind_of(named) for place, named in layout.tokenizers.items()}
  return [
    str(Path(place) / file)
    for place, kind in kinds.items()
    for file in dict.fromkeys((*kind.files, *kind.instead, *kind.optional))
  ]


def json_files(layout: Layout) -> list[str]:
  """All JSON files that a checkpoint of this layout may have, in whatever form."""
  return [form for file in layout.files.values() for form in forms_of(file)]


def folder(field: str, name: str, layout: Layout, variant: str = "") -> Path:
  """The local folder of a checkpoint, fetched from the hub if need be.

  Only the names of files are looked at, so that a mistake shows before weights are read.

  Args:
    field: of the config, for messages.
    name: a folder, a hub id or "random:FOLDER".
    layout: the files that must be there.
    variant: which weight files to fetch, as "fp16"; "" fetches those in full precision.

  Raises:
    ConfigError: one line that says what is missing, what is there and how to get the rest; or that
      the checkpoint is of another model family.
  """
  path = local_path(name)
  if path.is_file():
    raise ConfigError(f"{_label(field)} = {name!r}: {_about_file(path, layout)}")
  if path.is_dir():
    _check_pipeline(field, name, path, layout)
    absent = missing(path, layout._replace(networks=()) if is_random(name) else layout)
    if absent:
      content = listed(sorted(entry.name for entry in path.iterdir()), 12)
      raise ConfigError(
        f"{_label(field)} = {name!r}: the folder lacks {', '.join(absent)}; found {content}"
        f"{_named_pipeline(path, layout)};"
        f" {_accepted(layout)}"
      )
    return path
  if is_random(name):
    raise ConfigError(
      f"{_label(field)} = {name!r}: no such folder {path} (from {Path.cwd()}); give one with the"
      " JSON files"
    )
  if not _HUB_ID.fullmatch(name):
    raise ConfigError(
      f"{_label(field)} = {name!r}: no such folder (from {Path.cwd()}) and not a hub id;"
      f" {_accepted(layout)}"
    )
  snapshot = _snapshot(name, layout)
  if snapshot is not None:
    _check_pipeline(field, name, snapshot, layout)
    if not missing(snapshot, layout):
      return snapshot
  return _download(field, name, layout, variant)


def _check_pipeline(field: str, name: str, path: Path, layout: Layout) -> None:
  """ConfigError where a folder's index names a pipeline of another family of this package."""
  kind = _pipeline_of(path, layout)
  if not layout.pipelines or kind in layout.pipelines:
    return
  for family, each in FAMILIES.items():
    if kind in each.pipelines:
      remedy = f"expected a {layout.pipelines[0]}"
      if field == "model.checkpoint":
        remedy = f"set {_flag('model.family')}={family}, or name a {layout.pipelines[0]}"
      raise ConfigError(
        f"{_label(field)} = {name!r}: is a {kind}, as its {layout.index_file} says, and so of the"
        f" family {family}; {remedy}"
      )


def _named_pipeline(path: Path, layout: Layout) -> str:
  """Which pipeline a folder is by its index, for a message; "" where it is one of the layout's."""
  kind = _pipeline_of(path, layout)
  return f" ({layout.index_file}: {kind})" if kind and kind not in layout.pipelines else ""


def _pipeline_of(path: Path, layout: Layout) -> str:
  """The class that a folder's index names; "" where there is no index, or it can't be read."""
  try:
    index = json.loads((path / layout.index_file).read_text()) if layout.index_file else {}
  except (OSError, ValueError):
    return ""
  return str(index.get("_class_name") or "") if isinstance(index, dict) else ""


def _label(field: str) -> str:
  """A field of the config, or a flag, as messages name it."""
  return field if field.startswith("--") else f"config.{field}"


def _flag(field: str) -> str:
  """The flag that sets a field of the config; a flag itself."""
  return field if field.startswith("--") else f"--config.{field}"


def _about_file(file: Path, layout: Layout) -> str:
  """What a file is that was named in place of a folder, and how to use it, in one line."""
  folder = f"is a file, and {_accepted(layout)}"
  if file.suffix == ".gguf":
    return f"a GGUF file, whose quantised weights are not read; {folder}"
  if file.suffix != weight_files.SAFETENSORS and not weight_files.is_pickled(file):
    return folder
  command = f"python -m dancegrpo_jax.convert import-single {file}"
  out = f"--out={file.with_suffix('')}"
  if weight_files.is_pickled(file):
    return (
      "a pickled checkpoint in one file; if it is one of Stable Diffusion or FLUX, make a folder of"
      f" it with `{command} --allow_pickle --base=BASE {out}`, where BASE is a folder or a hub id"
      " of a model with the same networks"
    )
  try:
    kind = recognition.kind_of(safetensors_io.header(file))
  except ConversionError as error:
    return str(error)
  if kind is None:
    return folder
  if kind.base:
    return (
      f"{kind.title}; make a folder of it with `{command} --base={kind.base} {out}`, where --base"
      " may be any folder or hub id of a model with the same networks"
    )
  return f"{kind.title}; {kind.remedy or folder}"


def described(field: str, name: str, layout: Layout, published: Path) -> str:
  """A checkpoint as "random:FOLDER", for callers that need to know its networks, and need neither
  weights nor tokenizers.

  Args:
    field, name, layout: as in `folder`.
    published: a folder with the JSON files of some hub ids, used for checkpoints that are neither
      in a local folder nor in the cache.

  Raises:
    ConfigError: the checkpoint's JSON files are in none of these places.
  """
  files = layout._replace(tokenizers={}, networks=())
  path = local_path(name)
  for place in (path, None if is_random(name) else _cached(name, files), published / name):
    if place is not None and place.is_dir():
      _check_pipeline(field, name, place, layout)
    if place is not None and place.is_dir() and not missing(place, files):
      return f"{RANDOM}{place}"
  raise ConfigError(
    f"{_label(field)} = {name!r}: needs {', '.join(files.files.values())} of it, which are in no"
    f" folder of that name, not in the Hugging Face cache and not in {published}; download them,"
    " or name another checkpoint"
  )


def missing(path: Path, layout: Layout) -> list[str]:
  """The files of the layout that are not in the folder; [] where it is complete."""
  absent = [
    file
    for file in layout.files.values()
    if not any((path / form).is_file() for form in forms_of(file))
  ]
  for place, named in layout.tokenizers.items():
    absent += [str(Path(place) / file) for file in kind_of(named).missing(path / place)]
  if (path / ORBAX).is_dir():
    return absent
  return absent + [
    str(Path(place) / "*.safetensors")
    for place in layout.networks
    if not _has_weights(path / place)
  ]


def _has_weights(folder: Path) -> bool:
  return any(entry.name.endswith(_WEIGHTS) and entry.is_file() for entry in folder.glob("*"))


def patterns(layout: Layout, variant: str = "") -> list[str]:
  """The files to fetch, as patterns for `allow_patterns`.

  Repositories may hold every weight file in several precisions; the patterns match one of them.
  """
  mark = f".{variant}" if variant else ""
  kinds = [f"{mark}.safetensors", f"{mark}-*-of-*.safetensors", f"-*-of-*{mark}.safetensors"]
  kinds += weight_files.indices("", mark)
  weights = [
    str(Path(place) / f"{stem}{kind}")
    for place in layout.networks
    for stem in layout.stems
    for kind in kinds
  ]
  index = [layout.index_file] if layout.index_file else []
  return list(dict.fromkeys([*index, *json_files(layout), *tokenizer_files(layout), *weights]))


def is_cached(name: str, layout: Layout) -> bool:
  """Whether the Hugging Face cache holds a checkpoint of this name, which is a hub id then."""
  return is_hub_id(name) and _cached(name, layout) is not None


def is_hub_id(name: str) -> bool:
  """Whether a name may be one of the hub, as "owner/name"."""
  return bool(_HUB_ID.fullmatch(name))


def is_offline() -> bool:
  """Whether HF_HUB_OFFLINE forbids to ask the hub."""
  from huggingface_hub import constants

  return bool(constants.HF_HUB_OFFLINE)


def not_fetched(field: str, name: str, reason: str, is_gated: bool = False) -> str:
  """The line about a checkpoint of the hub that can't be fetched."""
  where = f"{_label(field)} = {name!r}: no such folder, not in the Hugging Face cache"
  return f"{where}, and not downloaded ({reason}); {_remedy(field, name, is_gated)}"


def _cached(name: str, layout: Layout) -> Path | None:
  """The folder in the Hugging Face cache; None unless it holds all files, in some precision."""
  path = _snapshot(name, layout)
  return None if path is None or missing(path, layout) else path


def _snapshot(name: str, layout: Layout) -> Path | None:
  """The folder in the Hugging Face cache, whatever files it holds; None where there is none."""
  # Imported here because it is slow to import, and local folders don't need it.
  from huggingface_hub import snapshot_download
  from huggingface_hub.errors import LocalEntryNotFoundError

  try:  # Only the JSON files are requested here; `missing` looks for the weights.
    return Path(snapshot_download(name, allow_patterns=json_files(layout), local_files_only=True))
  except (LocalEntryNotFoundError, ValueError):  # ValueError: not a valid id
    return None


def _download(field: str, name: str, layout: Layout, variant: str) -> Path:
  """Fetches the missing files. ConfigError as `folder`.

  The weight files are those of the variant, else those in full precision, else those in half
  precision.
  """
  from huggingface_hub import snapshot_download
  from huggingface_hub.errors import GatedRepoError

  if is_offline():
    where = f"{_label(field)} = {name!r}: no such folder, not in the Hugging Face cache"
    raise ConfigError(f"{where}, and HF_HUB_OFFLINE=1 forbids downloads; {_remedy(field, name)}")
  absent: list[str] = []
  # The index comes first and alone, because the weights of another family would be large.
  index = [[layout.index_file]] if layout.pipelines else []
  wanted = [patterns(layout, kind) for kind in dict.fromkeys((variant, "", "fp16", "bf16"))]
  for some in (*index, *wanted):
    try:
      path = Path(snapshot_download(name, allow_patterns=some))
    # No network, no such repository, a gated one, a full disk: the hub's client has a dozen
    # classes for these, with messages of several lines.
    except Exception as error:
      reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
      is_gated = isinstance(error, GatedRepoError)
      raise ConfigError(not_fetched(field, name, reason, is_gated)) from error
    _check_pipeline(field, name, path, layout)
    absent = missing(path, layout)
    if not absent:
      return path
  raise ConfigError(
    f"{_label(field)} = {name!r}: the hub's files lack {', '.join(absent)}; {_accepted(layout)}"
  )


def _remedy(field: str, name: str, is_gated: bool = False) -> str:
  """How to get a repository's files, in a line that fits on a screen."""
  if is_gated:
    return f"accept its licence on huggingface.co/{name}, and run `hf auth login`"
  local = f"checkpoints/{name.split('/')[-1]}"
  return (
    f"run `hf download {name} --local-dir {local}` where there is a network, and set"
    f" {_flag(field)}={local}"
  )


def _accepted(layout: Layout) -> str:
  tokenizers = []
  for place, named in layout.tokenizers.items():
    kind = kind_of(named)
    forms = [
      " + ".join(name for name in form if name != "tokenizer_config.json")
      for form in (kind.files, kind.instead)
    ]
    tokenizers.append(str(Path(place) / " or ".join(form for form in forms if form)))
  networks = [str(Path(place) / "*.safetensors") for place in layout.networks]
  accepted = [*layout.files.values(), *tokenizers, *networks]
  return f"accepted is a folder with {', '.join(accepted)}"

"""Whether the files of checkpoints are here or can be fetched, and under which licence."""

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from dancegrpo_jax.assembly import reward_builders
from dancegrpo_jax.checkpoints import hub
from dancegrpo_jax.dry_run.findings import NotedError
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.pipelines.layout import Layout, local_path
from dancegrpo_jax.rewards.base import Files

SECONDS = 10.0  # that one question to the hub may take


class Access(NamedTuple):
  """A checkpoint of the run.

  Attributes:
    field: of the config.
    text: what was found.
    download: bytes that the run would fetch.
    problem: what to do where the files can't be had; "" where they can.
  """

  field: str
  text: str
  download: int = 0
  problem: str = ""


def checked_folder(noted: dict[str, Access]) -> Callable[..., Path]:
  """`hub.folder`, which notes what it finds by the field's name, and never fetches weights.

  What it returns raises NotedError where the files are not on this machine.
  """

  def folder(field: str, name: str, layout: Layout, variant: str = "") -> Path:
    is_local = local_path(name).exists() or not hub.is_hub_id(name)
    try:
      if is_local or hub.is_cached(name, layout) or hub.is_offline():
        path = hub.folder(field, name, layout, variant)
        where = "local" if is_local else "in the Hugging Face cache"
        noted[field] = Access(field, f"{name}: {where}; {licence(path / 'README.md')}")
        return path
    except ConfigError as error:
      noted[field] = Access(field, name, problem=str(error))
      raise NotedError(str(error)) from error
    noted[field] = on_hub(field, name, hub.patterns(layout, variant))
    raise NotedError(noted[field].problem or f"{name} is still to be fetched")

  return folder


def files(noted: dict[str, Access]) -> Files:
  """How a reward finds its files: as `reward_builders.FILES`, and what it finds is noted."""

  def file(field: str, source: str) -> Path:
    try:
      path = reward_builders.weight_file(field, source)
    except ConfigError as error:
      noted[field] = Access(field, source, problem=str(error))
      return local_path(source)  # so that the reward asks for its other files too
    folder = path if path.is_dir() else path.parent
    noted[field] = Access(field, f"{source}: local; {licence(folder / 'README.md')}")
    return path

  folder = checked_folder(noted)

  def tokenizer(field: str, source: str, network: dict[str, Any]) -> Callable:
    return reward_builders.load_tokenizer(field, source, network, folder)

  return reward_builders.FILES._replace(folder=folder, file=file, tokenizer=tokenizer)


def on_hub(field: str, name: str, patterns: list[str]) -> Access:
  """Asks the hub for a repository's size and licence, and whether its files may be read.

  Args:
    field: of the config.
    name: "owner/name".
    patterns: of the files that a run would fetch.
  """
  from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
  from huggingface_hub.errors import GatedRepoError

  try:
    info = HfApi().model_info(name, files_metadata=True, timeout=SECONDS)
    wanted = [
      file
      for file in info.siblings or []
      if any(fnmatch(file.rfilename, pattern) for pattern in patterns)
    ]
    if wanted:  # a gated repository can be asked about, and its files can't be read
      get_hf_file_metadata(hf_hub_url(name, wanted[0].rfilename), timeout=SECONDS)
  except GatedRepoError:
    return Access(field, name, problem=hub.not_fetched(field, name, "gated", is_gated=True))
  # As in `hub`: no network, no such repository, and a dozen classes for these.
  except Exception as error:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return Access(field, name, problem=hub.not_fetched(field, name, reason))
  size = sum(file.size or 0 for file in wanted)
  found = (info.card_data or {}).get("license")
  named = f"licence {found}, as its card says" if found else "licence not stated by its card"
  return Access(field, f"{name}: on the hub, {size / 1e9:.2f} GB to fetch; {named}", size)


def licence(readme: Path) -> str:
  """What the head of a model card says of the licence."""
  from huggingface_hub import ModelCard

  unknown = "licence unknown (no model card with one in the folder)"
  if not readme.is_file():
    return unknown
  try:
    data = ModelCard.load(readme, ignore_metadata_errors=True).data
  except (ValueError, OSError):
    return unknown
  named = data.get("license_name") or data.get("license")
  return f"licence {named}, as its card says" if named else unknown

"""Which checkpoint of a run a command uses, and the config that is stored with it."""

from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from dancegrpo_jax import buckets
from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.checkpoints.store import CheckpointError
from dancegrpo_jax.settings import named_objects, stored_config

BASE = "base"  # in the place of a checkpoint: the model before training


class Checkpoint(NamedTuple):
  """One checkpoint of a run.

  Attributes:
    name: as the user wrote it, for messages.
    folder: of the run's checkpoints.
    iteration: after which it was saved.
  """

  name: str
  folder: epath.Path
  iteration: int

  @property
  def workdir(self) -> epath.Path:
    """The folder of the run, which also holds its metrics where all of it is there."""
    return self.folder.parent

  @property
  def pinned(self) -> str:
    """A name that means this checkpoint when there are later ones, too."""
    place = self.name.rstrip("/")
    named = place.endswith((f"@{self.iteration}", f"/{self.iteration}"))
    return place if named else f"{place}@{self.iteration}"

  def meta(self) -> dict[str, Any]:
    """The JSON metadata, see `store.read_meta`."""
    return store.read_meta(self.folder, self.iteration)


def find(name: str) -> Checkpoint:
  """The checkpoint that a name on the command line means.

  Args:
    name: a workdir, its `checkpoints/` folder, each with `@ITERATION` behind it or not, or the
      folder of a single checkpoint, as runs/x/checkpoints/20. Without an iteration it is the latest
      one. A folder whose own name holds an "@" is found first.

  Raises:
    CheckpointError: one line: there is no such folder or iteration; it says which there are.
  """
  if not name:
    raise CheckpointError("the name of the checkpoint is empty; give a workdir, as runs/emoji_clip")
  buckets.require_path("the checkpoint", name, remote=True)
  place, text = name.rstrip("/") or name, None
  if "@" in place and not epath.Path(place).exists():
    place, _, text = place.rpartition("@")
  folder, iteration = _folder(epath.Path(place))
  if text is not None:
    if not (text.isascii() and text.isdecimal()):
      there = store.require_step(folder, iteration)
      raise CheckpointError(
        f"{name}: there is no such folder, and what follows the last @ is not the number of an"
        f" iteration; write it as {place}@{there}"
      )
    if iteration is not None and iteration != int(text):
      raise CheckpointError(
        f"{name}: the folder is the checkpoint of iteration {iteration}; leave out @{text}"
      )
    iteration = int(text)
  return Checkpoint(name, folder, store.require_step(folder, iteration))


def _folder(place: epath.Path) -> tuple[epath.Path, int | None]:
  """The folder of checkpoints that a path means, and the iteration where it names one."""
  if (place / "checkpoints").is_dir():
    return place / "checkpoints", None
  if store.steps(place) or not place.name.isdecimal() or not store.steps(place.parent):
    return place, None
  return place.parent, int(place.name)


def config_of(checkpoint: Checkpoint) -> ConfigDict:
  """The config of the run, as it was when the checkpoint was saved.

  What it names as "module:object" is searched where the run found it, too.

  Raises:
    ConfigError: a module that the config names is not found.
  """
  meta = checkpoint.meta()
  config = stored_config.completed(meta["config"])
  named_objects.require_found(config, meta.get("modules", []), checkpoint.name)
  return config

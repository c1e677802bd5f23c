"""The prompts of a run, and whether they are still those that the run began with."""

from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dancegrpo_jax import buckets
from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.data import prompts
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.types import Example

FIELDS = {"prompts": "prompts", "held_out": "held-out prompts"}  # of config.data, and their names


class RunPrompts(NamedTuple):
  """The prompts of a run.

  Attributes:
    examples: those that are trained on.
    held_out: those that are evaluated only.
    summaries: a line about each source.
    identity: digest and number of the prompts by field, as the metadata of a checkpoint has them.
  """

  examples: list[Example]
  held_out: list[Example]
  summaries: list[str]
  identity: dict[str, dict[str, Any]]


def read(config: ConfigDict) -> RunPrompts:
  """Reads data.prompts and data.held_out. ConfigError: as `prompts.read_field`."""
  found = {field: prompts.read_field(config, field) for field in FIELDS}
  return RunPrompts(
    examples=found["prompts"].examples,
    held_out=found["held_out"].examples,
    summaries=[f"{FIELDS[field]}: {each.summary}" for field, each in found.items() if each.summary],
    identity={
      f"data.{field}": {"digest": prompts.digest(each.examples), "count": len(each.examples)}
      for field, each in found.items()
    },
  )


def require_unchanged(config: ConfigDict, workdir: Path, identity: dict[str, dict]) -> None:
  """Compares the prompts with those that the run of a workdir began with.

  A workdir without a checkpoint, or one of a version that stored no digest, passes.

  Args:
    config: of the run that goes on.
    workdir: of the run.
    identity: of the prompts as they are now.

  Raises:
    ConfigError: they differ, although the source has the same name.
  """
  folder = store.folder_of(workdir)
  stored = {} if store.latest(folder) is None else store.read_meta(folder).get("prompts", {})
  changed = [
    f"config.{field} = {config.data[field.removeprefix('data.')]!r}"
    f" ({before['count']} prompts then, {identity[field]['count']} now)"
    for field, before in stored.items()
    if before["digest"] != identity[field]["digest"]
  ]
  if changed:
    raise ConfigError(
      f"{buckets.behind(workdir)} holds a run on other prompts: what {' and '.join(changed)} names"
      " has changed since it began; put back what was there, or use another --workdir"
    )

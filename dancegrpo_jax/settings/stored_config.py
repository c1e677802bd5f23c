"""How a config is stored with a run, and how two configs differ."""

import hashlib
import json
from collections.abc import Collection
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dancegrpo_jax import strict_json

# What a resumed run may change: where and how fast it computes, when it gives up, and what it
# writes, but never what it computes.
RESUMABLE = (
  "iterations",
  "mesh",
  "model.decode_batch",
  "rollout.chunk",
  "reward.slice",
  "reward.watch",
  "reward.failed_iterations",
  "optimizer.microbatch",
  "optimizer.microbatches_per_call",
  "logging",
  "checkpoint",
  "evaluation",
  "data.cache_embeddings",
  "data.cache_folder",
)
_ABSENT = "(absent)"


class Added(NamedTuple):
  """A field that was added after runs were stored without it.

  Attributes:
    version: the package version that introduced it.
    value: the value with which a run computes the same as before that version.
  """

  version: str
  value: Any


# Fields that the configs of earlier versions lack, with the value that they are taken to have.
ADDED = {
  "init_from": Added("0.2.0", ""),
  "model.matmul_precision": Added("0.2.0", "default"),
  "model.frames": Added("0.2.0", 1),
  "model.fps": Added("0.2.0", 8.0),
  "model.decode_tiling": Added("0.2.0", "time"),
  "model.decode_batch": Added("0.2.0", 0),
  "model.template": Added("0.2.0", "video"),
  "sampler.whole_times": Added("0.2.0", False),
  "logging.wandb_project": Added("0.2.0", "dancegrpo_jax"),
  "logging.wandb_entity": Added("0.2.0", ""),
  "logging.wandb_group": Added("0.2.0", ""),
  "logging.wandb_name": Added("0.2.0", ""),
  "logging.wandb_mode": Added("0.2.0", ""),
  "objective.kind": Added("0.2.0", "grpo"),
  "objective.dppo.tau": Added("0.2.0", 1e-4),
  "optimizer.microbatches_per_call": Added("0.2.0", 0),
  "reward.failed_iterations": Added("0.2.0", 3),
  "reward.slice": Added("0.2.0", 16),
  "reward.watch": Added("0.2.0", ()),
  "reward.moving_emoji.subjects": Added("0.2.0", "assets/emoji-video/subjects.png"),
  **{
    f"reward.{name}.frames": Added("0.2.0", "error")
    for name in ("clip", "hps", "pickscore", "aesthetic", "compressibility")
  },
}


class Difference(NamedTuple):
  """One field in which two configs differ; `str` makes the line to print."""

  field: str
  old: Any
  new: Any

  def __str__(self) -> str:
    return f"config.{self.field}: {self.old!r} -> {self.new!r}"


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
  """Values by dotted path, in the order of `config.items()`, which a ConfigDict sorts."""
  fields = {}
  for key, value in config.items():
    is_section = isinstance(value, (dict, ConfigDict))
    fields.update(flatten(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value})
  return fields


def tuples(value: Any) -> Any:
  """Turns lists at any depth into tuples: configs hold tuples only, and JSON has none."""
  if isinstance(value, dict):
    return {key: tuples(item) for key, item in value.items()}
  return tuple(tuples(item) for item in value) if isinstance(value, (tuple, list)) else value


def to_json(config: ConfigDict | dict) -> str:
  """JSON with sorted keys: equal configs have equal texts. Infinity is the text "inf"."""
  values = config.to_dict() if isinstance(config, ConfigDict) else config
  values = strict_json.finite(values, instead=str)
  return json.dumps(values, indent=2, sort_keys=True, allow_nan=False)


def from_json(text: str) -> ConfigDict:
  """The inverse of `to_json`: lists become tuples again. Infinity stays a text."""
  return ConfigDict(tuples(json.loads(text))).lock()


def digest(config: ConfigDict | dict) -> str:
  """16 hexadecimal digits that identify the config's values."""
  return hashlib.sha256(to_json(config).encode()).hexdigest()[:16]


def completed(stored: dict) -> ConfigDict:
  """A stored config as one that can be used: lists become tuples again, and a field of `ADDED` that
  it lacks has the value in that table.

  Args:
    stored: JSON values, as the metadata of a checkpoint has them.
  """
  config = ConfigDict(tuples(stored))
  present = flatten(config)
  for field, added in ADDED.items():
    if field not in present:
      *sections, name = field.split(".")
      section = config
      for part in sections:
        if part not in section:
          section[part] = ConfigDict()
        section = section[part]
      section[name] = added.value
  return config.lock()


def differences(old: dict, new: ConfigDict) -> tuple[list[Difference], list[Difference]]:
  """Fields in which a stored config and a new one differ.

  Args:
    old: the stored config, which may come straight from JSON: a list equals a tuple of the same
      values. A field of `ADDED` that it lacks has the value in that table.
    new: the config of the run that resumes.

  Returns:
    The differences that a resumed run may have, and those that it may not have.
  """
  before, after = tuples(flatten(old)), tuples(flatten(new))
  before = {field: added.value for field, added in ADDED.items() if field in after} | before
  allowed, refused = [], []
  for field in dict.fromkeys([*before, *after]):
    difference = Difference(field, before.get(field, _ABSENT), after.get(field, _ABSENT))
    if difference.old != difference.new:
      may_change = any(field == name or field.startswith(f"{name}.") for name in RESUMABLE)
      (allowed if may_change else refused).append(difference)
  return allowed, refused


def as_stored(
  old: dict, new: ConfigDict, given: Collection[str] = ()
) -> tuple[ConfigDict, list[str]]:
  """The config with which a run resumes that an earlier version of the package has stored.

  The config file may set a field that did not exist when the run began. The run keeps computing
  what it has computed so far, unless the user sets the field on the command line.

  Args:
    old: the stored config.
    new: the config as it was loaded.
    given: fields that were set on the command line.

  Returns:
    `new` with the values of `ADDED` for the fields that `old` lacks, and a line for the user about
    each value that this has changed.
  """
  before, after = flatten(old), flatten(new)
  changed = {
    field: added
    for field, added in ADDED.items()
    if field in after and field not in before and field not in given
    if after[field] != added.value
  }
  with (config := new.copy_and_resolve_references()).unlocked():
    for field, added in changed.items():
      *sections, name = field.split(".")
      section = config
      for part in sections:
        section = section[part]
      section[name] = added.value
  lines = [
    f"config.{field} = {added.value!r}: the run is older than this field (version"
    f" {added.version}) and goes on as it began; the config file has {after[field]!r}"
    for field, added in changed.items()
  ]
  return config.lock(), lines

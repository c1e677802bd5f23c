"""A config as it is stored with a run, and how two configs differ."""

import hashlib
import json
from collections.abc import Collection
from typing import Any, NamedTuple

from ml_collections import ConfigDict

# What a resumed run may change: where and how fast it computes and what it writes, never what it
# computes (design, section 6).
RESUMABLE = (
  "iterations",
  "mesh",
  "rollout.chunk",
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
    version: of the package that introduced it.
    value: the one under which a run computes what it computed before.
  """

  version: str
  value: Any


# A field that a stored config lacks counts as this value.
ADDED = {
  "model.matmul_precision": Added("0.2.0", "default"),
  "objective.kind": Added("0.2.0", "grpo"),
  "objective.dppo.tau": Added("0.2.0", 1e-4),
  "optimizer.microbatches_per_call": Added("0.2.0", 0),
}


class Difference(NamedTuple):
  """One field in which two configs differ; str() is the line to print."""

  field: str
  old: Any
  new: Any

  def __str__(self) -> str:
    return f"config.{self.field}: {self.old!r} -> {self.new!r}"


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
  """Dotted path -> value, in the order of `config.items()` (ConfigDict sorts it)."""
  fields = {}
  for key, value in config.items():
    is_section = isinstance(value, (dict, ConfigDict))
    fields.update(flatten(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value})
  return fields


def tuples(value: Any) -> Any:
  """Lists, at any depth, as tuples: JSON has no tuples, and configs hold nothing else."""
  if isinstance(value, dict):
    return {key: tuples(item) for key, item in value.items()}
  return tuple(tuples(item) for item in value) if isinstance(value, (tuple, list)) else value


def to_json(config: ConfigDict | dict) -> str:
  """JSON text with sorted keys: the same config is the same text."""
  values = config.to_dict() if isinstance(config, ConfigDict) else config
  return json.dumps(values, indent=2, sort_keys=True)


def from_json(text: str) -> ConfigDict:
  """The inverse of `to_json`: lists become tuples again."""
  return ConfigDict(tuples(json.loads(text))).lock()


def digest(config: ConfigDict | dict) -> str:
  """16 hexadecimal digits that name the config's values."""
  return hashlib.sha256(to_json(config).encode()).hexdigest()[:16]


def differences(old: dict, new: ConfigDict) -> tuple[list[Difference], list[Difference]]:
  """Fields in which a stored config and a new one differ: those that a resumed run may change, and
  those it may not.

  A tuple equals a list of the same values, so `old` may come straight from JSON. A field of `ADDED`
  that `old` lacks counts as its value there.
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
  """The config with which a run that was stored by an earlier version goes on.

  A config file may have changed together with a field that is new to the run. The run keeps what
  it has computed so far, unless the user has set the field.

  Args:
    old: the stored config.
    new: the config as it was read.
    given: fields that were set on the command line.

  Returns:
    (`new` with the values of `ADDED` where the stored config lacks the field; a line for the user
    about each value that changed).
  """
  before, after = flatten(old), flatten(new)
  changed = {
    field: added
    for field, added in ADDED.items()
    if field in after and field not in before and field not in given
    if after[field] != added.value
  }
  with (kept := new.copy_and_resolve_references()).unlocked():
    for field, added in changed.items():
      section, _, name = field.rpartition(".")
      place = kept
      for part in section.split("."):
        place = place[part]
      place[name] = added.value
  lines = [
    f"config.{field} = {added.value!r}: the run is older than this field (version"
    f" {added.version}) and goes on as it began; the config says {after[field]!r}"
    for field, added in changed.items()
  ]
  return kept.lock(), lines

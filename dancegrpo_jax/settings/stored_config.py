"""A config as it is stored with a run, and how two configs differ."""

import hashlib
import json
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

  A tuple equals a list of the same values, so `old` may come straight from JSON.
  """
  before, after = tuples(flatten(old)), tuples(flatten(new))
  allowed, refused = [], []
  for field in dict.fromkeys([*before, *after]):
    difference = Difference(field, before.get(field, _ABSENT), after.get(field, _ABSENT))
    if difference.old != difference.new:
      may_change = any(field == name or field.startswith(f"{name}.") for name in RESUMABLE)
      (allowed if may_change else refused).append(difference)
  return allowed, refused

"""Builds a linen module from a published config.json."""

import dataclasses
from typing import Any

import flax.linen as nn

# Keys that describe the file and not the network.
_NOT_ARCHITECTURE = {
  "_class_name",
  "_diffusers_version",
  "_name_or_path",
  "sample_size",
  "force_upcast",
  "upcast_attention",
}


def _hashable(value: Any) -> Any:
  return tuple(_hashable(v) for v in value) if isinstance(value, list) else value


def from_config(
  network: type[nn.Module], config_json: dict, neutral: dict[str, Any], **extra: Any
) -> nn.Module:
  """Builds `network` from its config.json.

  Args:
    network: a linen class whose fields have the names of the JSON's keys.
    config_json: the parsed file.
    neutral: keys that the network does not implement, each with the one value that changes nothing.
    extra: fields that are not in the file, for example dtype and remat.

  Raises:
    ValueError: the network does not implement the values of some keys. The message names them.
  """
  fields = {field.name for field in dataclasses.fields(network)} - {"parent", "name"}
  known, wrong = {}, []
  for key, value in config_json.items():
    if value is None or key in _NOT_ARCHITECTURE:
      continue
    if key in fields:
      known[key] = _hashable(value)
    elif key not in neutral:
      wrong.append(f"{key}={value!r} (unknown key)")
    elif value != neutral[key]:
      wrong.append(f"{key}={value!r} (implemented: {neutral[key]!r})")
  if wrong:
    raise ValueError(
      f"{network.__name__}: this checkpoint's config.json has values that are not implemented:"
      f" {'; '.join(wrong)}"
    )
  return network(**known, **extra)

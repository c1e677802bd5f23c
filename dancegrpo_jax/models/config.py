"""From a published config.json to the fields of a linen module."""

import dataclasses
from typing import Any

import flax.linen as nn

# Keys that describe the file, not the network.
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
    network: linen class whose fields carry the JSON's key names.
    config_json: the parsed file.
    neutral: keys that the network does not implement, with the one value under which they change
      nothing.
    extra: fields that are not in the file (dtype, remat ...).

  Raises:
    ValueError: a key has a value that the network does not implement; all of them are named.
  """
  fields = {f.name for f in dataclasses.fields(network)} - {"parent", "name"}
  wrong = [
    f"{key}={value!r} (implemented: {neutral[key]!r})"
    if key in neutral
    else f"{key}={value!r} (unknown key)"
    for key, value in config_json.items()
    if key not in fields
    and key not in _NOT_ARCHITECTURE
    and value is not None
    and (key not in neutral or value != neutral[key])
  ]
  if wrong:
    raise ValueError(
      f"{network.__name__}: this checkpoint's config.json asks for what is not implemented:"
      f" {'; '.join(wrong)}"
    )
  known = {
    key: _hashable(value)
    for key, value in config_json.items()
    if key in fields and value is not None
  }
  return network(**known, **extra)

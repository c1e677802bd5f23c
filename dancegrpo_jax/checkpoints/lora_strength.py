"""How strongly the adapters of a LoRA file count: the factor of the product B A of each layer.

It is alpha / rank. The rank is that of the layer's own tensors. alpha is taken from the first of
these places that there is:

1. the layer's own `.alpha` tensor, as kohya's and ComfyUI's files have it;
2. the metadata in the file's header, as diffusers write it;
3. `adapter_config.json` beside the file, as peft writes it;
4. `lora_config.json` beside the file, as DanceGRPO's own trainer writes it.

Where there is none, alpha is the rank, so that the product counts as it is.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from dancegrpo_jax.checkpoints.safetensors_io import metadata
from dancegrpo_jax.errors import ConversionError

_METADATA = "lora_adapter_metadata"  # diffusers' key
_PEFTS_ALPHA = 8  # of a peft configuration that does not name it
_NOT_IMPLEMENTED = ("use_dora", "lora_bias")  # peft's settings


class Settings(NamedTuple):
  """The settings that adapters were made with.

  Attributes:
    values: by peft's names; {} where they aren't known.
    source: where they are from, for messages; "" where they aren't known.
  """

  values: dict[str, Any]
  source: str


def settings_of(file: Path, prefix: str) -> Settings:
  """The settings in a file's header, or in a file beside it.

  Args:
    file: the weight file.
    prefix: what the adapted network is called in the header.

  Raises:
    ConversionError: they can't be read, or ask for what is not implemented.
  """
  settings = _in_header(file, prefix) or _of_peft(file) or _of_dancegrpo(file) or Settings({}, "")
  refused = [key for key in _NOT_IMPLEMENTED if settings.values.get(key)]
  kind = str(settings.values.get("peft_type") or "LORA")
  if kind.rpartition(".")[2] != "LORA":
    refused.append(kind)
  if refused:
    raise ConversionError(
      f"it was made with {', '.join(refused)} ({settings.source}), which is not implemented"
    )
  return settings


def _in_header(file: Path, prefix: str) -> Settings | None:
  text = metadata(file).get(_METADATA)
  if text is None:
    return None
  source = f"{_METADATA} in its header"
  values = _parsed(text, source)
  own = {key.removeprefix(f"{prefix}."): value for key, value in values.items()}
  own = {key: value for key, value in own.items() if "." not in key}  # not of a text encoder
  return Settings({"lora_alpha": _PEFTS_ALPHA} | own, source) if own else None


def _of_peft(file: Path) -> Settings | None:
  path = file.parent / "adapter_config.json"
  if not path.is_file():
    return None
  return Settings({"lora_alpha": _PEFTS_ALPHA} | _parsed(path.read_text(), path.name), path.name)


def _of_dancegrpo(file: Path) -> Settings | None:
  path = file.parent / "lora_config.json"
  if not path.is_file():
    return None
  values = _parsed(path.read_text(), path.name)
  return Settings(values.get("lora_params") or values, path.name)


def _parsed(text: str, source: str) -> dict[str, Any]:
  try:
    values = json.loads(text)
  except ValueError as error:
    raise ConversionError(f"{source} is not valid JSON ({error})") from error
  if not isinstance(values, dict):
    raise ConversionError(f"{source} holds no JSON object")
  return values


def scale_of(settings: Settings, alpha: float | None, layer: str, rank: int) -> float:
  """The factor of the product B A of a layer.

  Args:
    settings: that the adapters were made with.
    alpha: of the layer's own tensor, or None.
    layer: its name, without prefixes.
    rank: of the layer's tensors.

  Raises:
    ConversionError: alpha is no finite number, or a pattern of the settings can't be read.
  """
  values, source = settings.values, settings.source
  if alpha is not None:
    values, source = {"lora_alpha": alpha}, f"the .alpha tensor of {layer}"
  patterns = values.get("alpha_pattern") or {}
  try:
    if not isinstance(patterns, dict):
      raise ValueError(f"it is {patterns!r}")
    alpha = _matching(patterns, layer, values.get("lora_alpha", rank))
  except (re.error, ValueError) as error:
    raise ConversionError(
      f"{source} has an alpha_pattern that can't be read ({error}); expected names of layers, each"
      " with its alpha"
    ) from error
  if not isinstance(alpha, int | float) or not math.isfinite(alpha):
    raise ConversionError(f"{source} says alpha = {alpha!r}, which is no finite number")
  return alpha / (rank**0.5 if values.get("use_rslora") else rank)


def _matching(patterns: dict[str, Any], layer: str, default: Any) -> Any:
  """The value of the first pattern that is the layer's name or the end of it, as in peft."""
  for pattern, value in patterns.items():
    if re.match(rf"(.*\.)?({pattern})$", layer):
      return value
  return default

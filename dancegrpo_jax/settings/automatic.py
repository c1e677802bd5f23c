"""Sizes of batches that the package chooses: fields that are "auto", or "auto:N" for at most N.

`resolved` puts numbers in the place of these words: the largest that divide what they must divide
(see `checks.batches`), within the limits below. Whether a batch fits into a device's memory is for
the caller to say, who knows the networks (compilation/automatic.py).
"""

import re
from collections.abc import Callable, Mapping
from math import gcd, prod
from typing import Any

from ml_collections import ConfigDict

from dancegrpo_jax.devices.sharding import axis_sizes
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.settings import geometry

LANES = 8  # at most, where there are not more devices
ROWS = 256  # of a chunk and of a microbatch on each device, at most
FIELDS = ("mesh.lanes", "rollout.chunk", "optimizer.microbatch")  # in the order of the choice
FORM = "write a whole number, auto, or auto:N for at most N"
_AUTO = re.compile(r"auto(?::([1-9]\d*))?")

# (config with numbers, field, sizes that divide, the smallest first) -> the largest that fits
Fit = Callable[[ConfigDict, str, list[int]], int]


def parse(text: str) -> int | str:
  """The value of one of `FIELDS` on a command line. ValueError where it is none."""
  return text if _AUTO.fullmatch(text) else int(text)


def is_auto(value: Any) -> bool:
  """Whether a value leaves the choice to the package."""
  return isinstance(value, str) and _AUTO.fullmatch(value) is not None


def asked(config: ConfigDict) -> list[str]:
  """Those of `FIELDS` that this config leaves to the package."""
  return [field for field in FIELDS if is_auto(_get(config, field))]


def resolved(
  config: ConfigDict, num_devices: int, fit: Fit | None = None, stored: int | None = None
) -> ConfigDict:
  """The config with numbers for the fields that are "auto".

  Args:
    config: not validated yet. Where other fields make a choice impossible, small numbers are taken:
      the checks that follow have a message about those fields.
    num_devices: devices of the run.
    fit: which of the sizes of a chunk or a microbatch fits; None for the largest.
    stored: mesh.lanes of the run that goes on, None for a new one. Results depend on the number of
      lanes, so that it stays.

  Raises:
    ConfigError: no size divides what it must divide; one line.
  """
  fields = asked(config)
  if not fields:
    return config
  if "mesh.lanes" in fields:
    config = replaced(config, {"mesh.lanes": stored or _lanes(config, num_devices)})
  kept = "mesh.lanes" in fields and stored is not None
  remedy = (
    "this run began with so many; name another --workdir" if kept else "use mesh.lanes = auto"
  )
  sizes = {
    field: _sizes(config, field, num_devices, remedy) for field in fields if field != "mesh.lanes"
  }
  config = replaced(config, {field: each[0] for field, each in sizes.items()})
  # One after the other: the memory that a chunk leaves doesn't depend on the microbatch.
  chosen = {field: fit(config, field, each) if fit else each[-1] for field, each in sizes.items()}
  return replaced(config, chosen)


def described(before: ConfigDict, after: ConfigDict) -> str:
  """What was chosen, as "rollout.chunk = 60 (auto)"."""
  return ", ".join(f"{field} = {_get(after, field)} (auto)" for field in asked(before))


def _lanes(config: ConfigDict, num_devices: int) -> int:
  """The largest number of lanes that the batches divide by, and that the devices share."""
  batches, shards = _batches(config), _shards(config, num_devices)
  if batches is None:
    return LANES
  most = _limit(config, "mesh.lanes", max(LANES, shards))
  common = gcd(batches.samples, batches.trained_samples)
  if batches.transitions % batches.updates == 0:
    common = gcd(common, batches.transitions_per_update)
  sizes = [size for size in _divisors(common) if size % shards == 0 and size <= most]
  if sizes:
    return sizes[-1]
  counted = f"{batches.prompts} prompts x {batches.group} samples"
  fewer = [size for size in _divisors(common) if size <= min(num_devices, most)]
  raise _impossible(
    config,
    "mesh.lanes",
    f"must be a multiple of data x fsdp = {shards} and divide {common} ({counted}, and the"
    f" transitions of an optimizer step); use other numbers of prompts or samples, or"
    f" {fewer[-1]} devices",
  )


def _sizes(config: ConfigDict, field: str, num_devices: int, other_lanes: str) -> list[int]:
  """The sizes of a chunk or a microbatch that divide what they must, the smallest first.

  Args:
    config, num_devices: as for `resolved`.
    field: the chunk or the microbatch.
    other_lanes: how the user gets another number of lanes, for a message.
  """
  lanes, batches, shards = config.mesh.lanes, _batches(config), _shards(config, num_devices)
  if batches is None or not isinstance(lanes, int) or lanes < 1:
    return [1]
  total, what = batches.samples, f"samples ({batches.prompts} prompts x {batches.group})"
  if field == "optimizer.microbatch":
    if batches.transitions % batches.updates or batches.trained_samples % lanes:
      return [lanes]  # the checks name updates_per_iteration or the lanes
    total, what = batches.transitions_per_update, "transitions of an optimizer step"
  sizes = [size for size in _divisors(total) if size % lanes == 0]
  if not sizes:
    must = f"the {total} {what} must be a multiple of mesh.lanes = {lanes}"
    raise _impossible(config, field, f"{must}; {other_lanes}")
  most = _limit(config, field, max(ROWS * shards, lanes))
  small = [size for size in sizes if size <= most]
  if not small:
    least = f"the smallest multiple of mesh.lanes = {lanes} that divides the {total} {what} is"
    raise _impossible(config, field, f"{least} {sizes[0]}; use auto:{sizes[0]} or a smaller lanes")
  return small


def _batches(config: ConfigDict) -> geometry.Geometry | None:
  """The batches of an iteration; None where their fields don't allow any."""
  try:
    batches = geometry.of(config)
  except (ValueError, ZeroDivisionError, AttributeError, KeyError, TypeError):
    return None
  counts = (batches.prompts, batches.group, batches.trained_samples, batches.trained_steps)
  return batches if min(*counts, batches.updates) >= 1 else None


def _shards(config: ConfigDict, num_devices: int) -> int:
  """Devices that split the samples; 1 where config.mesh doesn't fit them, which the checks find."""
  try:
    return prod(axis_sizes(config.mesh, num_devices)[:2])
  except ConfigError:
    return 1


def _limit(config: ConfigDict, field: str, otherwise: int) -> int:
  """N of "auto:N", or `otherwise`."""
  found = _AUTO.fullmatch(_get(config, field))
  return int(found[1]) if found and found[1] else otherwise


def _divisors(number: int) -> list[int]:
  return [size for size in range(1, number + 1) if number % size == 0]


def _impossible(config: ConfigDict, field: str, reason: str) -> ConfigError:
  return ConfigError(f"config.{field} = {_get(config, field)!r}: no size works: {reason}")


def _get(config: ConfigDict, field: str) -> Any:
  section, name = field.split(".")
  return config.get(section, {}).get(name)


def replaced(config: ConfigDict, values: Mapping[str, int]) -> ConfigDict:
  """A copy of the config with other values, of whatever type the fields have had."""
  copy = config.copy_and_resolve_references()
  with copy.unlocked(), copy.ignore_type():
    for field, value in values.items():
      section, name = field.split(".")
      copy[section][name] = value
  return copy.lock()

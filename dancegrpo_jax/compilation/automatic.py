"""Sizes of batches that are "auto": the largest that divide (settings/automatic.py) and fit.

What fits is an estimate (compilation/estimate.py), because compiling takes minutes. It is made
where the memory of a device is known, which is so for GPUs and TPUs.
"""

import bisect
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import jax
from ml_collections import ConfigDict

from dancegrpo_jax.compilation import estimate, inventory
from dancegrpo_jax.devices import chips, processes, sharding
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.report.progress import phase
from dancegrpo_jax.settings import automatic, checks, stored_config

# The programs whose batches a field gives the size of, by the first words of their names.
_PROGRAMS = {
  "rollout.chunk": ("rollout", "decode", "score"),
  "optimizer.microbatch": ("update accumulate", "update remember"),
}


def resolved(
  config: ConfigDict,
  devices: Sequence[Any],
  say: Callable[[str], Any] = print,
  stored: int | None = None,
  memory: float | None = None,
) -> ConfigDict:
  """The config with numbers in place of "auto"; the config itself where nothing is "auto".

  All processes of a run must call it at the same point.

  Args:
    config: not validated yet. Where it has a mistake, small numbers are taken: the checks that
      follow find the mistake.
    devices: of the run.
    say: gets a line about what was chosen.
    stored: as for `settings.automatic.resolved`.
    memory: bytes of a device; None for what is known of it.

  Raises:
    ConfigError: no size divides what it must divide.
  """
  if not automatic.asked(config):
    return config
  memory = chips.chip_of(devices[0]).memory if memory is None else memory
  limit = f"at most {automatic.ROWS} rows on a device, whose memory isn't known"
  fit = None
  if memory:
    limit = f"what fits into {memory / 2**30:.1f} GiB by an estimate"

    def fit(config: ConfigDict, field: str, sizes: list[int]) -> int:
      with phase(f"estimating how large {field} may be"):
        return _largest(config, devices, field, sizes, memory)

  try:
    result = automatic.resolved(config, len(devices), fit, stored)
  except _UnknownError as error:
    result = automatic.resolved(config, len(devices), lambda *given: given[-1][0], stored)
    limit = f"the smallest, because the networks aren't known yet: {error}"
  processes.require_same(
    stored_config.digest(result),
    problem="the processes have chosen different sizes for what is auto",
    remedy="give rollout.chunk and optimizer.microbatch as numbers",
  )
  say(f"{automatic.described(config, result)}: the largest that divide, {limit}")
  return result


class _UnknownError(Exception):
  """The JSON files of a checkpoint are not here."""


def _largest(
  config: ConfigDict, devices: Sequence[Any], field: str, sizes: list[int], memory: float
) -> int:
  """The largest size with which the programs fit by the estimate; the smallest if none does.

  Args:
    config: with the smallest sizes.
    devices: of the run.
    field: of the size.
    sizes: to choose from, the smallest first.
    memory: bytes of a device.
  """
  if checks.problems(config, num_devices=len(devices)):
    return sizes[0]
  try:
    config = inventory.without_weights(config)
  except ConfigError as error:
    raise _UnknownError(str(error)) from error

  def exceeds(size: int) -> bool:
    return _needed(automatic.replaced(config, {field: size}), devices, field) > memory

  return sizes[max(0, bisect.bisect_left(sizes, True, key=exceeds) - 1)]


def _needed(config: ConfigDict, devices: Sequence[Any], field: str) -> float:
  """Bytes of the largest program whose batches have the size of a field, by the estimate."""
  mesh = sharding.make_mesh(config.mesh, devices)
  shards = prod(sharding.axis_sizes(config.mesh, len(devices))[:2])
  # The number of prompts counts for little: statistics of each, and the held-out ones.
  taken = inventory.take(config, mesh, config.data.prompts_per_iteration, 0)
  with jax.set_mesh(mesh):
    calls = [call for call in taken.calls if call.name.startswith(_PROGRAMS[field])]
    return max(estimate.needed(taken, call, shards) for call in calls)

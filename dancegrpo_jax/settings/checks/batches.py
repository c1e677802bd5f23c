"""The sizes of batches, which must divide each other."""

from collections.abc import Iterator
from math import prod

from ml_collections import ConfigDict

from dancegrpo_jax import errors
from dancegrpo_jax.devices.sharding import axis_sizes
from dancegrpo_jax.settings import geometry
from dancegrpo_jax.settings.checks.values import problem
from dancegrpo_jax.settings.geometry import Geometry

# The fields from which the sizes follow.
_FIELDS = {
  "data.prompts_per_iteration",
  "rollout.samples_per_prompt",
  "rollout.chunk",
  "advantage.best_of",
  "mesh.lanes",
  "sampler.steps",
  "sampler.last_step",
  "sampler.window.size",
  "objective.timesteps",
  "objective.timestep_fraction",
  "optimizer.updates_per_iteration",
  "optimizer.microbatch",
}


def prompts(config: ConfigDict, num_examples: int | None) -> Iterator[str]:
  """Whether the file has as many prompts as an iteration takes; None where it was not read."""
  count = config.data.prompts_per_iteration
  if num_examples is not None and count > num_examples:
    remedy = f"{config.data.prompts} has {num_examples} prompts; use at most {num_examples}"
    yield problem("data.prompts_per_iteration", count, remedy)


def sizes(config: ConfigDict, num_devices: int, wrong: set[str]) -> Iterator[str]:
  """Whether samples fill chunks, transitions fill microbatches, and both fill the devices' lanes.

  Args:
    config: the whole config.
    num_devices: devices of the run.
    wrong: fields that other messages are about. A size that follows from one of them is not
      checked, because the message's remedy would follow from it too.
  """
  lanes, shards = config.mesh.lanes, 1
  try:
    shards = prod(axis_sizes(config.mesh, num_devices)[:2])
  except errors.ConfigError as error:
    yield str(error)
  if wrong & _FIELDS:
    return
  if lanes % shards:
    remedy = f"must be a multiple of data x fsdp = {shards}; use {shards} or {shards * 2}"
    yield problem("mesh.lanes", lanes, remedy)
  batches = geometry.of(config)
  samples, chunk = batches.samples, batches.chunk
  if samples % chunk or chunk % lanes:
    counted = f"({batches.prompts} prompts x {batches.group})"
    must = f"must divide the {samples} samples of an iteration {counted}"
    remedy = f"{must} and be a multiple of mesh.lanes = {lanes}"
    yield problem("rollout.chunk", chunk, f"{remedy}; {_divisors(samples, lanes, chunk)}")
  yield from _transitions(batches, lanes)


def _transitions(batches: Geometry, lanes: int) -> Iterator[str]:
  """Whether trained samples fill lanes, and transitions fill optimizer steps and microbatches with
  equally many of each lane.
  """
  trained, total, updates = batches.trained_samples, batches.transitions, batches.updates
  if trained % lanes:
    must = f"the {trained} trained samples of an iteration must divide by it"
    remedy = f"{must}; use a divisor of {trained}, or change data.prompts_per_iteration"
    yield problem("mesh.lanes", lanes, remedy)
    return
  counted = f"({trained} samples x {batches.trained_steps} steps)"
  must = f"must divide the {total} trained transitions {counted}"
  each, microbatch = batches.transitions_per_update, batches.microbatch
  if total % updates or each % lanes:
    values = [count for count in range(1, total + 1) if total % (count * lanes) == 0]
    remedy = f"{must} in multiples of mesh.lanes = {lanes}; use {_nearest(values, updates)}"
    yield problem("optimizer.updates_per_iteration", updates, remedy)
  elif each % microbatch or microbatch % lanes:
    remedy = f"{must} / {updates} updates = {each} and be a multiple of mesh.lanes = {lanes}"
    use = _divisors(each, lanes, microbatch)
    yield problem("optimizer.microbatch", microbatch, f"{remedy}; {use}")


def _divisors(total: int, multiple: int, value: int) -> str:
  """The remedy: divisors of `total` near `value` that are multiples of `multiple`."""
  divisors = [count for count in range(multiple, total + 1, multiple) if total % count == 0]
  if not divisors:
    return f"no value works, because {total} is not a multiple of {multiple}"
  return f"use {_nearest(divisors, value)}"


def _nearest(values: list[int], value: int) -> str:
  """The four of `values` that are nearest to `value`, as text."""
  *others, last = sorted(sorted(values, key=lambda other: abs(other - value))[:4])
  return f"{', '.join(map(str, others))} or {last}" if others else str(last)

"""The line that says what a run is about to do."""

from math import prod
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from dancegrpo_jax import buckets
from dancegrpo_jax.assembly.loading import Model
from dancegrpo_jax.settings import geometry
from dancegrpo_jax.types import PyTree


def of_run(
  config: ConfigDict,
  workdir: Path,
  outline: Model,
  mesh: jax.sharding.Mesh,
  prompts: int,
  first: int,
) -> str:
  """Devices, parameters, samples, prompts, workdir, and whether the run is new or goes on.

  Args:
    config: validated.
    workdir: of the run.
    outline: of `loading.outline`.
    mesh: the devices.
    prompts: number of the prompts that are trained on.
    first: number of iterations that are done already.
  """
  batches, trained = geometry.of(config), count(outline.trainable)
  whole = trained + count(outline.frozen)
  begun = f"a new run of {config.iterations} iterations"
  if first:
    begun = f"resuming at iteration {first + 1} of {config.iterations}"
  return (
    f"{buckets.behind(workdir)}: {begun} on {devices(mesh.devices.flat)};"
    f" {number(trained)} of {number(whole)} parameters are trained; {batches.prompts} of"
    f" {prompts} prompts x {batches.group} samples = {batches.samples} samples an iteration"
  )


def devices(found: Any) -> str:
  """The devices as text, as "8 devices (NVIDIA H100)"."""
  found = list(found)
  noun = "device" if len(found) == 1 else "devices"
  return f"{len(found)} {noun} ({found[0].device_kind})"


def count(tree: PyTree) -> int:
  """The number of parameters."""
  return sum(prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def number(value: int) -> str:
  """A large number as text, as "1.23 M"."""
  for unit, scale in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
    if value >= scale:
      return f"{value / scale:.3g} {unit}"
  return str(value)

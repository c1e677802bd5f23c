"""How much of a device's memory each program takes: the compiler's number, or an estimate."""

from collections.abc import Iterator
from math import prod
from typing import Any

import jax
from ml_collections import ConfigDict

from dancegrpo_jax.compilation import ahead, estimate, inventory
from dancegrpo_jax.compilation.inventory import Inventory
from dancegrpo_jax.devices import chips, out_of_memory, sharding
from dancegrpo_jax.dry_run.findings import NOTE, OK, PROBLEM, Finding
from dancegrpo_jax.report.progress import phase

# Operations in the programs of a run, above which they are not compiled.
OPERATIONS = 30_000
GIB = 2**30


def rows(config: ConfigDict, taken: Inventory, mesh: jax.sharding.Mesh) -> Iterator[Finding]:
  """A row for each program, and one for the attention kernels.

  Args:
    config: validated.
    taken: all programs of the run.
    mesh: the devices.
  """
  shards = prod(sharding.axis_sizes(config.mesh, mesh.size)[:2])
  memory = chips.chip_of(mesh.local_devices[0]).memory
  with jax.set_mesh(mesh):
    with phase("tracing the programs"):
      traced = {call.name: call.program.trace(*call.arguments).jaxpr for call in taken.calls}
      found = set().union(*(estimate.kernels(each.jaxpr) for each in traced.values()))
      count = sum(estimate.operations(each.jaxpr) for each in traced.values())
    kernels = ", ".join(sorted(found)) or "xla"
    yield Finding(
      "attention", OK, f"{kernels} (config.model.attention = {config.model.attention!r})"
    )
    compiled = count <= OPERATIONS
    how = "as compiled for these devices"
    if not compiled:
      how = "an estimate from the traced programs; `plan` compiles them"
    yield Finding("memory", NOTE, f"GiB on a device while a program runs, {how}")
    needs = _compiled(taken, mesh) if compiled else {}
    for call in taken.calls:
      if not compiled:
        needs[call.name] = estimate.needed(taken, call, shards)
      yield _row(call.name, needs[call.name], memory, compiled)


def _row(name: str, need: float | int, memory: float, compiled: bool) -> Finding:
  text = f"{name}: {need / GIB:.3f}"
  if not memory:  # of a CPU, which shares that of the machine with everything else
    free = ahead.free_memory()
    short = f"; the machine has {free / GIB:.1f} free; use {out_of_memory.remedy(name)}"
    return Finding("memory", NOTE, text + short) if need > free else Finding("memory", OK, text)
  text += f" of {memory / GIB:.2f}"
  if need <= memory:
    return Finding("memory", OK, text)
  # An estimate is no reason to refuse a run.
  mark = PROBLEM if compiled else NOTE
  return Finding("memory", mark, f"{text}; use {out_of_memory.remedy(name)}")


def _compiled(taken: Inventory, mesh: jax.sharding.Mesh) -> dict[str, float | int]:
  """Bytes that each program takes with all that stays in memory meanwhile."""
  needs: dict[str, float | int] = {}
  with ahead.compilers() as pool:
    programs: dict[str, Any] = ahead.wait(ahead.start(taken.calls, mesh, pool))
  for call in taken.calls:
    allotted = estimate.allotted(programs[call.name].memory_analysis())
    needs[call.name] = inventory.kept_bytes(taken, call) + allotted
  return needs


def state_bytes(taken: Inventory) -> int:
  """Bytes of a checkpoint: weights, optimizer and average, whole."""
  kept = [taken.kept[name] for name in ("trained weights", "optimizer", "average")]
  return sum(prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))

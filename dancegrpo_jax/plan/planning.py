"""Compiles every program of a run and collects what the compiler says about each: memory,
computation and communication.

Nothing runs. The numbers are the compiler's, and the time is an estimate (see `row_of`).
"""

import importlib.metadata
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from dancegrpo_jax.assembly import loading
from dancegrpo_jax.compilation.calls import Call
from dancegrpo_jax.data import prompts
from dancegrpo_jax.devices import accelerator, chips, out_of_memory, sharding
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.plan import flops, hlo, inventory, table, topologies
from dancegrpo_jax.plan.flops import Flops
from dancegrpo_jax.settings import checks, geometry, stored_config
from dancegrpo_jax.settings.geometry import Geometry

KERNEL_SHARE = (
  0.5  # of the peak that a Pallas kernel is taken to reach: the compiler expects nothing of it
)


def devices_of(topology: str) -> list:
  """The devices to plan for. ConfigError as `topologies.devices`."""
  if not topology:
    return jax.devices()
  # The compiler is here to compile: no TPU or GPU is looked for.
  jax.config.update("jax_platforms", "cpu")
  return topologies.devices(topology)


def compile_call(
  call: Call,
  kept: int,
  counted: Flops,
  chip: chips.Chip,
  count: int,
  folder: str = "",
  effort: float = 0.0,
) -> table.Row:
  """A program's row.

  Args:
    call: of the inventory.
    kept: bytes of a device's memory that are taken beside its arguments.
    counted: of `flops.count`.
    chip: what a device offers.
    count: devices.
    folder: for the program's text, "" for none.
    effort: XLA's exec_time_optimization_effort; 0 is what a run is compiled with.
  """
  start = time.time()
  traced = call.program.trace(*call.arguments)
  try:
    compiled = traced.lower().compile({"exec_time_optimization_effort": effort} if effort else None)
  except jax.errors.JaxRuntimeError as error:
    if effort and "No such compile option" in str(error):  # seen with JAX 0.11.2, for CPUs
      remedy = f"the compiler of JAX {jax.__version__} has no such option; use --effort=0"
      raise ConfigError(f"--effort={effort:g}: {remedy}") from error
    shortage = out_of_memory.shortage(error)
    if shortage is None:
      raise
    return table.Row(
      name=call.name,
      times=call.times,
      peak=(shortage.requested or float("inf")) + kept,
      flops=counted.total,
      compile_seconds=time.time() - start,
      problem=shortage.message,
    )
  took = time.time() - start
  text = compiled.as_text()
  if folder:
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{call.name.replace(' ', '_')}.txt").write_text(text)
  kernels = flops.count(traced.jaxpr, "tpu", call.turns).kernels
  row = row_of(call, kept, counted, kernels, chip, count, text, compiled.memory_analysis())
  if effort:  # not a run's times: with -1 several times as long
    row = row._replace(compute_seconds=None, network_seconds=None, mfu=None)
  return row._replace(compile_seconds=took)


def row_of(
  call: Call,
  kept: int,
  counted: Flops,
  kernels: float,
  chip: chips.Chip,
  count: int,
  text: str,
  memory: Any,
) -> table.Row:
  """A compiled program's row, but for the time that it took to compile.

  The time is the compiler's cycles over the clock, and what goes over the network at its full rate,
  as if neither overlapped. Of Pallas kernels the compiler states no cycles: they are taken to reach
  `KERNEL_SHARE` of the peak.

  Args:
    call, kept, counted, chip, count: as `compile_call`.
    kernels: FLOPs inside Pallas kernels, recomputed ones too.
    text: of the compiled program.
    memory: its `memory_analysis()`.
  """
  summary = hlo.summary(text, call.turns)
  added = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
  peak = kept + memory.argument_size_in_bytes + added + memory.generated_code_size_in_bytes
  moved = sum(collective.moved for collective in summary.collectives)
  compute = network = mfu = None
  if chip.clock:
    compute = summary.cycles / chip.clock + kernels / count / (KERNEL_SHARE * chip.flops)
    network = moved / chip.network
    total = compute + network
    mfu = counted.total / count / chip.flops / total if total else None
  uncounted = sorted(counted.unknown) + (["loops of unknown length"] if summary.unknown else [])
  return table.Row(
    name=call.name,
    times=call.times,
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    peak=peak,
    flops=counted.total,
    uncounted=tuple(uncounted),
    collective=moved,
    compute_seconds=compute,
    network_seconds=network,
    mfu=mfu,
  )


def counts(
  config: Any, mesh: Any, examples: int, held_out: int, names: list[str]
) -> dict[str, Any]:
  """FLOPs of the named programs, of the same run without rematerialisation and fused kernels: what
  it has to compute.
  """
  with (plain := config.copy_and_resolve_references()).unlocked():
    plain.model.update(remat=False, attention="xla")
  platform = mesh.devices.flat[0].platform
  calls = [
    call
    for call in inventory.take(plain.lock(), mesh, examples, held_out).calls
    if call.name in names
  ]
  with jax.set_mesh(mesh):
    return {
      call.name: flops.count(call.program.trace(*call.arguments).jaxpr, platform, call.turns)
      for call in calls
    }


def plan(
  config: ConfigDict,
  topology: str,
  say: Callable[[str], Any] = print,
  folder: str = "",
  only: str = "",
  effort: float = 0.0,
) -> Iterator[dict]:
  """Compiles all programs of a run.

  Args:
    config: as read.
    topology: as "v5p:4x4x4", "" for the local devices.
    say: where each program's row is told when it is there.
    folder: for the compiled programs' text, "" for none.
    only: as `chosen`.
    effort: as `compile_call`.

  Yields:
    Before the first program and after each what is known so far: what --out holds, but for what
    `table.concluded` adds. "rows" are `table.Row`s as dicts.

  Raises:
    ConfigError: a mistake in config or topology.
  """
  devices = devices_of(topology)
  examples, held_out = len(prompts.read_examples(config)), len(prompts.read_held_out(config))
  facts = checks.device_facts(devices[0])
  checks.validate(config, num_devices=len(devices), num_examples=examples, **facts)
  if not topology:
    accelerator.say_share(devices[0].platform)
  mesh, chip = sharding.make_mesh(config.mesh, devices), chips.chip_of(devices[0])
  plain = inventory.without_weights(config)
  taken = inventory.take(plain, mesh, examples, held_out)
  names = [call.name for call in taken.calls]
  wanted = chosen(only, names)
  counted = counts(plain, mesh, examples, held_out, wanted)
  kept = {
    name: sum(map(loading.device_bytes, jax.tree.leaves(tree))) for name, tree in taken.kept.items()
  }
  result = {
    "config": config.name,
    "digest": stored_config.digest(config),
    "topology": topology,
    "versions": {"jax": jax.__version__, "libtpu": libtpu_version()},
    "effort": effort,
    "device": devices[0].device_kind,
    "devices": len(devices),
    "memory": chip.memory,
    "mesh": dict(mesh.shape),
    "images": config.data.prompts_per_iteration * config.rollout.samples_per_prompt,
    "iterations": config.iterations,
    "geometry": describe(geometry.of(config), config.mesh.lanes, len(devices)),
    "kept": {name: size for name, size in kept.items() if size},
    "programs": names,
  }
  rows: list[dict] = []
  yield result | {"rows": []}
  for call in taken.calls:
    if call.name not in wanted:
      continue
    with jax.set_mesh(mesh):
      row = compile_call(
        call,
        kept=inventory.kept_bytes(taken, call),
        counted=counted[call.name],
        chip=chip,
        count=len(devices),
        folder=folder,
        effort=effort,
      )
    say(f"{call.name}: compiled in {row.compile_seconds:.0f} s")
    rows.append(row._asdict())
    yield result | {"rows": list(rows)}


def chosen(only: str, names: list[str]) -> list[str]:
  """The programs that --only names: by their whole names or by the first words of them, with commas
  between; "" for all. ConfigError where there is no such program.
  """
  words = only.split(",") if only else names
  found = {word: [name for name in names if f"{name} ".startswith(f"{word} ")] for word in words}
  if unknown := sorted(word for word in words if not found[word]):
    raise ConfigError(
      f"--only={only}: no program {', '.join(unknown)}; there are {', '.join(names)}"
    )
  return [name for name in names if any(name in group for group in found.values())]


def libtpu_version() -> str:
  """Of the TPU compiler, "" where it isn't installed."""
  try:
    return importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    return ""


def describe(batches: Geometry, lanes: int, devices: int) -> str:
  """How an iteration's samples become batches, in words."""
  parts = (
    f"{batches.prompts} prompts x {batches.group} samples = {batches.samples} samples,"
    f" in {batches.chunks} chunks of {batches.chunk}",
    f"{batches.trained_samples} of them x {batches.trained_steps} of {batches.steps} steps"
    f" = {batches.transitions} transitions, in {batches.updates} optimizer steps"
    f" of {batches.microbatches} microbatches of {batches.microbatch}",
  )
  return f"{'; '.join(parts)} ({lanes} lanes on {devices} devices)"

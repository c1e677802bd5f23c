"""Compiles every program of a run, and collects what the compiler states about each: memory,
computation and communication.

Nothing is executed. The numbers are the compiler's, and times are estimates (see `row_of`).
"""

import importlib.metadata
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from dancegrpo_jax.assembly import loading
from dancegrpo_jax.compilation import automatic, estimate, inventory
from dancegrpo_jax.compilation.calls import Call
from dancegrpo_jax.data import prompts
from dancegrpo_jax.devices import accelerator, chips, out_of_memory, sharding
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.plan import flops, hlo, table, topologies
from dancegrpo_jax.plan.flops import Flops
from dancegrpo_jax.report.progress import phase
from dancegrpo_jax.settings import checks, geometry, stored_config
from dancegrpo_jax.settings.geometry import Geometry

# The share of the chip's peak that Pallas kernels are assumed to reach. The compiler states no
# cycles for them.
KERNEL_SHARE = 0.5


class Compiled(NamedTuple):
  """What is known of a compiled program.

  Attributes:
    text: its HLO.
    memory: its `memory_analysis()`.
    kernels: FLOPs inside of Pallas kernels, those of recomputed ones too.
  """

  text: str
  memory: Any
  kernels: float


def devices_of(topology: str) -> list:
  """The devices to plan for: those of a topology, or the local ones for "".

  Raises:
    ConfigError: as `topologies.devices`.
  """
  if not topology:
    return jax.devices()
  jax.config.update("jax_platforms", "cpu")  # or JAX would look for the TPU or GPU that is missing
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
  """Compiles a program and returns its row.

  Args:
    call: the program and its arguments.
    kept: bytes of a device's memory that are in use beside the program's arguments.
    counted: the FLOPs that the program has to compute.
    chip: what one device offers.
    count: number of devices.
    folder: where to write the program's text, "" for nowhere.
    effort: XLA's exec_time_optimization_effort. Runs are compiled with 0.

  Raises:
    ConfigError: this compiler has no such option as `effort`.
  """
  start = time.time()
  traced = call.program.trace(*call.arguments)
  try:
    compiled = traced.lower().compile({"exec_time_optimization_effort": effort} if effort else None)
  except jax.errors.JaxRuntimeError as error:
    if effort and "No such compile option" in str(error):  # JAX 0.11.2 raises it for CPUs
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
  seconds = time.time() - start
  text = compiled.as_text()
  if folder:
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / f"{call.name.replace(' ', '_')}.txt").write_text(text)
  kernels = flops.count(traced.jaxpr, "tpu", call.turns).kernels
  result = Compiled(text=text, memory=compiled.memory_analysis(), kernels=kernels)
  row = row_of(call, kept, counted, result, chip, count)
  if effort:  # a run's times are others: with -1 it would take several times as long
    row = row._replace(compute_seconds=None, network_seconds=None, mfu=None)
  return row._replace(compile_seconds=seconds)


def row_of(
  call: Call, kept: int, counted: Flops, compiled: Compiled, chip: chips.Chip, count: int
) -> table.Row:
  """The row of a compiled program, except for the time that its compilation took.

  The estimated time is the compiler's cycles divided by the clock, plus the bytes on the network
  divided by its full rate, as if the two never overlapped. Pallas kernels, whose cycles the
  compiler does not state, are assumed to reach `KERNEL_SHARE` of the peak.

  Args:
    call, kept, counted, chip, count: as for `compile_call`.
    compiled: the compiled program.
  """
  memory, summary = compiled.memory, hlo.summary(compiled.text, call.turns)
  moved = sum(collective.moved for collective in summary.collectives)
  compute = network = mfu = None
  if chip.clock:
    compute = summary.cycles / chip.clock
    compute += compiled.kernels / count / (KERNEL_SHARE * chip.flops)
    network = moved / chip.network
    total = compute + network
    mfu = counted.total / count / chip.flops / total if total else None
  uncounted = sorted(counted.unknown) + (["loops of unknown length"] if summary.unknown else [])
  return table.Row(
    name=call.name,
    times=call.times,
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    peak=kept + estimate.allotted(memory),
    flops=counted.total,
    uncounted=tuple(uncounted),
    collective=moved,
    compute_seconds=compute,
    network_seconds=network,
    mfu=mfu,
  )


def counts(
  config: ConfigDict, mesh: jax.sharding.Mesh, examples: int, held_out: int, names: list[str]
) -> dict[str, Flops]:
  """FLOPs that the named programs have to compute: those of the same run without rematerialisation
  and fused kernels.

  Args:
    config, mesh, examples, held_out: as for `inventory.take`.
    names: of programs.
  """
  with (plain := config.copy_and_resolve_references()).unlocked():
    plain.model.update(remat=False, attention="xla")
  platform = mesh.devices.flat[0].platform
  calls = inventory.take(plain.lock(), mesh, examples, held_out).calls
  with jax.set_mesh(mesh):
    return {
      call.name: flops.count(call.program.trace(*call.arguments).jaxpr, platform, call.turns)
      for call in calls
      if call.name in names
    }


def plan(
  config: ConfigDict,
  topology: str,
  log: Callable[[str], Any] = print,
  folder: str = "",
  only: str = "",
  effort: float = 0.0,
) -> Iterator[dict]:
  """Compiles all programs of a run.

  Args:
    config: the config as it was loaded.
    topology: as "v5p:4x4x4", "" for the local devices.
    log: gets a line after each program.
    folder: where to write the programs' text, "" for nowhere.
    only: the programs to compile, as for `chosen`.
    effort: as for `compile_call`.

  Yields:
    The plan so far, before the first program and after each: the content of the --out file without
    what `table.concluded` adds. "rows" are `table.Row`s as dicts.

  Raises:
    ConfigError: a mistake in config, topology, `only` or `effort`.
  """
  with phase("looking for the devices"):
    devices = devices_of(topology)
  examples, held_out = len(prompts.read_examples(config)), len(prompts.read_held_out(config))
  config = automatic.resolved(config, devices, log)
  facts = checks.device_facts(devices[0])
  checks.validate(config, num_devices=len(devices), num_examples=examples, **facts)
  if not topology:
    accelerator.say_share(devices[0].platform)
  mesh, chip = sharding.make_mesh(config.mesh, devices), chips.chip_of(devices[0])
  plain = inventory.without_weights(config)
  with phase("listing the programs"):
    taken = inventory.take(plain, mesh, examples, held_out)
  names = [call.name for call in taken.calls]
  selected = chosen(only, names)
  log(
    f"{config.name}: compiling {len(selected)} programs for {len(devices)}"
    f" {devices[0].device_kind}; nothing is executed"
  )
  with phase("counting FLOPs"):
    counted = counts(plain, mesh, examples, held_out, selected)
  batches = geometry.of(config)
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
    "images": batches.samples,
    "iterations": config.iterations,
    "geometry": describe(batches, config.mesh.lanes, len(devices)),
    "kept": _sizes(taken.kept),
    "programs": names,
  }
  rows: list[dict] = []
  yield result | {"rows": []}
  for call in taken.calls:
    if call.name not in selected:
      continue
    doing = f"compiling {call.name}, {len(rows) + 1} of {len(selected)} programs"
    with phase(doing), jax.set_mesh(mesh):
      row = compile_call(
        call,
        kept=inventory.kept_bytes(taken, call),
        counted=counted[call.name],
        chip=chip,
        count=len(devices),
        folder=folder,
        effort=effort,
      )
    log(f"{call.name}: compiled in {row.compile_seconds:.0f} s")
    rows.append(row._asdict())
    yield result | {"rows": list(rows)}


def _sizes(trees: dict[str, Any]) -> dict[str, int]:
  """Bytes on one device of each tree that is not empty."""
  sizes = {
    name: sum(map(loading.device_bytes, jax.tree.leaves(tree))) for name, tree in trees.items()
  }
  return {name: size for name, size in sizes.items() if size}


def chosen(only: str, names: list[str]) -> list[str]:
  """The programs that --only selects.

  Args:
    only: programs with commas between, by their names or the first words of these: "update" selects
      "update step". "" selects all.
    names: all programs.

  Raises:
    ConfigError: there is no such program.
  """
  words = only.split(",") if only else names
  matches = {word: [name for name in names if f"{name} ".startswith(f"{word} ")] for word in words}
  if unknown := sorted(word for word in words if not matches[word]):
    raise ConfigError(
      f"--only={only}: no program {', '.join(unknown)}; there are {', '.join(names)}"
    )
  return [name for name in names if any(name in group for group in matches.values())]


def libtpu_version() -> str:
  """The version of the TPU compiler, "" where it is not installed."""
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

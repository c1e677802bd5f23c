"""Compiles every program of a run and collects what the compiler says about each: memory,
computation and communication.

Nothing runs. The numbers are the compiler's, and the time is an estimate (see `row_of`).
"""

import importlib.metadata
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dancegrpo_jax.devices import accelerator, out_of_memory
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.plan import table
from dancegrpo_jax.settings import stored_config

KERNEL_SHARE = (
  0.5  # of the peak that a Pallas kernel is taken to reach: the compiler expects nothing of it
)


def devices_of(topology: str) -> list:
  """The devices to plan for. ConfigError as `topologies.devices`."""
  import jax

  from dancegrpo_jax.plan import topologies

  if not topology:
    return jax.devices()
  jax.config.update(
    "jax_platforms", "cpu"
  )  # the compiler is here to compile: no TPU or GPU is looked for
  return topologies.devices(topology)


def compile_call(
  call: Any, kept: int, flops: Any, chip: Any, count: int, hlo: str = "", effort: float = 0.0
) -> table.Row:
  """A program's row.

  Args:
    call: of the inventory.
    kept: bytes of a device's memory that are taken beside its arguments.
    flops: of `flops.count`.
    chip: `topologies.Chip`.
    count: devices.
    hlo: folder for the text, "" for none.
    effort: XLA's exec_time_optimization_effort; 0 is what a run is compiled with.
  """
  import jax

  from dancegrpo_jax.plan import flops

  start = time.time()
  traced = call.program.trace(*call.arguments)
  try:
    compiled = traced.lower().compile({"exec_time_optimization_effort": effort} if effort else None)
  except jax.errors.JaxRuntimeError as error:
    if effort and "No such compile option" in str(error):  # seen with JAX 0.11.2, for CPUs
      remedy = f"the compiler of JAX {jax.__version__} has no such option; use --effort=0"
      raise ConfigError(f"--effort={effort:g}: {remedy}") from error
    found = out_of_memory.shortage(error)
    if found is None:
      raise
    peak, took = (found.wanted or float("inf")) + kept, time.time() - start
    said = found.said
    return table.Row(
      call.name, call.times, None, None, peak, flops.total, (), None, took, None, None, None, said
    )
  took, text, memory = time.time() - start, compiled.as_text(), compiled.memory_analysis()
  if hlo:
    Path(hlo).mkdir(parents=True, exist_ok=True)
    (Path(hlo) / f"{call.name.replace(' ', '_')}.txt").write_text(text)
  kernels = flops.count(traced.jaxpr, "tpu").kernels
  row = row_of(call, kept, flops, kernels, chip, count, text, memory)._replace(compile_seconds=took)
  if effort:  # not a run's times: with -1 several times as long
    row = row._replace(compute_seconds=None, network_seconds=None, mfu=None)
  return row


def row_of(
  call: Any, kept: int, flops: Any, kernels: float, chip: Any, count: int, text: str, memory: Any
) -> table.Row:
  """A compiled program's row; see `compile_call`. `kernels` are the FLOPs inside Pallas kernels,
  recomputed ones too.
  """
  from dancegrpo_jax.plan import hlo

  summary = hlo.summary(text)
  added = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
  peak = kept + memory.argument_size_in_bytes + added + memory.generated_code_size_in_bytes
  moved = sum(collective.moved for collective in summary.collectives)
  compute = network = mfu = None
  if chip.clock:
    compute = summary.cycles / chip.clock + kernels / count / (KERNEL_SHARE * chip.flops)
    network = moved / chip.network
    total = compute + network
    mfu = flops.total / count / chip.flops / total if total else None
  uncounted = tuple(sorted(flops.unknown)) + ("loops of unknown length",) * bool(summary.unknown)
  return table.Row(
    call.name,
    call.times,
    memory.argument_size_in_bytes,
    memory.temp_size_in_bytes,
    peak,
    flops.total,
    uncounted,
    moved,
    0.0,
    compute,
    network,
    mfu,
  )


def counts(
  config: Any, mesh: Any, examples: int, held_out: int, names: list[str]
) -> dict[str, Any]:
  """FLOPs of the named programs, of the same run without rematerialisation and fused kernels: what
  it has to compute.
  """
  import jax

  from dancegrpo_jax.plan import flops, inventory

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
      call.name: flops.count(call.program.trace(*call.arguments).jaxpr, platform) for call in calls
    }


def plan(
  config: Any, topology: str, say: Any = print, hlo: str = "", only: str = "", effort: float = 0.0
) -> Iterator[dict]:
  """Compiles all programs of a run.

  Args:
    config: as read.
    topology: as "v5p:4x4x4", "" for the local devices.
    say: where each program's row is told when it is there.
    hlo: folder for the compiled programs' text, "" for none.
    only: names of programs, with commas between; "" for all.
    effort: as `compile_call`.

  Yields:
    Before the first program and after each what is known so far: what --out holds, but for what
    `plans.concluded` adds. "rows" are `plans.Row`s as dicts.

  Raises:
    ConfigError: a mistake in config or topology.
  """
  import jax

  from dancegrpo_jax.assembly import loading
  from dancegrpo_jax.data import prompts
  from dancegrpo_jax.devices import chips, sharding
  from dancegrpo_jax.plan import inventory
  from dancegrpo_jax.settings import checks

  devices = devices_of(topology)
  examples, held_out = len(prompts.read_examples(config)), len(prompts.read_held_out(config))
  facts = checks.device_facts(devices[0])
  checks.validate(config, num_devices=len(devices), num_examples=examples, **facts)
  if not topology:
    accelerator.say_share(devices[0].platform)
  mesh, chip = sharding.make_mesh(config.mesh, devices), chips.chip_of(devices[0])
  plain = inventory.without_weights(config)
  taken, rows = inventory.take(plain, mesh, examples, held_out), []
  names = [call.name for call in taken.calls]
  wanted = only.split(",") if only else names
  if unknown := sorted(set(wanted) - set(names)):
    raise ConfigError(
      f"--only={only}: no program {', '.join(unknown)}; there are {', '.join(names)}"
    )
  flops = counts(plain, mesh, examples, held_out, wanted)
  sizes = loading.device_bytes
  kept = {name: sum(map(sizes, jax.tree.leaves(tree))) for name, tree in taken.kept.items()}
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
    "geometry": geometry(config, len(devices)),
    "kept": {name: size for name, size in kept.items() if size},
    "programs": names,
  }
  yield result | {"rows": []}
  for call in (call for call in taken.calls if call.name in wanted):
    with jax.set_mesh(mesh):
      row = compile_call(
        call, inventory.kept_bytes(taken, call), flops[call.name], chip, len(devices), hlo, effort
      )
    say(f"{call.name}: compiled in {row.compile_seconds:.0f} s")
    rows.append(row._asdict())
    yield result | {"rows": list(rows)}


def libtpu_version() -> str:
  """Of the TPU compiler, "" where it isn't installed."""
  try:
    return importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    return ""


def geometry(config: Any, devices: int) -> str:
  """How an iteration's samples become batches, in words."""
  from dancegrpo_jax.rl import timesteps
  from dancegrpo_jax.settings import checks

  data, optimizer, objective = config.data, config.optimizer, config.objective
  group, samples = (
    config.rollout.samples_per_prompt,
    data.prompts_per_iteration * config.rollout.samples_per_prompt,
  )
  steps = config.sampler.window.size or checks.policy_steps(config)
  trained = timesteps.count(objective.timesteps, objective.timestep_fraction, steps)
  kept = data.prompts_per_iteration * (config.advantage.best_of or group)
  each = kept * trained // optimizer.updates_per_iteration
  return (
    f"{data.prompts_per_iteration} prompts x {group} samples = {samples} images, in"
    f" {samples // config.rollout.chunk} chunks of"
    f" {config.rollout.chunk}; {kept} of them x {trained} of {steps} steps = {kept * trained}"
    " transitions, in"
    f" {optimizer.updates_per_iteration} optimizer steps of {each // optimizer.microbatch}"
    f" microbatches of {optimizer.microbatch}"
    f" ({config.mesh.lanes} lanes on {devices} devices)"
  )

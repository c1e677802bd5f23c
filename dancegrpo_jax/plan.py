"""Command: compile every program of a run ahead of time, without weights, for a named topology or the local devices.

    python -m dancegrpo_jax.plan --config=configs/flux_hps.py --topology=v5p:4x4x4 [--out=FILE.json]

Says what each program takes of a device's memory, what it computes and sends, and how long the run may last. Nothing runs: the
numbers are the compiler's, and the time is an estimate (see `row_of`). Exit code 1 where it doesn't fit, 2 for a mistake.

For NVIDIA GPUs (--topology=h100:8 where JAX's CUDA plugin is installed, or without --topology on a
machine that has them) there are no times: XLA states no cycles for them. The memory limit is the
92 % of a card that a run would take. This command has not been tried on a machine with a GPU; there
XLA times kernels on the card while it compiles, so no other program should be using it.
"""

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dancegrpo_jax.runtime import accelerator, out_of_memory, plans
from dancegrpo_jax.runtime import config as configs
from dancegrpo_jax.runtime.config import ConfigError

KERNEL_SHARE = 0.5  # of the peak that a Pallas kernel is taken to reach: the compiler expects nothing of it


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  parser.add_argument("--topology", default="", help="as v5p:4x4x4, v5e:2x4 or h100:8; default: the local devices")
  parser.add_argument("--out", default="", help="JSON file for the numbers; one of the same config and topology is completed")
  parser.add_argument("--hlo", default="", help="folder for the compiled programs' text")
  parser.add_argument("--only", default="", help="programs, as update,rollout; default: all")
  parser.add_argument("--effort", default="0", help="of the compiler, -1 to 1; -1: convolutions in seconds")


def devices_of(topology: str) -> list:
  """The devices to plan for. ConfigError as `topologies.devices`."""
  import jax

  from dancegrpo_jax.runtime import topologies

  if not topology:
    return jax.devices()
  jax.config.update("jax_platforms", "cpu")  # the compiler is here to compile: no TPU or GPU is looked for
  return topologies.devices(topology)


def compile_call(call: Any, kept: int, flops: Any, chip: Any, count: int, hlo: str = "", effort: float = 0.0) -> plans.Row:
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

  from dancegrpo_jax.runtime import flops as counter

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
    return plans.Row(
      call.name, call.times, None, None, peak, flops.total, (), None, took, None, None, None, said
    )
  took, text, memory = time.time() - start, compiled.as_text(), compiled.memory_analysis()
  if hlo:
    Path(hlo).mkdir(parents=True, exist_ok=True)
    (Path(hlo) / f"{call.name.replace(' ', '_')}.txt").write_text(text)
  kernels = counter.count(traced.jaxpr, "tpu").kernels
  row = row_of(call, kept, flops, kernels, chip, count, text, memory)._replace(compile_seconds=took)
  if effort:  # not a run's times: with -1 several times as long
    row = row._replace(compute_seconds=None, network_seconds=None, mfu=None)
  return row


def row_of(call: Any, kept: int, flops: Any, kernels: float, chip: Any, count: int, text: str, memory: Any) -> plans.Row:
  """A compiled program's row; see `compile_call`. `kernels` are the FLOPs inside Pallas kernels, recomputed ones too."""
  from dancegrpo_jax.runtime import hlo as texts

  summary = texts.summary(text)
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
  return plans.Row(
    call.name, call.times, memory.argument_size_in_bytes, memory.temp_size_in_bytes, peak, flops.total, uncounted, moved, 0.0,
    compute, network, mfu,
  )  # fmt: skip


def counts(config: Any, mesh: Any, examples: int, held_out: int, names: list[str]) -> dict[str, Any]:
  """FLOPs of the named programs, of the same run without rematerialisation and fused kernels: what it has to compute."""
  import jax

  from dancegrpo_jax import inventory
  from dancegrpo_jax.runtime import flops

  with (plain := config.copy_and_resolve_references()).unlocked():
    plain.model.update(remat=False, attention="xla")
  platform = mesh.devices.flat[0].platform
  calls = [call for call in inventory.take(plain.lock(), mesh, examples, held_out).calls if call.name in names]
  with jax.set_mesh(mesh):
    return {call.name: flops.count(call.program.trace(*call.arguments).jaxpr, platform) for call in calls}


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
    Before the first program and after each what is known so far: what --out holds, but for what `plans.concluded` adds. "rows"
    are `plans.Row`s as dicts.

  Raises:
    ConfigError: a mistake in config or topology.
  """
  import jax

  from dancegrpo_jax import inventory, loading, train
  from dancegrpo_jax.runtime import mesh as meshes
  from dancegrpo_jax.runtime import topologies, validation

  devices = devices_of(topology)
  examples, held_out = len(train.read_examples(config)), len(train.read_held_out(config))
  facts = accelerator.facts(devices[0])
  validation.validate(config, num_devices=len(devices), num_examples=examples, **facts)
  if not topology:
    accelerator.say_share(devices[0].platform)
  mesh, chip = meshes.make_mesh(config.mesh, devices), topologies.chip_of(devices[0])
  plain = inventory.without_weights(config)
  taken, rows = inventory.take(plain, mesh, examples, held_out), []
  names = [call.name for call in taken.calls]
  wanted = only.split(",") if only else names
  if unknown := sorted(set(wanted) - set(names)):
    raise ConfigError(f"--only={only}: no program {', '.join(unknown)}; there are {', '.join(names)}")
  flops = counts(plain, mesh, examples, held_out, wanted)
  sizes = loading.device_bytes
  kept = {name: sum(map(sizes, jax.tree.leaves(tree))) for name, tree in taken.kept.items()}
  result = {
    "config": config.name, "digest": configs.digest(config), "topology": topology,
    "versions": {"jax": jax.__version__, "libtpu": libtpu_version()}, "effort": effort,
    "device": devices[0].device_kind, "devices": len(devices), "memory": chip.memory, "mesh": dict(mesh.shape),
    "images": config.data.prompts_per_iteration * config.rollout.samples_per_prompt, "iterations": config.iterations,
    "geometry": geometry(config, len(devices)), "kept": {name: size for name, size in kept.items() if size}, "programs": names,
  }  # fmt: skip
  yield result | {"rows": []}
  for call in (call for call in taken.calls if call.name in wanted):
    with jax.set_mesh(mesh):
      row = compile_call(call, inventory.kept_bytes(taken, call), flops[call.name], chip, len(devices), hlo, effort)
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
  from dancegrpo_jax.runtime import validation

  data, optimizer, objective = config.data, config.optimizer, config.objective
  group, samples = config.rollout.samples_per_prompt, data.prompts_per_iteration * config.rollout.samples_per_prompt
  steps = config.sampler.window.size or validation.policy_steps(config)
  trained = timesteps.count(objective.timesteps, objective.timestep_fraction, steps)
  kept = data.prompts_per_iteration * (config.advantage.best_of or group)
  each = kept * trained // optimizer.updates_per_iteration
  return (
    f"{data.prompts_per_iteration} prompts x {group} samples = {samples} images, in {samples // config.rollout.chunk} chunks of"
    f" {config.rollout.chunk}; {kept} of them x {trained} of {steps} steps = {kept * trained} transitions, in"
    f" {optimizer.updates_per_iteration} optimizer steps of {each // optimizer.microbatch} microbatches of {optimizer.microbatch}"
    f" ({config.mesh.lanes} lanes on {devices} devices)"
  )


def run(config: Any, topology: str, out: str, hlo: str = "", only: str = "", effort: str = "0") -> int:
  """Plans, tells and writes; returns the exit code. ConfigError as `plan`."""
  try:
    level = float(effort)
  except ValueError:
    level = float("nan")
  if not -1 <= level <= 1:
    raise ConfigError(f"--effort={effort}: must be a number from -1 (compile quickly) to 1")
  if out and Path(out).suffix != ".json":
    raise ConfigError(f"--out={out}: must end with .json")
  file = Path(out)
  if out:
    configs.require_writable(f"--out={out}", file.parent)
  if hlo:
    configs.require_writable(f"--hlo={hlo}", Path(hlo))
  for result in plan(config, topology, hlo=hlo, only=only, effort=level):
    if out and file.exists():
      result = plans.merged(plans.read_out(file), result)
    result = plans.concluded(result)
    if out and result["rows"]:  # program by program: compiling takes minutes, and what is there outlasts an interruption
      file.parent.mkdir(parents=True, exist_ok=True)
      written = file.with_suffix(".tmp")
      written.write_text(json.dumps(result, indent=1) + "\n")
      written.replace(file)
  print(plans.report(result))
  return 1 if result["problems"] else 0


def main(argv: list[str]) -> int:
  """Reads the flags and plans; returns the exit code: 0 it fits, 1 it doesn't, 2 for a mistake."""

  def command() -> int:
    line = configs.parse_argv(argv, "Compile a run's programs ahead of time.", add_flags)
    accelerator.start()  # so that it counts with the memory that a run has
    flags = line.flags
    return run(line.config, flags.topology, flags.out, flags.hlo, flags.only, flags.effort)

  return configs.exit_on_mistake(command)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

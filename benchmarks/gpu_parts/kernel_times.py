"""Where the time of a rollout and of an update goes: the device's kernels in a trace of one call,
by their kind."""

import warnings
from pathlib import Path

import jax

from gpu_parts import kernel_kinds, loaded, measure, registry


def run(context) -> None:
  made = loaded.load(context)
  given = loaded.feed(made)
  arguments = loaded.rollout_arguments(made, given)
  with jax.set_mesh(made.mesh):
    program = made.calls["rollout"].program
    rollout = jax.block_until_ready(program(*arguments))
    told(context, "rollout", lambda: program(*arguments))
    update = loaded.Update(made, given, rollout)
    jax.block_until_ready(update())
    told(context, "update", update)


def told(context, name: str, call) -> None:
  """A row: a call's kernels."""
  kernels = traced(call, context.folder / name)
  total = sum(seconds for _, seconds in kernels)
  if not total:
    context.say.failed(name, "the profiler has seen no kernel")
    return
  shares = kernel_kinds.totals(kernels)
  cells = {"kernels": measure.number(total, "s"), "launches": measure.number(len(kernels))}
  cells |= {kind: measure.percent(shares.get(kind, 0.0) / total) for kind in registry.KINDS}
  context.say.cells(
    name,
    cells,
    note=largest([kernel for kernel in kernels if kernel_kinds.kind_of(kernel[0]) == "other"]),
  )


def largest(kernels: list[tuple[str, float]]) -> str:
  """The names that no kind is known of and that take the most time."""
  times: dict[str, float] = {}
  for name, seconds in kernels:
    times[name] = times.get(name, 0.0) + seconds
  names = sorted(times, key=times.get, reverse=True)[:3]
  return f"other: {', '.join(name[:60] for name in names)}" if names else ""


def traced(call, folder: Path) -> list[tuple[str, float]]:
  """(name, seconds) of each kernel of a call."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0  # its events are many, and none is a kernel
  jax.profiler.start_trace(str(folder), profiler_options=options)
  try:
    jax.block_until_ready(call())
  finally:
    jax.profiler.stop_trace()
  (file,) = folder.rglob("*.xplane.pb")
  return kernels_of(jax.profiler.ProfileData.from_file(str(file)))


def kernels_of(profile) -> list[tuple[str, float]]:
  """Kernels of a GPU's streams; without a GPU the operations of XLA's CPU threads, loops without
  what is in them."""
  planes = list(profile.planes)
  own = [line for plane in planes if plane.name.startswith("/device:GPU") for line in plane.lines]
  if own:
    lines = [
      line for line in own if line.name.startswith("Stream")
    ]  # the others sum up what these hold
    return [(event.name, event.duration_ns * 1e-9) for line in lines for event in line.events]
  lines = [line for plane in planes if plane.name == "/host:CPU" for line in plane.lines]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of the stats' own type
    return [
      (event.name, event.duration_ns * 1e-9)
      for line in lines
      for event in line.events
      if not event.name.startswith(("while", "call", "cond")) and "hlo_op" in dict(event.stats)
    ]

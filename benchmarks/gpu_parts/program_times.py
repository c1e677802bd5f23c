"""Rollout, decode, score and update of a recipe, program by program: compilation, time, share of
the peak, memory."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax

from dancegrpo_jax.compilation import estimate, inventory
from dancegrpo_jax.devices import chips
from gpu_parts import loaded, measure

_found = threading.local()  # whether this thread's last program was in the cache


def _listen(event: str, **_) -> None:
  if event == "/jax/compilation_cache/cache_hits":
    _found.yes = True  # JAX tells it in the thread that asked


class Program:
  """A program on its way: traced at once, compiled in a thread of `pool`.

  Attributes:
    name: of the program.
    call: how a run calls it.
    traced: seconds.
  """

  def __init__(self, run: loaded.Loaded, name: str, pool: ThreadPoolExecutor):
    self._run, self.name, self.call = run, name, run.calls[name]
    start = time.perf_counter()
    with jax.set_mesh(run.mesh):
      lowered = self.call.program.trace(*self.call.arguments).lower()
    self.traced = time.perf_counter() - start
    self._future = pool.submit(self._compile, lowered)

  def _compile(self, lowered):
    start, _found.yes = time.perf_counter(), False
    compiled = lowered.compile()
    return compiled, time.perf_counter() - start, "read" if _found.yes else "compiled"

  def wait(self) -> tuple:
    """(The compiled program, seconds that it took, "compiled" or "read") when it is there."""
    return self._future.result()

  def first(self, say, arguments: tuple):
    """Calls it and says how long all of it took. (The compiled program, its result.)"""
    compiled, took, how = self.wait()
    start = time.perf_counter()
    result = jax.block_until_ready(compiled(*arguments))
    ran = time.perf_counter() - start
    total = measure.number(self.traced + took + ran, "s")
    say.row(
      self.name, first_call=total, note=f"traced in {self.traced:.1f} s, {how} in {took:.1f} s"
    )
    say.row(
      self.name,
      memory_by_plan=measure.gib(planned(self._run, self.call, compiled)),
      **peak_so_far(),
    )
    return compiled, result


def planned(run: loaded.Loaded, call: inventory.Call, compiled) -> float:
  """Bytes of the device's memory by plan's row: what stays, arguments, temporaries."""
  kept = inventory.kept_bytes(run.inventory, call)
  return kept + estimate.allotted(compiled.memory_analysis())


def peak_so_far() -> dict:
  """The process's largest use of the device's memory until now, as a cell; {} where the device
  doesn't say."""
  stats = jax.devices()[0].memory_stats() or {}
  return (
    {"peak_so_far": measure.gib(stats["peak_bytes_in_use"])} if "peak_bytes_in_use" in stats else {}
  )


def told(run: loaded.Loaded, say, name: str, times: list[float], flops: dict[str, float]) -> None:
  """A program's times, and its share of the peak where that is known."""
  say.row(name, time=measure.spread(times, "s"), **peak_so_far())
  peak = chips.gpu_peak(run.mesh.devices.flat[0].device_kind)
  if peak:
    say.row(name, MFU=measure.percent(flops[name] / peak / measure.median(times)))


def run(context) -> None:
  jax.monitoring.register_event_listener(_listen)
  made = loaded.load(context)
  given, flops = loaded.feed(made), {}

  def measured(name: str, program: Program, arguments: tuple):
    compiled, result = program.first(context.say, arguments)
    times = measure.timed(lambda: compiled(*arguments), jax.block_until_ready)
    told(made, context.say, name, times, flops)
    return result

  with ThreadPoolExecutor(3) as pool:
    programs = {name: Program(made, name, pool) for name in ("rollout", "decode", "score")}
    flops |= made.counts(["rollout", "decode", "score", "update"])  # while they are compiled
    for program in programs.values():
      program.wait()  # nothing is timed while the compiler tries kernels out
    rollout = measured("rollout", programs["rollout"], loaded.rollout_arguments(made, given))
    media = measured("decode", programs["decode"], (given.frozen, rollout.sample))
    measured("score", programs["score"], loaded.score_arguments(made, given, media))
    parts = {name: Program(made, f"update {name}", pool) for name in made.update_calls()}
    update(context.say, made, parts, given, rollout, flops)


def update(
  say,
  made: loaded.Loaded,
  parts: dict[str, Program],
  given: loaded.Feed,
  rollout,
  flops: dict[str, float],
) -> None:
  """The update, all its calls together. It comes last: it takes the longest to compile."""
  begin = time.perf_counter()
  found = {name: program.wait() for name, program in parts.items()}
  waited = time.perf_counter() - begin
  run = loaded.Update(made, given, rollout, {name: rest[0] for name, rest in found.items()})
  start = time.perf_counter()
  metrics = jax.block_until_ready(run())
  ran = time.perf_counter() - start
  traced = sum(program.traced for program in parts.values())
  longest = max(found, key=lambda name: found[name][1])
  _, took, how = found[longest]
  note = f"{len(parts)} programs traced in {traced:.1f} s, {longest} {how} in {took:.1f} s"
  say.row("update", first_call=measure.number(traced + waited + ran, "s"), note=note)
  peaks = [planned(made, parts[name].call, compiled) for name, (compiled, *_) in found.items()]
  say.row("update", memory_by_plan=measure.gib(max(peaks)), **peak_so_far())
  times = measure.timed(run, jax.block_until_ready)
  told(made, say, "update", times, flops)
  note = f"{note}; {words(run.parts())}"
  steps = made.config.optimizer.updates_per_iteration
  if skipped := int(metrics["optimizer/skipped"]):
    note = f"{note}; {skipped} of {steps} optimizer steps were not finite"
  say.row("update", note=note)


def words(parts: dict[str, list[float]]) -> str:
  """Where an update's time goes, by program: calls, and seconds of all of them."""
  each = [f"{len(times)} x {name} {sum(times):.3g} s" for name, times in parts.items()]
  return f"one call at a time: {', '.join(each)}"

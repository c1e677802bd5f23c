"""Rollout, decode, score and update of a recipe, program by program: compilation, time, share of
the peak, memory."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax

from dancegrpo_jax.devices import chips
from dancegrpo_jax.plan import inventory, planning
from gpu_parts import loaded, measure

_found = threading.local()  # whether this thread's last program was in the cache


def _listen(event: str, **_) -> None:
  if event == "/jax/compilation_cache/cache_hits":
    _found.yes = True  # JAX tells it in the thread that asked


class Program:
  """A program on its way: traced at once, compiled in a thread of `pool`."""

  def __init__(self, run: loaded.Loaded, name: str, pool: ThreadPoolExecutor):
    self._run, self.name, self.call = run, name, run.calls[name]
    start = time.perf_counter()
    with jax.set_mesh(run.mesh):
      lowered = self.call.program.trace(*self.call.arguments).lower()
    self._traced = time.perf_counter() - start
    self._future = pool.submit(self._compile, lowered)

  def _compile(self, lowered):
    start, _found.yes = time.perf_counter(), False
    compiled = lowered.compile()
    return compiled, time.perf_counter() - start, "read" if _found.yes else "compiled"

  def wait(self) -> None:
    """Until it is compiled."""
    self._future.result()

  def first(self, say, arguments: tuple):
    """Calls it and says how long all of it took. (The compiled program, its result.)"""
    compiled, took, how = self._future.result()
    start = time.perf_counter()
    result = jax.block_until_ready(compiled(*arguments))
    ran = time.perf_counter() - start
    total = measure.number(self._traced + took + ran, "s")
    say.row(
      self.name, first_call=total, note=f"traced in {self._traced:.1f} s, {how} in {took:.1f} s"
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
  return kept + planning.peak_of(compiled.memory_analysis())


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


def stepping(compiled, state, rest: tuple):
  """`() -> metrics` of an update; the state, which each call consumes, is the one that the last
  call gave."""
  held = [state]

  def call():
    held[0], metrics = compiled(held[0], *rest)
    return metrics

  return call


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
    pixels = measured("decode", programs["decode"], (given.frozen, rollout.sample))
    measured("score", programs["score"], loaded.score_arguments(made, given, pixels))
    update(
      context.say,
      made,
      Program(made, "update", pool),
      loaded.update_rest(made, given, rollout),
      flops,
    )


def update(
  say, made: loaded.Loaded, program: Program, rest: tuple, flops: dict[str, float]
) -> None:
  """The update, which comes last: it takes the longest to compile."""
  compiled, (state, metrics) = program.first(say, (made.state, *rest))
  times = measure.timed(stepping(compiled, state, rest), jax.block_until_ready)
  told(made, say, "update", times, flops)
  transitions = made.config.optimizer.updates_per_iteration
  if float(metrics["optimizer/skipped"]):
    say.row(
      "update",
      note=f"{int(metrics['optimizer/skipped'])} of {transitions} optimizer steps were not finite",
    )

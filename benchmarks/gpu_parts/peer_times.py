"""Times this project beside diffusers' networks in PyTorch, in one process, in turns.

Compares a step of the rollout and a microbatch of the update. JAX is configured to give memory back
after each call (see registry.py), and PyTorch gives it back between turns. The weights of both
sides stay in memory.
"""

import functools
import importlib.util
import os
from collections.abc import Callable

import jax

from dancegrpo_jax.devices import chips
from gpu_parts import loaded, measure
from gpu_parts.ours import Ours, Work

ROUNDS = 2  # each row is measured twice, in turns: A B A B


def run(context) -> None:
  missing = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
  if missing:
    raise RuntimeError(f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}")
  # Beside JAX's programs, so that the next command finds what PyTorch has compiled, too.
  os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(context.cache / "torch"))
  # Before JAX takes the device, so that libraries in conflict with JAX's are noticed here.
  import torch

  if not torch.cuda.is_available() and not context.tiny:
    raise RuntimeError("torch sees no GPU")
  made = loaded.load(context, data__cache_embeddings=True)  # without text encoders
  given = loaded.feed(made)
  flops = made.counts(["rollout", "update"])
  ours = Ours(made, given)
  side = Side(context, made, ours, flops)
  side.forward()
  torch.compiler.reset()  # frees the compiled networks
  side.training()


class Side:
  """The turns of both sides."""

  def __init__(self, context, made: loaded.Loaded, ours: Ours, flops: dict[str, float]):
    from gpu_parts import peer_models

    self.peer = peer_models
    self.say = context.say
    self.model = context.argument
    self.tiny = context.tiny
    self.ours, self.work = ours, Work(made.config)
    self.peak_flops = chips.gpu_peak(made.mesh.devices.flat[0].device_kind)
    row = flops["rollout"] / (self.work.steps * self.work.chunk_rows)
    old = self.work.old_passes * self.work.microbatch_rows * row
    self.forward_flops = self.work.chunk_rows * row
    self.update_flops = flops["update"]
    self.step_flops = (flops["update"] - old) / self.work.microbatches  # forward and backward
    self.forward_times: dict[str, float] = {}

  def turns(
    self,
    ours: Callable,
    theirs: dict[str, Callable],
    mine: str,
    flops: dict,
    scale: int,
    same: Callable,
  ) -> dict[str, list[float]]:
    """Measures our row and each row of PyTorch in turns, ROUNDS times, and sends rows at once.

    Compiled networks take turns after the others, which therefore do not wait for the compiler.

    Args:
      ours: `() -> result`.
      theirs: by row, `() -> (() -> result)`; the outer function allocates, at the first turn.
      mine: name of our row.
      flops: by row, the FLOPs of what its time measures.
      scale: our time is that of a call divided by this number.
      same: `(row, seconds) -> seconds`, PyTorch's time for the same work as our time measures; None
        where it is unknown.
    """
    times, ready, failed = {}, {}, set()

    def own() -> None:
      if mine not in times:
        jax.block_until_ready(ours())
      found = measure.timed(ours, jax.block_until_ready, count=2, seconds=3.0, least=1)
      times.setdefault(mine, []).extend(seconds / scale for seconds in found)
      self.row(mine, times[mine], flops[mine])

    def other(row: str) -> None:
      self.turn(row, theirs[row], ready, times, flops[row])
      compare(row)

    def compare(row: str) -> None:
      seconds = same(row, measure.median(times[row])) if mine in times else None
      if seconds is not None:
        faster = measure.number(seconds / measure.median(times[mine]), "x")
        self.say.cells(row, {"ours is faster by": faster})

    slow = [row for row in theirs if "compiled" in row]
    for group in ([row for row in theirs if row not in slow], *([row] for row in slow)):
      for row in (mine, *group) * ROUNDS:
        try:
          if row not in failed:
            own() if row == mine else other(row)
        except Exception as error:  # such as no memory or no compiler: the others go on
          failed.add(row)
          ready.pop(row, None)
          if row not in times:
            self.say.failed(row, measure.reason(error))
    for row in times:
      if row != mine:
        compare(row)  # now with all of our times
    return times

  def turn(self, row: str, make: Callable, ready: dict, times: dict, flops: float) -> None:
    """Measures one row of PyTorch."""
    self.peer.free()
    if row not in ready:
      ready[row] = make()
      self.peer.wait(ready[row]())
      self.peer.free()
    found = measure.timed(ready[row], self.peer.wait, count=4, seconds=4.0)
    times.setdefault(row, []).extend(found)
    self.row(row, times[row], flops, self.peer.peak())
    self.peer.free()

  def row(self, name: str, times: list[float], flops: float, peak: int | None = None) -> None:
    """The cells of a row: time, share of the chip's peak, and memory."""
    cells = {"time": measure.spread(times, "s")}
    if self.peak_flops:
      cells["MFU"] = measure.percent(flops / self.peak_flops / measure.median(times))
    if peak:
      cells["PyTorch's peak"] = measure.gib(peak)
    self.say.cells(name, cells)

  def forward(self) -> None:
    """Compares a step of the rollout with a forward pass of as many rows."""
    import torch

    peer, rows, mine = self.peer, self.work.chunk_rows, "forward: ours"

    @functools.cache  # made at the first turn, so that a failure concerns that row alone
    def network():
      made = peer.network(self.model, self.tiny, torch.bfloat16).eval()
      return made, peer.inputs(self.model, made, self.tiny, rows, torch.bfloat16)

    def call(change: Callable) -> Callable:
      made, given = network()
      return peer.forward(change(made), given)

    theirs = {"eager": lambda: call(lambda made: made)}
    if self.model == "sd":
      theirs["compiled"] = lambda: call(peer.compiled)
    else:
      theirs["compiled blocks"] = lambda: call(peer.compiled_blocks)
    named = {f"forward: diffusers, {kind}": make for kind, make in theirs.items()}
    steps, flops = self.work.steps, dict.fromkeys([mine, *named], self.forward_flops)
    note = f"a rollout / {steps} steps of {rows} rows, with the sampler's arithmetic"
    self.say.row(mine, note=note)
    times = self.turns(self.ours.rollout, named, mine, flops, steps, lambda _, seconds: seconds)
    if self.model == "sd":
      self.last(network)
    self.forward_times = {name: measure.median(values) for name, values in times.items()}

  def last(self, network: Callable) -> None:
    """Channels last changes the network in place, so this row comes last."""
    import torch

    row = "forward: diffusers, eager, channels last"
    try:
      made, given = network()
      made.to(memory_format=torch.channels_last)
      call = self.peer.forward(made, self.peer.channels_last(given))
      self.peer.wait(call())
      times = measure.timed(call, self.peer.wait, count=8, seconds=4.0)
    except Exception as error:  # the training is still to be measured
      self.say.failed(row, measure.reason(error))
    else:
      self.row(row, times, self.forward_flops, self.peer.peak())

  def training(self) -> None:
    """Compares a microbatch of the update with a forward and a backward pass of as many rows."""
    import torch

    peer, work, mine = self.peer, self.work, "training: ours"

    @functools.cache
    def network():
      made = peer.trainable(self.model, self.tiny)
      dtype = torch.float32 if self.model == "sd" else torch.bfloat16
      return made, peer.inputs(self.model, made, self.tiny, work.microbatch_rows, dtype)

    def step(checkpointing: bool, change: Callable = lambda made: made) -> Callable:
      made, given = network()
      call = peer.step(change(made), given)

      def run():
        peer.checkpoint(made, checkpointing)  # the next turn may have another one
        return call()

      return run

    theirs = {"eager, checkpointing": lambda: step(True), "eager": lambda: step(False)}
    if self.model == "sd":
      theirs["compiled, checkpointing"] = lambda: step(True, peer.compiled)
    named = {f"training: diffusers, {kind}": make for kind, make in theirs.items()}
    flops = dict.fromkeys(named, self.step_flops) | {mine: self.update_flops / work.microbatches}
    note = f"an update / {work.microbatches} microbatches of {work.microbatch_rows} rows, in it"
    self.say.row(mine, note=f"{note} {work.old_passes} more forward passes and the optimizer")
    words = f"{work.microbatches} of them and {work.old_passes} forward passes over our update"
    for name in named:
      self.say.row(name, note=f"forward and backward; faster: {words}")
    self.turns(self.ours.update, named, mine, flops, work.microbatches, self.whole)

  def whole(self, row: str, seconds: float) -> float | None:
    """PyTorch's time for all passes of an update, divided by the number of its microbatches.

    None where the forward pass, which is part of it, was not measured.
    """
    kind = "compiled" if "compiled" in row else "eager"
    wanted = f"forward: diffusers, {kind}"
    passes = [time for name, time in self.forward_times.items() if name.startswith(wanted)]
    if self.work.old_passes and not passes:
      return None
    extra = self.work.old_passes * passes[0] if passes else 0.0
    return seconds + extra / self.work.microbatches

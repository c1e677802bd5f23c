"""The calls of an update: in which order its programs are called, and with what."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import numpy as np

from dancegrpo_jax.rl.optimize import Sums, Work
from dancegrpo_jax.rl.state import TrainState
from dancegrpo_jax.types import Conditioning, PyTree


class Inputs(NamedTuple):
  """What an update reads and does not change, in the order in which its programs take it.

  Attributes:
    frozen: parameters that are not trained.
    reference: in place of the trained parameters, what a KL penalty holds to; None without one.
    conditioning: one row for each prompt.
  """

  frozen: PyTree
  reference: PyTree | None
  conditioning: Conditioning


class UpdateCall(NamedTuple):
  """One call of a program in an update.

  Attributes:
    name: "remember", "accumulate", "first_step" or "step".
    update: number of the optimizer step, from 0.
    start: first microbatch of the call; 0 for a step, which goes through none.
    stop: one past its last microbatch; 0 for a step.
  """

  name: str
  update: int
  start: int = 0
  stop: int = 0


def bounds(microbatches: int, most: int) -> list[tuple[int, int]]:
  """Cuts microbatches into calls.

  Args:
    microbatches: how many there are.
    most: how many one call may go through; 0 for all.

  Returns:
    (start, stop) of each call.
  """
  size = most or max(microbatches, 1)
  return [(start, min(start + size, microbatches)) for start in range(0, microbatches, size)]


def listed(names: Collection[str], updates: int, microbatches: int, most: int) -> list[UpdateCall]:
  """The calls of an update in their order, without "deal" and "summary".

  Args:
    names: of the programs that there are.
    updates: optimizer steps.
    microbatches: of an optimizer step.
    most: microbatches of one call; 0 for all.
  """
  calls = []
  if "remember" in names:
    for start, stop in bounds((updates - 1) * microbatches, most):
      calls.append(UpdateCall("remember", 0, start, stop))
  for update in range(updates):
    for start, stop in bounds(microbatches, most):
      calls.append(UpdateCall("accumulate", update, start, stop))
    is_first = update == 0 and "first_step" in names
    calls.append(UpdateCall("first_step" if is_first else "step", update))
  return calls


def run(
  programs: dict[str, Callable],
  before: TrainState,
  inputs: Inputs,
  dealt: tuple[Work, Sums],
  most: int,
  stop: Callable[[], bool] = lambda: False,
) -> tuple[TrainState, dict[str, Any]] | None:
  """Takes the optimizer steps of an iteration, call by call.

  Args:
    programs: of `update.update_programs`.
    before: the state. With several optimizer steps it stays valid until the last one is dispatched.
      With a single one it is donated to it.
    inputs: what the update reads.
    dealt: what the program "deal" returned.
    most: microbatches of one call; 0 for all.
    stop: asked before each call that goes through microbatches but the first, when the call before
      it is done. True gives the iteration up.

  Returns:
    The state after the update, and metrics. None where the iteration was given up: `before` is then
    still valid.
  """
  work, sums = dealt
  updates, microbatches = jax.tree.leaves(work.items)[0].shape[:2]
  after = before
  for number, call in enumerate(listed(programs, updates, microbatches, most)):
    program = programs[call.name]
    update, start, end = (np.int32(x) for x in (call.update, call.start, call.stop))
    if call.name in ("first_step", "step"):
      after, sums = program(after, sums, update)
      continue
    if number > 0:
      jax.block_until_ready(sums.loss)
      if stop():
        return None
    if call.name == "remember":
      fixed = (inputs.frozen, inputs.conditioning, work)
      sums = program(before.trainable, *fixed, sums, start, end)
    else:
      sums = program(after.trainable, *inputs, work, sums, update, start, end)
  return after, programs["summary"](after, sums)

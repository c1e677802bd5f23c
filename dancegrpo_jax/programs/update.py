"""Programs of an update: its work, and the calls that go through it. See rl/optimize.py."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from dancegrpo_jax.devices import sharding
from dancegrpo_jax.pipelines.base import Pipeline
from dancegrpo_jax.programs.jitted import program
from dancegrpo_jax.programs.sampling import guided
from dancegrpo_jax.rl import algorithms, optimize, state
from dancegrpo_jax.rl.optimize import Sums, Work
from dancegrpo_jax.rl.policy import policy_of
from dancegrpo_jax.rl.rollout import Rollout
from dancegrpo_jax.rl.state import TrainState, learning_rate, optimizer_of
from dancegrpo_jax.types import Conditioning, PyTree


def update_programs(
  config: ConfigDict,
  pipeline: Pipeline,
  mesh: jax.sharding.Mesh,
  state_shardings: TrainState | None,
) -> dict[str, Callable]:
  """The programs of an update, by name. Those that hand on `Sums` donate them.

  deal: `(trainable, rollouts, prompt_ids [P], advantage [B'], weight [B'], chosen [B'], iteration)
    -> (Work, Sums)`.
  remember: `(trainable, frozen, conditioning, Work, Sums, start, stop) -> Sums`: some microbatches
    of the pass over the policy as it was; absent where the algorithm needs none.
  accumulate: `(trainable, frozen, reference, conditioning, Work, Sums, update, start, stop) ->
    Sums`: gradients of some microbatches.
  first_step: `(TrainState, Sums, update) -> (TrainState, Sums)`: an optimizer step that leaves the
    state before it valid, so that the iteration can still be given up; absent where it is the only
    one.
  step: the same, and donates the state.
  summary: `(TrainState, Sums) -> metrics`, after the last step.

  Args:
    config: validated.
    pipeline: the model family's functions.
    mesh: the devices.
    state_shardings: of the TrainState; None where these programs are not called.
  """
  kind, optimizer = algorithms.kind_of(config), optimizer_of(config)
  policy = policy_of(config, pipeline.prediction)
  denoise = guided(pipeline, config.sampler.guidance_scale)
  ema_decay, updates = config.ema.decay, config.optimizer.updates_per_iteration

  def algorithm(
    frozen: PyTree, conditioning: Conditioning | None, reference: PyTree | None = None
  ) -> optimize.Algorithm:
    def policy_output(trainable: PyTree, x: Array, time: Array, prompt: Int[Array, "m"]) -> Array:
      return denoise(state.variables(frozen, trainable), x, time, conditioning, prompt)

    schedule = pipeline.schedule(policy.steps, config.sampler.shift)
    return kind.build(config, policy_output, schedule, policy, reference)

  def deal(
    trainable: PyTree,
    rollouts: tuple[Rollout, ...],
    prompt_ids: Int[Array, "prompts"],
    advantage: Array,
    weight: Array,
    chosen: Int[Array, "selected"],
    iteration: Int[Array, ""],
  ) -> tuple[Work, Sums]:
    numbers = chosen.reshape(config.mesh.lanes, -1)
    prompt = numbers // config.rollout.samples_per_prompt
    sample = numbers % config.rollout.samples_per_prompt
    seen = algorithms.Experience(
      rollouts=rollouts,
      prompt=prompt,
      advantage=advantage,
      weight=weight,
      chosen=chosen if config.advantage.best_of else None,
    )
    keys = kind.keys(config.seed, iteration, prompt_ids[prompt].reshape(-1), sample.reshape(-1))
    batch = kind.batch(config, seen)
    return optimize.begin(algorithm({}, None), trainable, batch, keys)

  def remember(trainable, frozen, conditioning, work, sums, start, stop) -> Sums:
    learned = algorithm(frozen, conditioning)
    return optimize.remember(learned, trainable, work, sums, start, stop)

  def accumulate(
    trainable, frozen, reference, conditioning, work, sums, update, start, stop
  ) -> Sums:
    learned = algorithm(frozen, conditioning, reference)
    return optimize.accumulate(learned, trainable, work, sums, update, start, stop)

  def step(before: TrainState, sums: Sums, update: Int[Array, ""]) -> tuple[TrainState, Sums]:
    return optimize.step(optimizer, ema_decay, before, sums, update)

  def summary(after: TrainState, sums: Sums) -> dict[str, Array]:
    rate = learning_rate(config)(after.step - sums.finite.sum())
    found = optimize.metrics(algorithm({}, None), sums)
    return found | {"learning_rate": rate, "optimizer/skipped_total": after.skipped}

  work, sums = _shardings(kind, mesh, state_shardings and state_shardings.trainable)
  after_step = (state_shardings, sums)
  # function, shardings of what it returns, donated arguments
  listed: dict[str, tuple[Callable, Any, tuple[int, ...]]] = {
    "deal": (deal, (work, sums), ()),
    "accumulate": (accumulate, sums, (5,)),
    "step": (step, after_step, (0, 1)),
    "summary": (summary, sharding.replicated(mesh), ()),
  }
  if updates > 1:
    listed["first_step"] = (step, after_step, (1,))
    if algorithm({}, None).remember is not None:
      listed["remember"] = (remember, sums, (4,))
  return {
    name: program(
      config, f"update {name}", function, out_shardings=shardings, donate_argnums=donated
    )
    for name, (function, shardings, donated) in listed.items()
  }


def _shardings(
  kind: algorithms.AlgorithmKind, mesh: jax.sharding.Mesh, trainable: PyTree
) -> tuple[Work, Sums]:
  """Lanes are split over the devices wherever they are; sums over them are whole everywhere."""
  whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)

  def at(axis: int | None) -> jax.sharding.Sharding:
    if axis is None:
      return whole
    return jax.NamedSharding(mesh, jax.P(*(None,) * axis, *split.spec))

  third = at(2)  # [updates, microbatches, lanes or items of all lanes]
  work = Work(
    batch=kind.batch_type(**{name: at(axis) for name, axis in kind.lane_axes.items()}),
    items=third,
    totals=whole,
  )
  sums = Sums(
    remembered=third,
    gradient=trainable,
    loss=whole,
    statistics=third,
    losses=whole,
    norms=whole,
    finite=whole,
  )
  return work, sums


def bounds(count: int, most: int) -> list[tuple[int, int]]:
  """(start, stop) of calls that go through `count` microbatches, at most `most` in one; 0: all."""
  size = most or max(count, 1)
  return [(start, min(start + size, count)) for start in range(0, count, size)]


def run(
  programs: dict[str, Callable],
  before: TrainState,
  frozen: PyTree,
  reference: PyTree | None,
  conditioning: Conditioning,
  dealt: tuple[Work, Sums],
  most: int,
  stop: Callable[[], bool] = lambda: False,
) -> tuple[TrainState, dict[str, Any]] | None:
  """An iteration's optimizer steps, call by call.

  Args:
    programs: of `update_programs`.
    before: the state. It stays valid until the last optimizer step is dispatched where there are
      several, and is donated to it where there is one.
    frozen: parameters that are not trained.
    reference: of a KL penalty, or None.
    conditioning: one row a prompt.
    dealt: what the program "deal" returned.
    most: microbatches of one call, 0 for all.
    stop: asked between two calls, when the first of them is done; True gives the iteration up.

  Returns:
    The state after and metrics; None where the iteration was given up, and `before` is what holds.
  """
  work, sums = dealt
  updates, microbatches = jax.tree.leaves(work.items)[0].shape[:2]
  after, is_begun = before, False

  def asked(sums: Sums) -> bool:
    nonlocal is_begun
    if not is_begun:  # nothing of this update is queued yet
      is_begun = True
      return False
    jax.block_until_ready(sums.loss)
    return stop()

  if "remember" in programs:
    for start, end in bounds((updates - 1) * microbatches, most):
      if asked(sums):
        return None
      sums = programs["remember"](
        before.trainable, frozen, conditioning, work, sums, np.int32(start), np.int32(end)
      )
  for update in range(updates):
    number = np.int32(update)
    for start, end in bounds(microbatches, most):
      if asked(sums):
        return None
      sums = programs["accumulate"](
        after.trainable,
        frozen,
        reference,
        conditioning,
        work,
        sums,
        number,
        np.int32(start),
        np.int32(end),
      )
    is_first = update == 0 and "first_step" in programs
    after, sums = programs["first_step" if is_first else "step"](after, sums, number)
  return after, programs["summary"](after, sums)

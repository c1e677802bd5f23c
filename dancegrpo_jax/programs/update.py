"""Programs of an update: its work, and the calls that go through it. See rl/optimize.py."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int
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

# (frozen, conditioning, reference) -> the algorithm of a run
AlgorithmOf = Callable[[PyTree, Conditioning | None, PyTree | None], optimize.Algorithm]


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
  algorithm_of = _algorithm_of(config, pipeline)
  work, sums = _shardings(config, mesh, state_shardings and state_shardings.trainable)
  after_step = (state_shardings, sums)
  step = _step(config)
  # function, shardings of what it returns, donated arguments
  listed: dict[str, tuple[Callable, Any, tuple[int, ...]]] = {
    "deal": (_deal(config, algorithm_of), (work, sums), ()),
    "accumulate": (_accumulate(algorithm_of), sums, (5,)),
    "step": (step, after_step, (0, 1)),
    "summary": (_summary(config, algorithm_of), sharding.replicated(mesh), ()),
  }
  if config.optimizer.updates_per_iteration > 1:
    listed["first_step"] = (step, after_step, (1,))
  if algorithms.kind_of(config).remembers(config):
    listed["remember"] = (_remember(algorithm_of), sums, (4,))
  return {
    name: program(
      config, f"update {name}", function, out_shardings=shardings, donate_argnums=donated
    )
    for name, (function, shardings, donated) in listed.items()
  }


def _algorithm_of(config: ConfigDict, pipeline: Pipeline) -> AlgorithmOf:
  kind = algorithms.kind_of(config)
  policy = policy_of(config, pipeline.prediction)
  denoise = guided(pipeline, config.sampler.guidance_scale)

  def algorithm_of(
    frozen: PyTree, conditioning: Conditioning | None, reference: PyTree | None
  ) -> optimize.Algorithm:
    def policy_output(trainable: PyTree, x: Array, time: Array, prompt: Int[Array, "m"]) -> Array:
      return denoise(state.variables(frozen, trainable), x, time, conditioning, prompt)

    schedule = pipeline.schedule(policy.steps, config.sampler.shift)
    return kind.build(config, policy_output, schedule, policy, reference)

  return algorithm_of


def _deal(config: ConfigDict, algorithm_of: AlgorithmOf) -> Callable:
  kind = algorithms.kind_of(config)

  def deal(
    trainable: PyTree,
    rollouts: tuple[Rollout, ...],
    prompt_ids: Int[Array, "prompts"],
    advantage: Float[Array, "selected"],
    weight: Float[Array, "selected"],
    chosen: Int[Array, "selected"],
    iteration: Int[Array, ""],
  ) -> tuple[Work, Sums]:
    numbers = chosen.reshape(config.mesh.lanes, -1)
    prompt = numbers // config.rollout.samples_per_prompt
    sample = numbers % config.rollout.samples_per_prompt
    experience = algorithms.Experience(
      rollouts=rollouts,
      prompt=prompt,
      advantage=advantage,
      weight=weight,
      chosen=chosen if config.advantage.best_of else None,
    )
    ids = prompt_ids[prompt].reshape(-1)
    keys = kind.keys(config.seed, iteration, ids, sample.reshape(-1))
    algorithm = algorithm_of({}, None, None)  # what it reads of the networks isn't called here
    return optimize.begin(algorithm, trainable, kind.batch(config, experience), keys)

  return deal


def _remember(algorithm_of: AlgorithmOf) -> Callable:
  def remember(
    trainable: PyTree,
    frozen: PyTree,
    conditioning: Conditioning,
    work: Work,
    sums: Sums,
    start: Int[Array, ""],
    stop: Int[Array, ""],
  ) -> Sums:
    algorithm = algorithm_of(frozen, conditioning, None)
    return optimize.remember(algorithm, trainable, work, sums, start, stop)

  return remember


def _accumulate(algorithm_of: AlgorithmOf) -> Callable:
  def accumulate(
    trainable: PyTree,
    frozen: PyTree,
    reference: PyTree | None,
    conditioning: Conditioning,
    work: Work,
    sums: Sums,
    update: Int[Array, ""],
    start: Int[Array, ""],
    stop: Int[Array, ""],
  ) -> Sums:
    algorithm = algorithm_of(frozen, conditioning, reference)
    return optimize.accumulate(algorithm, trainable, work, sums, update, start, stop)

  return accumulate


def _step(config: ConfigDict) -> Callable:
  optimizer = optimizer_of(config)

  def step(before: TrainState, sums: Sums, update: Int[Array, ""]) -> tuple[TrainState, Sums]:
    return optimize.step(optimizer, config.ema.decay, before, sums, update)

  return step


def _summary(config: ConfigDict, algorithm_of: AlgorithmOf) -> Callable:
  def summary(after: TrainState, sums: Sums) -> dict[str, Array]:
    metrics = optimize.metrics(algorithm_of({}, None, None), sums)
    rate = learning_rate(config)(after.step - sums.finite.sum())
    return metrics | {"learning_rate": rate, "optimizer/skipped_total": after.skipped}

  return summary


def _shardings(config: ConfigDict, mesh: jax.sharding.Mesh, trainable: PyTree) -> tuple[Work, Sums]:
  """A `Work` and a `Sums` of shardings: lanes are split over the devices wherever they are, and
  sums over them are whole everywhere.
  """
  kind = algorithms.kind_of(config)
  whole: Any = sharding.replicated(mesh)
  split = sharding.batch_sharding(mesh)

  def at(axis: int | None) -> jax.sharding.Sharding:
    if axis is None:
      return whole
    return jax.NamedSharding(mesh, jax.P(*(None,) * axis, *split.spec))

  third: Any = at(2)  # [updates, microbatches, lanes or items of all lanes]
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


class Call(NamedTuple):
  """One call of a program in an update.

  Attributes:
    name: "remember", "accumulate", "first_step" or "step".
    update: number of the optimizer step, from 0.
    start: first microbatch of the call, and `stop` one past its last; 0 where it has none.
    stop: see `start`.
  """

  name: str
  update: int
  start: int = 0
  stop: int = 0


def calls(names: Collection[str], updates: int, microbatches: int, most: int) -> list[Call]:
  """The calls of an update in their order, without "deal" and "summary".

  Args:
    names: of the programs that there are.
    updates: optimizer steps.
    microbatches: of an optimizer step.
    most: microbatches of one call, 0 for all.
  """
  listed = []
  if "remember" in names:
    for start, stop in bounds((updates - 1) * microbatches, most):
      listed.append(Call("remember", 0, start, stop))
  for update in range(updates):
    for start, stop in bounds(microbatches, most):
      listed.append(Call("accumulate", update, start, stop))
    is_first = update == 0 and "first_step" in names
    listed.append(Call("first_step" if is_first else "step", update))
  return listed


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
    stop: asked between two calls that go through microbatches, when the first of them is done; True
      gives the iteration up.

  Returns:
    The state after and metrics; None where the iteration was given up, and `before` is what holds.
  """
  work, sums = dealt
  updates, microbatches = jax.tree.leaves(work.items)[0].shape[:2]
  after = before
  for number, call in enumerate(calls(programs, updates, microbatches, most)):
    is_step = call.name in ("first_step", "step")
    if number and not is_step:
      jax.block_until_ready(sums.loss)
      if stop():
        return None
    update, start, end = (np.int32(x) for x in (call.update, call.start, call.stop))
    if is_step:
      after, sums = programs[call.name](after, sums, update)
    elif call.name == "remember":
      sums = programs["remember"](before.trainable, frozen, conditioning, work, sums, start, end)
    else:
      sums = programs["accumulate"](
        after.trainable, frozen, reference, conditioning, work, sums, update, start, end
      )
  return after, programs["summary"](after, sums)

"""The programs of an update: rl/optimize.py in pieces, each of which is compiled once.

update_calls.py calls them in their order.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dancegrpo_jax.devices import sharding
from dancegrpo_jax.pipelines.base import Pipeline
from dancegrpo_jax.programs.jitted import program
from dancegrpo_jax.programs.sampling import guided, schedule_of
from dancegrpo_jax.rl import algorithms, lanes, optimize, state
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
  """The programs of an update, by name. P, B' and G are those of `Programs`.

  Args:
    config: validated.
    pipeline: the model family's functions.
    mesh: the devices.
    state_shardings: a TrainState of shardings; None where these programs are not called.

  Returns:
    These programs. Each that takes `Sums` and returns new ones donates its argument.
    deal: `(trainable, rollouts, prompt_ids [P], advantage [B'], weight [B'], chosen [B'],
      iteration) -> (Work, Sums)`. It makes microbatches of the trajectories.
    remember: `(trainable, frozen, conditioning, Work, Sums, start, stop) -> Sums`. It stores what
      the loss needs of the old policy, for some microbatches. It exists where the algorithm needs
      that.
    accumulate: `(trainable, frozen, reference, conditioning, Work, Sums, update, start, stop) ->
      Sums`. It adds the gradients of some microbatches.
    first_step: `(TrainState, Sums, update) -> (TrainState, Sums)`. This optimizer step leaves the
      state before it valid, so that the iteration can still be given up. It exists where several
      optimizer steps are taken.
    step: the same, but it donates the state.
    summary: `(TrainState, Sums) -> metrics`, after the last step.
  """
  algorithm_of = _algorithm_of(config, pipeline)
  work, sums = _shardings(config, mesh, state_shardings and state_shardings.trainable)
  after_step = (state_shardings, sums)
  step = _step(config)
  # By name: the function, the shardings of what it returns, and the positions of donated arguments.
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
  """How the algorithm of a config is made of the arguments of a program."""
  kind = algorithms.kind_of(config)
  policy = policy_of(config, pipeline.prediction)
  guided_output = guided(pipeline, config.sampler.guidance_scale)

  def algorithm_of(
    frozen: PyTree, conditioning: Conditioning | None, reference: PyTree | None
  ) -> optimize.Algorithm:
    def policy_output(trainable: PyTree, x: Array, time: Array, prompt: Int[Array, "m"]) -> Array:
      params = state.variables(frozen, trainable)
      return guided_output(params, x, time, conditioning, prompt)

    schedule = schedule_of(config, pipeline)
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
    group, prompts = config.rollout.samples_per_prompt, len(prompt_ids)
    numbers = chosen.reshape(config.mesh.lanes, -1)
    prompt, sample = numbers // group, numbers % group
    blocks = lanes.blocks(prompts, config.mesh.lanes)
    position = chosen.reshape(blocks, -1) % (prompts * group // blocks)  # in the block
    selected = algorithms.Selected(
      rollouts=rollouts,
      prompt=prompt,
      advantage=advantage,
      weight=weight,
      chosen=position if config.advantage.best_of else None,
    )
    ids = prompt_ids[prompt].reshape(-1)
    keys = kind.keys(config.seed, iteration, ids, sample.reshape(-1))
    algorithm = algorithm_of({}, None, None)  # nothing is called here that needs the networks
    return optimize.begin(algorithm, trainable, kind.batch(config, selected), keys)

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
  """A `Work` and a `Sums` of shardings.

  Whatever has lanes is split over the devices along them. Sums over lanes are whole on every
  device.
  """
  kind = algorithms.kind_of(config)
  whole: Any = sharding.replicated(mesh)
  split = sharding.batch_sharding(mesh)

  def at(axis: int | None) -> jax.sharding.Sharding:
    if axis is None:
      return whole
    return jax.NamedSharding(mesh, jax.P(*(None,) * axis, *split.spec))

  # The axes of items and statistics are [updates, microbatches, lanes or items of all lanes].
  third: Any = at(2)
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

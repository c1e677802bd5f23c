"""The algorithms that `objective.kind` may name: what they need of an iteration, and their loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dancegrpo_jax.diffusion.schedules import Schedule
from dancegrpo_jax.rl import dppo, grpo
from dancegrpo_jax.rl.optimize import Algorithm
from dancegrpo_jax.rl.rollout import Policy, Rollout
from dancegrpo_jax.rl.state import TrainState
from dancegrpo_jax.types import PyTree


class Experience(NamedTuple):
  """What an iteration has seen, as an algorithm makes its batch of it. B' samples are trained.

  Attributes:
    rollouts: one a chunk, in the order of `lanes.deal`.
    prompt: row of the conditioning of each trained sample, in lanes.
    advantage: of the trained samples.
    weight: of the trained samples; 0 for those that are left out.
    chosen: their numbers among all samples, or None where all are trained.
  """

  rollouts: tuple[Rollout, ...]
  prompt: Int[Array, "lanes samples"]
  advantage: Float[Array, "selected"]
  weight: Float[Array, "selected"]
  chosen: Int[Array, "selected"] | None


class AlgorithmKind(NamedTuple):
  """How one kind of training is made from a config.

  Attributes:
    behaviour: `(state) -> parameters` that the rollout samples with.
    batch: `(config, experience) -> batch` of the algorithm.
    batch_type: its NamedTuple.
    lane_axes: `{field: axis}`: where the batch's lanes are, None for arrays without.
    keys: `(seed, iteration, prompt_ids, sample) -> keys` of the algorithm.
    remembers: `(config) -> bool`: whether the algorithm has `remember`. It is asked where there are
      no devices to compute on.
    build: `(config, policy_output, schedule, policy, reference) -> Algorithm`.
  """

  behaviour: Callable[[TrainState], PyTree]
  batch: Callable[[ConfigDict, Experience], Any]
  batch_type: type
  lane_axes: dict[str, int | None]
  keys: Callable[[int, Array, Array, Array], Any]
  remembers: Callable[[ConfigDict], bool]
  build: Callable[[ConfigDict, grpo.PolicyOutput, Schedule, Policy, PyTree | None], Algorithm]


def objective_of(config: ConfigDict) -> grpo.Objective:
  """The static choices that GRPO and its relatives share."""
  return grpo.Objective(
    old_log_prob=config.objective.old_log_prob,
    timesteps=config.objective.timesteps,
    timestep_fraction=config.objective.timestep_fraction,
    kl_weight=config.objective.kl.weight,
    kl_mode=config.objective.kl.mode,
    updates=config.optimizer.updates_per_iteration,
    microbatch=config.optimizer.microbatch,
  )


def _on_trajectories(surrogate_of: Callable[[ConfigDict], grpo.Surrogate]) -> AlgorithmKind:
  """An algorithm on (sample, step) pairs that differs from GRPO in its surrogate alone."""

  def build(
    config: ConfigDict,
    policy_output: grpo.PolicyOutput,
    schedule: Schedule,
    policy: Policy,
    reference: PyTree | None,
  ) -> Algorithm:
    return grpo.algorithm(
      policy_output, schedule, policy, objective_of(config), surrogate_of(config), reference
    )

  def batch(config: ConfigDict, seen: Experience) -> grpo.Batch:
    return grpo.batch_of(**seen._asdict(), count=config.mesh.lanes)

  return AlgorithmKind(
    behaviour=lambda state: state.trainable,
    batch=batch,
    batch_type=grpo.Batch,
    lane_axes=grpo.LANE_AXES,
    keys=grpo.keys_of,
    remembers=lambda config: grpo.remembers(objective_of(config)),
    build=build,
  )


KINDS = {
  "grpo": _on_trajectories(
    lambda config: grpo.clipped(config.objective.clip_range, config.objective.guard)
  ),
  "dppo": _on_trajectories(lambda config: dppo.trust_region(config.objective.dppo.tau)),
}


def kind_of(config: ConfigDict) -> AlgorithmKind:
  """The algorithm that a config names."""
  return KINDS[config.objective.kind]

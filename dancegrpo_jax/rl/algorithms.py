"""The algorithms that `objective.kind` may name: what they read of an iteration, and their loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dancegrpo_jax.diffusion.schedules import Schedule
from dancegrpo_jax.rl import dppo, grpo, trajectories
from dancegrpo_jax.rl.optimize import Algorithm
from dancegrpo_jax.rl.rollout import Policy, Rollout
from dancegrpo_jax.rl.state import TrainState
from dancegrpo_jax.types import PyTree


class Selected(NamedTuple):
  """The samples of an iteration that are trained, from which an algorithm makes its batch.

  Attributes:
    rollouts: of all samples, one for each chunk, in the order of `lanes.deal`.
    prompt: row of the conditioning of each selected sample, in lanes.
    advantage: of each selected sample.
    weight: of each selected sample; 0 for those that are left out after all.
    chosen: positions of the selected samples in their block of lanes (`lanes.blocks`), or None
      where all are selected.
  """

  rollouts: tuple[Rollout, ...]
  prompt: Int[Array, "lanes samples"]
  advantage: Float[Array, "selected"]
  weight: Float[Array, "selected"]
  chosen: Int[Array, "blocks chosen"] | None


class AlgorithmKind(NamedTuple):
  """How an algorithm is made from a config.

  Attributes:
    behaviour: `(state) -> parameters` to sample with in the rollout.
    batch: `(config, selected) -> batch` of the algorithm.
    batch_type: the NamedTuple of the batch.
    lane_axes: `{field: axis}`: which axis of a field of the batch the lanes are; None for a field
      without lanes.
    keys: `(seed, iteration, prompt_ids, sample) -> keys` of the algorithm.
    remembers: `(config) -> bool`: whether the algorithm has `remember`. This must not compute
      anything: programs are also listed for devices that are not there.
    build: `(config, policy_output, schedule, policy, reference) -> Algorithm`.
  """

  behaviour: Callable[[TrainState], PyTree]
  batch: Callable[[ConfigDict, Selected], Any]
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

  def batch(config: ConfigDict, selected: Selected) -> trajectories.Batch:
    return trajectories.batch_of(**selected._asdict(), count=config.mesh.lanes)

  return AlgorithmKind(
    behaviour=lambda state: state.trainable,
    batch=batch,
    batch_type=trajectories.Batch,
    lane_axes=trajectories.LANE_AXES,
    keys=trajectories.keys_of,
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

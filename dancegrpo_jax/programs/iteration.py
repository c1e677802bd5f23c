"""The programs of an iteration, and how they are built from a config."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from dancegrpo_jax.devices import sharding
from dancegrpo_jax.pipelines.base import Pipeline
from dancegrpo_jax.programs.jitted import program
from dancegrpo_jax.programs.rewards import advantages_program, join_program, score_program
from dancegrpo_jax.programs.sampling import rollout_program, sample_program
from dancegrpo_jax.programs.update import update_programs
from dancegrpo_jax.rewards.base import Reward
from dancegrpo_jax.rl.rollout import Rollout
from dancegrpo_jax.types import PyTree


class Programs(NamedTuple):
  """The iteration's compiled functions. P prompts, G samples each, B = P G; sample number b is
  sample b % G of prompt b // G.

  Attributes:
    encode: `(frozen, inputs) -> rows`, on every device; inputs are those of `Pipeline.prepare`.
    rollout: `(trainable, frozen, conditioning, prompt_ids [P], numbers [chunk], iteration) ->
      Rollout`.
    sample: `(trainable, frozen, conditioning, prompt_ids [P], numbers [chunk], seed) -> latents`,
      deterministic sampler.
    decode: `(frozen, latents) -> Media`.
    features: `(reward params, prepared) -> features`, per device reward.
    score: `(reward params, Media, features, prompt [chunk]) -> {term: f32[chunk]}`, per device
      reward.
    join: `({term: [f32[chunk], ..]}, order [B]) -> {term: f32[P, G]}`: the chunks' scores, sample
      by sample.
    advantages: `(scores {term: [P, G]}, prompt_ids, prompt_stats) -> (advantage [B'], weight [B'],
      chosen [B'], stats, metrics)`.
    update: by name, see `update.update_programs`; `update.run` calls them.
  """

  encode: Callable
  rollout: Callable
  sample: Callable
  decode: Callable
  features: dict[str, Callable]
  score: dict[str, Callable]
  join: Callable
  advantages: Callable
  update: dict[str, Callable]


def build(
  config: ConfigDict,
  pipeline: Pipeline,
  rewards: dict[str, Reward],
  mesh: jax.sharding.Mesh,
  state_shardings: PyTree,
) -> Programs:
  """All programs of a run.

  Args:
    config: validated.
    pipeline: the model family's functions.
    rewards: by name.
    mesh: the devices; the caller has entered it with `jax.set_mesh`.
    state_shardings: of the TrainState.
  """
  split: Any = sharding.batch_sharding(mesh)
  whole: Any = sharding.replicated(mesh)
  steps_first: Any = jax.NamedSharding(mesh, jax.P(None, *split.spec))
  rolled = Rollout(step_index=whole, latents=steps_first, log_probs=steps_first, sample=split)
  device = {name: reward for name, reward in rewards.items() if reward.kind == "device"}

  def each(kind: str, function_of: Callable, rewards: dict[str, Reward]) -> dict[str, Callable]:
    return {
      name: program(config, f"{kind} {name}", function_of(reward), out_shardings=whole)
      for name, reward in rewards.items()
    }

  return Programs(
    encode=encoder(config, pipeline, mesh),
    rollout=program(config, "rollout", rollout_program(config, pipeline), out_shardings=rolled),
    sample=program(config, "sample", sample_program(config, pipeline), out_shardings=split),
    decode=program(config, "decode", pipeline.decode, out_shardings=split),
    features=each("features", lambda reward: reward.features, device),
    score=each("score", score_program, device),
    join=program(config, "join", join_program(config), out_shardings=whole),
    advantages=program(config, "advantages", advantages_program(config), out_shardings=whole),
    update=update_programs(config, pipeline, mesh, state_shardings),
  )


def encoder(config: ConfigDict, pipeline: Pipeline, mesh: jax.sharding.Mesh) -> Callable:
  """`(params of the encoders, inputs) -> rows`, on every device."""
  return program(config, "encode", pipeline.encode, out_shardings=sharding.replicated(mesh))

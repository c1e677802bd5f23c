"""The compiled functions of an iteration, and how they are built from a config."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from dancegrpo_jax.devices import sharding
from dancegrpo_jax.pipelines.base import Pipeline
from dancegrpo_jax.programs.jitted import program
from dancegrpo_jax.programs.rewards import advantages_program, join_program, score_program
from dancegrpo_jax.programs.sampling import decode_program, rollout_program, sample_program
from dancegrpo_jax.programs.update import update_programs
from dancegrpo_jax.rewards.base import Reward
from dancegrpo_jax.rl.rollout import Rollout
from dancegrpo_jax.types import PyTree


class Programs(NamedTuple):
  """The compiled functions of an iteration.

  There are P prompts with G samples each, so B = P G samples. Sample number b is sample b % G of
  prompt b // G. B' of them are trained.

  Attributes:
    encode: `(frozen, inputs) -> rows`, whole on every device; inputs are those of
      `Pipeline.prepare`.
    rollout: `(trainable, frozen, conditioning, prompt_ids [P], numbers [chunk], iteration) ->
      Rollout` of the samples with these numbers.
    sample: `(trainable, frozen, conditioning, noise_ids [chunk], prompt [chunk], seed) -> latents`
      of the deterministic sampler; `prompt` are rows of the conditioning.
    decode: `(frozen, latents) -> Media`.
    features: by device reward, `(reward params, prepared) -> features` of prompts.
    score: by device reward, `(reward params, Media, features, prompt [chunk]) -> {term:
      f32[chunk]}`; `prompt` are rows of the features.
    join: `({term: [f32[chunk], ...]}, order [B]) -> {term: f32[P, G]}`: puts the scores of the
      chunks into the order of the samples.
    advantages: `({term: f32[P, G]}, prompt_ids [P], prompt_stats) -> (advantage [B'], weight [B'],
      chosen [B'], prompt_stats, metrics)`.
    update: the programs of an update by name, see `update.update_programs`.
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
    state_shardings: a TrainState of shardings.
  """
  split: Any = sharding.batch_sharding(mesh)
  whole: Any = sharding.replicated(mesh)
  steps_first: Any = jax.NamedSharding(mesh, jax.P(None, *split.spec))
  rolled = Rollout(step_index=whole, latents=steps_first, log_probs=steps_first, sample=split)

  def of_rewards(kind: str, function_of: Callable) -> dict[str, Callable]:
    """A program for each reward that is a network."""
    return {
      name: program(config, f"{kind} {name}", function_of(reward), out_shardings=whole)
      for name, reward in rewards.items()
      if reward.kind == "device"
    }

  return Programs(
    encode=encoder(config, pipeline, mesh),
    rollout=program(config, "rollout", rollout_program(config, pipeline), out_shardings=rolled),
    sample=program(config, "sample", sample_program(config, pipeline), out_shardings=split),
    decode=program(config, "decode", decode_program(config, pipeline, mesh), out_shardings=split),
    features=of_rewards("features", lambda reward: reward.features),
    score=of_rewards("score", score_program),
    join=program(config, "join", join_program(config), out_shardings=whole),
    advantages=program(config, "advantages", advantages_program(config), out_shardings=whole),
    update=update_programs(config, pipeline, mesh, state_shardings),
  )


def encoder(config: ConfigDict, pipeline: Pipeline, mesh: jax.sharding.Mesh) -> Callable:
  """`(params of the encoders, inputs) -> rows`, whole on every device."""
  return program(config, "encode", pipeline.encode, out_shardings=sharding.replicated(mesh))

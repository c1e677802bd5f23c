"""Programs that draw samples: the rollout of training, the deterministic sampler, and decoding."""

from collections.abc import Callable
from math import prod

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dancegrpo_jax.diffusion import schedules, windows
from dancegrpo_jax.diffusion.guidance import classifier_free
from dancegrpo_jax.pipelines.base import Pipeline
from dancegrpo_jax.rl import rng, state
from dancegrpo_jax.rl.policy import policy_of
from dancegrpo_jax.rl.rollout import Rollout, rollout
from dancegrpo_jax.types import SAMPLE_AXES, Conditioning, Media, PyTree


def guided(pipeline: Pipeline, scale: float) -> Callable:
  """The pipeline's denoiser with classifier-free guidance, for conditioning of one row a prompt.

  Args:
    pipeline: the model family's functions.
    scale: of the guidance; 1 for none.

  Returns:
    `(params, x [b, ...], model_time [b], conditioning of P rows, prompt [b]) -> output [b, ...]`.
    Rows are gathered by `prompt` inside, so that all samples of a prompt share one row.
  """

  def guided_output(
    params: PyTree, x: Array, time: Array, conditioning: Conditioning, prompt: Int[Array, "b"]
  ) -> Array:
    branches = classifier_free(lambda x, time, rows: pipeline.denoise(params, x, time, rows), scale)
    return branches(x, time, jax.tree.map(lambda rows: rows[prompt], conditioning))

  return guided_output


def schedule_of(config: ConfigDict, pipeline: Pipeline) -> schedules.Schedule:
  """The grid of the training sampler, the same in rollout and update."""
  schedule = pipeline.schedule(config.sampler.steps, config.sampler.shift)
  return schedules.whole_times(schedule) if config.sampler.whole_times else schedule


def rollout_program(config: ConfigDict, pipeline: Pipeline) -> Callable:
  """The rollout of training, see `Programs.rollout`."""
  policy = policy_of(config, pipeline.prediction)
  guided_output = guided(pipeline, config.sampler.guidance_scale)
  group, shape = config.rollout.samples_per_prompt, pipeline.latent_shape
  shared = config.rollout.shared_noise

  def run(
    trainable: PyTree,
    frozen: PyTree,
    conditioning: Conditioning,
    prompt_ids: Int[Array, "prompts"],
    numbers: Int[Array, "chunk"],
    iteration: Int[Array, ""],
  ) -> Rollout:
    # The keys are made here, where they are only traced: `plan` lists programs for devices that are
    # not there, on which nothing can be computed.
    noise_key = rng.stream(config.seed, "initial_noise")
    step_key = rng.stream(config.seed, "step_noise")
    window_key = rng.derive(rng.stream(config.seed, "window"), iteration)
    params = state.variables(frozen, trainable)
    prompt, sample = numbers // group, numbers % group
    ids = prompt_ids[prompt]

    def network_output(x: Array, time: Array) -> Array:
      return guided_output(params, x, time, conditioning, prompt)

    def step_noise(i: Int[Array, ""]) -> Array:
      return rng.step_noise(step_key, iteration, ids, sample, i, shape=shape)

    return rollout(
      network_output=network_output,
      schedule=schedule_of(config, pipeline),
      policy=policy,
      start=windows.window(config.sampler.window, policy.policy_steps, iteration, window_key),
      initial=rng.initial_noise(noise_key, iteration, ids, sample, shared=shared, shape=shape),
      step_noise=step_noise,
    )

  return run


def sample_program(config: ConfigDict, pipeline: Pipeline) -> Callable:
  """The deterministic sampler, see `Programs.sample`: for sample.py, evaluate.py and the grids of
  the report. Its noise has a seed of its own, which training never uses.
  """
  guided_output, steps = guided(pipeline, config.sampler.guidance_scale), config.evaluation.steps
  policy = policy_of(config, pipeline.prediction)._replace(steps=steps, window=0, last_step="ode")
  shape = pipeline.latent_shape

  def run(
    trainable: PyTree,
    frozen: PyTree,
    conditioning: Conditioning,
    noise_ids: Int[Array, "chunk"],
    prompt: Int[Array, "chunk"],
    seed: Int[Array, ""],
  ) -> Float[Array, "chunk *shape"]:
    params = state.variables(frozen, trainable)
    key = rng.derive(rng.stream(0, "evaluation"), seed)

    def network_output(x: Array, time: Array) -> Array:
      return guided_output(params, x, time, conditioning, prompt)

    drawn = rollout(
      network_output=network_output,
      schedule=pipeline.schedule(steps, config.sampler.shift),
      policy=policy,
      initial=rng.initial_noise(key, 0, noise_ids, noise_ids, shared=True, shape=shape),
      step_noise=jnp.zeros_like,  # is not called: no step is stochastic
    )
    return drawn.sample

  return run


def decode_program(config: ConfigDict, pipeline: Pipeline, mesh: jax.sharding.Mesh) -> Callable:
  """The decoder, see `Programs.decode`.

  Each device decodes at most `config.model.decode_batch` of its samples at once, or all of them
  where this is 0.
  """
  devices = prod(mesh.shape[axis] for axis in SAMPLE_AXES)

  def run(params: PyTree, latents: Float[Array, "chunk *shape"]) -> Media:
    size = _batch(len(latents) // devices, config.model.decode_batch)
    rounds = len(latents) // (devices * size)
    if rounds <= 1:
      return pipeline.decode(params, latents)
    # A device has consecutive samples, so that neither these steps nor their inverse move any.
    by_round = latents.reshape(devices, rounds, size, *latents.shape[1:]).swapaxes(0, 1)
    by_round = by_round.reshape(rounds, devices * size, *latents.shape[1:])
    split = jax.NamedSharding(mesh, jax.P(None, SAMPLE_AXES))
    by_round = jax.lax.with_sharding_constraint(by_round, split)
    media = jax.lax.map(lambda some: pipeline.decode(params, some), by_round)
    pixels = media.pixels.reshape(rounds, devices, size, *media.pixels.shape[2:]).swapaxes(0, 1)
    return Media(pixels.reshape(len(latents), *pixels.shape[3:]), media.fps)

  return run


def _batch(samples: int, most: int) -> int:
  """The largest number of samples, at most `most`, that divides `samples`; all for 0."""
  if most == 0:
    return max(1, samples)
  return max(size for size in range(1, max(1, min(most, samples)) + 1) if samples % size == 0)

"""Programs that draw samples: the rollout of training, and the deterministic sampler."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from dancegrpo_jax.diffusion import windows
from dancegrpo_jax.diffusion.guidance import classifier_free
from dancegrpo_jax.pipelines.base import Pipeline
from dancegrpo_jax.rl import rng, state
from dancegrpo_jax.rl.policy import policy_of
from dancegrpo_jax.rl.rollout import Rollout, rollout
from dancegrpo_jax.types import Conditioning, PyTree


def guided(pipeline: Pipeline, scale: float) -> Callable:
  """`(params, x, model_time, conditioning of P rows, prompt [b]) -> output`, rows gathered where
  they are used.
  """

  def denoise(
    params: PyTree, x: Array, time: Array, conditioning: Conditioning, prompt: Int[Array, "b"]
  ) -> Array:
    branch = classifier_free(lambda x, time, rows: pipeline.denoise(params, x, time, rows), scale)
    return branch(x, time, jax.tree.map(lambda rows: rows[prompt], conditioning))

  return denoise


def rollout_program(config: ConfigDict, pipeline: Pipeline) -> Callable:
  """The rollout of training."""
  policy = policy_of(config, pipeline.prediction)
  denoise = guided(pipeline, config.sampler.guidance_scale)
  group, shape = config.rollout.samples_per_prompt, pipeline.latent_shape

  def run(
    trainable,
    frozen,
    conditioning: Conditioning,
    prompt_ids: Array,
    numbers: Int[Array, "chunk"],
    iteration,
  ) -> Rollout:
    # Here and not outside: nothing is computed where programs are only compiled (`plan`), on
    # devices that aren't there.
    streams = {
      name: rng.stream(config.seed, name) for name in ("initial_noise", "step_noise", "window")
    }
    params = state.variables(frozen, trainable)
    schedule = pipeline.schedule(policy.steps, config.sampler.shift)
    prompt, sample = numbers // group, numbers % group
    ids = prompt_ids[prompt]
    shared = config.rollout.shared_noise
    initial = rng.initial_noise(
      streams["initial_noise"], iteration, ids, sample, shared=shared, shape=shape
    )
    start = windows.window(
      config.sampler.window,
      policy.policy_steps,
      iteration,
      rng.derive(streams["window"], iteration),
    )
    return rollout(
      lambda x, time: denoise(params, x, time, conditioning, prompt),
      schedule,
      policy,
      start,
      initial,
      lambda i: rng.step_noise(streams["step_noise"], iteration, ids, sample, i, shape=shape),
    )

  return run


def sample_program(config: ConfigDict, pipeline: Pipeline) -> Callable:
  """The deterministic sampler on noise of its own seed: what sample.py, evaluate.py and the
  report's grids use.
  """
  denoise, steps = guided(pipeline, config.sampler.guidance_scale), config.evaluation.steps
  policy = policy_of(config, pipeline.prediction)._replace(steps=steps, window=0, last_step="ode")

  def run(
    trainable,
    frozen,
    conditioning: Conditioning,
    noise_ids: Int[Array, "chunk"],
    prompt: Int[Array, "chunk"],
    seed,
  ):
    params = state.variables(frozen, trainable)
    schedule = pipeline.schedule(steps, config.sampler.shift)
    stream = rng.derive(rng.stream(0, "evaluation"), seed)
    initial = rng.initial_noise(
      stream, 0, noise_ids, noise_ids, shared=True, shape=pipeline.latent_shape
    )
    drawn = rollout(
      lambda x, time: denoise(params, x, time, conditioning, prompt),
      schedule,
      policy,
      0,
      initial,
      jnp.zeros_like,
    )
    return drawn.sample

  return run

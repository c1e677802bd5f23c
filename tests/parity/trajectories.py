"""A 30-step DDIM trajectory and its log-probs, by diffusers and by us.

The reduced-width and the full-size test share this module. Nothing of ours is in the reference:
diffusers' network and scheduler make its states, and its log-probs are computed in float64
throughout, including the network, the grid and the density.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch_parity import nchw, nhwc, run

from dancegrpo_jax.checkpoints import components
from dancegrpo_jax.pipelines import stable_diffusion
from dancegrpo_jax.pipelines.base import ModelSettings, Pipeline
from dancegrpo_jax.rl.grpo import score
from dancegrpo_jax.rl.rollout import Policy, Rollout, rollout
from dancegrpo_jax.rl.trajectories import Transitions

STEPS = 30
# The fixtures' names for the files of a pipeline.
FILES = {"unet": "unet", "vae": "vae", "text_encoder": "text", "scheduler": "scheduler"}


class Inputs(NamedTuple):
  """Inputs of a trajectory.

  These are initial latents `[b, h, w, c]`, the noise of every step, and text states `[b, tokens,
  width]`.
  """

  initial: np.ndarray
  noise: np.ndarray
  context: np.ndarray


def draw_inputs(config: dict, batch: int, side: int, tokens: int) -> Inputs:
  rng, shape = np.random.default_rng(0), (batch, side, side, config["in_channels"])
  sizes = (shape, (STEPS, *shape), (batch, tokens, config["cross_attention_dim"]))
  return Inputs(*(rng.standard_normal(size, np.float32) for size in sizes))


def their_states(
  theirs: UNet2DConditionModel, scheduler_json: dict, inputs: Inputs, eta: float
) -> np.ndarray:
  """States `[STEPS + 1, b, h, w, c]` of the scheduler's loop, including diffusers' last step."""
  scheduler = DDIMScheduler.from_config(scheduler_json)
  scheduler.set_timesteps(STEPS)
  x = torch.from_numpy(nchw(inputs.initial))
  context = torch.from_numpy(inputs.context)
  states = [inputs.initial]
  for noise, time in zip(inputs.noise, scheduler.timesteps, strict=True):
    with torch.no_grad():
      output = theirs(x, time, context).sample
    noise = torch.from_numpy(nchw(noise)) if eta else None
    x = scheduler.step(output, time, x, eta=eta, variance_noise=noise).prev_sample
    states.append(nhwc(x))
  return np.stack(states)


def grid(scheduler_json: dict) -> tuple[np.ndarray, np.ndarray]:
  """Times and alpha_bar of the grid in float64.

  Leading spacing, with the scaled-linear betas of arXiv 2112.10752.
  """
  ends = scheduler_json["beta_start"] ** 0.5, scheduler_json["beta_end"] ** 0.5
  alpha_bar = np.cumprod(1 - np.linspace(*ends, 1000) ** 2)
  times = np.arange(STEPS)[::-1] * (1000 // STEPS) + scheduler_json["steps_offset"]
  return times, np.append(alpha_bar[times], alpha_bar[0])


def policy_std(alpha_bar: np.ndarray) -> np.ndarray:
  """The std of every step: arXiv 2010.02502, eq. (16) with eta 1."""
  here, there = alpha_bar[:-1], alpha_bar[1:]
  return np.sqrt((1 - there) / (1 - here)) * np.sqrt(1 - here / there)


def log_prob_of_noise(scheduler_json: dict, noise: np.ndarray) -> np.ndarray:
  """`[STEPS, b]`: the mean log-density of `mean + std * noise`, which no mean changes."""
  std = policy_std(grid(scheduler_json)[1])
  squares = np.square(np.float64(noise)).mean(axis=(2, 3, 4))
  return -squares / 2 - np.log(std)[:, None] - np.log(2 * np.pi) / 2


def log_prob_of_states(
  theirs: UNet2DConditionModel, scheduler_json: dict, inputs: Inputs, states, steps
) -> np.ndarray:
  """`[len(steps), b]`: the mean log-density of the trajectory's steps, by a float64 network.

  The mean is alpha' x0 + sqrt(1 - alpha'^2 - std^2) epsilon (arXiv 2010.02502, eq. (12)).
  """
  (times, alpha_bar), context = grid(scheduler_json), torch.from_numpy(inputs.context).double()
  std, result = policy_std(alpha_bar), []
  for k in steps:
    x, x_next = np.float64(states[k]), np.float64(states[k + 1])
    with torch.no_grad():
      output = nhwc(theirs(torch.from_numpy(nchw(x)), torch.tensor(times[k]), context).sample)
    assert output.dtype == np.float64
    alpha, sigma = alpha_bar[k] ** 0.5, (1 - alpha_bar[k]) ** 0.5
    if scheduler_json.get("prediction_type", "epsilon") == "epsilon":
      x0, epsilon = (x - sigma * output) / alpha, output
    else:
      x0, epsilon = alpha * x - sigma * output, alpha * output + sigma * x
    mean = alpha_bar[k + 1] ** 0.5 * x0 + np.sqrt(1 - alpha_bar[k + 1] - std[k] ** 2) * epsilon
    squares = np.square((x_next - mean) / std[k]).mean(axis=(1, 2, 3))
    result.append(-squares / 2 - np.log(std[k]) - np.log(2 * np.pi) / 2)
  return np.stack(result)


class Reference(NamedTuple):
  """Diffusers' results: states with eta 0 and 1, and log-probs of `steps` with eta 1."""

  plain: np.ndarray
  noisy: np.ndarray
  log_probs: np.ndarray


def reference(
  network: Callable[[torch.dtype], UNet2DConditionModel],
  scheduler_json: dict,
  inputs: Inputs,
  steps,
) -> Reference:
  """Computes the `Reference`.

  `network` makes the network in a given precision; only one is in memory at a time.
  """
  theirs = network(torch.float32)
  plain, noisy = (their_states(theirs, scheduler_json, inputs, eta) for eta in (0.0, 1.0))
  del theirs
  log_probs = log_prob_of_states(network(torch.float64), scheduler_json, inputs, noisy, steps)
  return Reference(plain, noisy, log_probs)


def no_tokens(texts: list[str]) -> np.ndarray:
  raise AssertionError("text states are given")


def our_pipeline(jsons: dict[str, dict], side: int) -> Pipeline:
  """Our pipeline in float32, without a tokenizer because text states are given."""
  size = (2 ** (len(jsons["vae"]["block_out_channels"]) - 1) * side,) * 2
  types = {"dtype": "float32", "frozen_dtype": "float32"}
  return stable_diffusion.build(jsons, {"tokenizer": no_tokens}, ModelSettings(size=size, **types))


class Ours(NamedTuple):
  """Our rollouts with eta 0 and 1, and the log-probs of the reference's `steps` with eta 1."""

  plain: Rollout
  noisy: Rollout
  log_probs: np.ndarray


def our_results(
  pipeline: Pipeline, folder: Path, inputs: Inputs, states: np.ndarray, steps
) -> Ours:
  """Our results with the weights that diffusers saved in `folder`/unet, read by our loader."""
  params = {
    "denoiser": components.read_component(str(folder), pipeline.components["denoiser"], None)
  }
  schedule = pipeline.schedule(STEPS, 1.0)

  def policy(window: int) -> Policy:
    return Policy(
      "ddim", 1.0, pipeline.prediction, STEPS, window, "ode", "sde" if window else "ode", "mean"
    )

  def roll(params, initial, noise, context, window):
    def denoise(x, time):
      return pipeline.denoise(params, x, time, context)

    return rollout(denoise, schedule, policy(window), initial, lambda i: noise[i])

  def scored(params, context, t: Transitions):
    def denoise(params, x, time, prompt):
      return pipeline.denoise(params, x, time, context[prompt])

    return score(denoise, schedule, policy(STEPS), params, t).log_prob

  plain, noisy = (
    run(
      lambda p, *x, window=window: roll(p, *x, window),
      params,
      inputs.initial,
      inputs.noise,
      inputs.context,
    )
    for window in (0, STEPS)
  )
  batch = len(inputs.initial)
  rows, zeros = np.arange(batch, dtype=np.int32), np.zeros(batch, np.float32)
  log_probs = [
    run(
      scored,
      params,
      inputs.context,
      Transitions(np.full(batch, k, np.int32), *states[k : k + 2], zeros, rows, zeros, zeros),
    )
    for k in steps
  ]
  return Ours(plain, noisy, np.stack(log_probs))


def check(
  measured, ours: Ours, theirs: Reference, scheduler_json: dict, noise: np.ndarray, bound: float
) -> None:
  """Checks states and log-probs.

  States must agree to `bound` of their largest value, log-probs to a tenth of the ratios' clip
  range of 1e-4.
  """
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((ours, theirs)))
  measured("eta 0, after 30 steps", relative(ours.plain.sample, theirs.plain[-1]), bound)
  errors = [relative(*states) for states in zip(ours.noisy.latents, theirs.noisy, strict=True)]
  measured("eta 1, after 30 steps", errors[-1], bound)
  measured("eta 1, worst of 30 steps", max(errors), bound)
  np.testing.assert_array_equal(ours.noisy.sample, ours.noisy.latents[-1])
  expected = log_prob_of_noise(scheduler_json, noise)
  measured(
    "rollout's log-probs against float64", np.abs(ours.noisy.log_probs - expected).max(), 1e-5
  )
  measured(
    "update's log-probs against float64", np.abs(ours.log_probs - theirs.log_probs).max(), 1e-5
  )


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
  """max |a - b| / max |b|."""
  return float(np.abs(ours - theirs).max() / np.abs(theirs).max())

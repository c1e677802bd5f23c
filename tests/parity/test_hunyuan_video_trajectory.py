"""A whole trajectory of HunyuanVideo's recipe and its log-probs, by diffusers' network and by ours.

Nothing of ours is in the reference: diffusers' network makes its states, and the grid, DanceGRPO's
step (train_grpo_hunyuan.py, flux_step) and its density are written here in float64.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint
import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch_parity import run

from dancegrpo_jax.assembly import loading
from dancegrpo_jax.checkpoints import components
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.programs.sampling import schedule_of
from dancegrpo_jax.rl.grpo import score
from dancegrpo_jax.rl.policy import policy_of
from dancegrpo_jax.rl.rollout import rollout
from dancegrpo_jax.rl.trajectories import Transitions

STEPS, SHIFT, LEVEL = 16, 5.0, 0.25  # finetune_hunyuan_grpo.sh
TOLD_GUIDANCE = 6016.0  # 6018 in bfloat16
BATCH, TEXT = 2, 7
RECIPE = {
  "sampler__kind": "dance",
  "sampler__noise_level": LEVEL,
  "sampler__steps": STEPS,
  "sampler__shift": SHIFT,
  "sampler__embedded_guidance": 6.016,
  "sampler__last_step": "ode",
}


class Inputs(NamedTuple):
  """Initial latents, the noise of every step, and the text, of which 3 and 7 states are valid."""

  initial: np.ndarray
  noise: np.ndarray
  rows: dict[str, np.ndarray]


class Trajectory(NamedTuple):
  """States `[STEPS + 1, b, f, h, w, c]` and the log-probs `[STEPS - 1, b]` of the first steps."""

  states: np.ndarray
  log_probs: np.ndarray


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny_checkpoint.write_hunyuan_video(tmp_path_factory.mktemp("hunyuan"))


def draw_inputs(shape: tuple[int, ...], network: dict) -> Inputs:
  rng = np.random.default_rng(0)
  rows = {
    "text": rng.standard_normal((BATCH, TEXT, network["text_embed_dim"]), np.float32),
    "lengths": np.array([3, TEXT], np.int32),
    "pooled": rng.standard_normal((BATCH, network["pooled_projection_dim"]), np.float32),
  }
  return Inputs(
    initial=rng.standard_normal((BATCH, *shape), np.float32),
    noise=rng.standard_normal((STEPS, BATCH, *shape), np.float32),
    rows=rows,
  )


def times_and_sigmas(whole: bool) -> tuple[np.ndarray, np.ndarray]:
  """The grid: sigma = 5 s / (1 + 4 s), and 1000 sigma as a time, cut to whole numbers or not."""
  s = 1 - np.arange(STEPS + 1) / STEPS
  sigmas = SHIFT * s / (1 + (SHIFT - 1) * s)
  return (np.trunc(1000 * sigmas) if whole else 1000 * sigmas), sigmas


def velocity_of(theirs: HunyuanVideoTransformer3DModel, rows: dict[str, np.ndarray]):
  """`(x, time) -> velocity` in the network's precision."""
  dtype = theirs.dtype
  mask = np.arange(TEXT)[None] < rows["lengths"][:, None]

  def velocity(x: np.ndarray, time: float) -> np.ndarray:
    with torch.no_grad():
      output = theirs(
        hidden_states=torch.from_numpy(np.moveaxis(x, -1, 1).copy()).to(dtype),
        timestep=torch.full((BATCH,), time, dtype=dtype),
        encoder_hidden_states=torch.from_numpy(rows["text"]).to(dtype),
        encoder_attention_mask=torch.from_numpy(mask),
        pooled_projections=torch.from_numpy(rows["pooled"]).to(dtype),
        guidance=torch.full((BATCH,), TOLD_GUIDANCE, dtype=dtype),
      ).sample
    return np.moveaxis(output.numpy(), 1, -1)

  return velocity


def mean_of(x: np.ndarray, v: np.ndarray, sigma: float, after: float, level: float) -> np.ndarray:
  """Where the SDE's drift leads: x + v dt - level^2 / 2 score dt, with x0 = x - sigma v."""
  score_of = -(x - (1 - sigma) * (x - sigma * v)) / sigma**2
  return x + (v - level**2 / 2 * score_of) * (after - sigma)


def reference(folder, inputs: Inputs, whole: bool) -> Trajectory:
  """diffusers' trajectory in float32, and its log-probs by the network in float64."""
  theirs = HunyuanVideoTransformer3DModel.from_pretrained(folder / "transformer").eval()
  times, sigmas = times_and_sigmas(whole)
  velocity = velocity_of(theirs, inputs.rows)
  states = [np.float64(inputs.initial)]
  for k in range(STEPS):
    level = LEVEL if k < STEPS - 1 else 0.0  # the last step adds no noise
    x, v = states[-1], np.float64(velocity(states[-1], times[k]))
    std = level * np.sqrt(sigmas[k] - sigmas[k + 1])
    states.append(mean_of(x, v, sigmas[k], sigmas[k + 1], level) + std * inputs.noise[k])
  states = np.float32(states)
  velocity = velocity_of(theirs.double(), inputs.rows)
  log_probs = []
  for k in range(STEPS - 1):
    x = np.float64(states[k])
    mean = mean_of(x, velocity(x, times[k]), sigmas[k], sigmas[k + 1], LEVEL)
    std = LEVEL * np.sqrt(sigmas[k] - sigmas[k + 1])
    squares = np.square((states[k + 1] - mean) / std).mean(axis=(1, 2, 3, 4))
    log_probs.append(-squares / 2 - np.log(std) - np.log(2 * np.pi) / 2)
  return Trajectory(states, np.stack(log_probs))


def ours(folder, inputs: Inputs, states: np.ndarray, **changes) -> tuple[Trajectory, np.ndarray]:
  """Our rollout, and the log-probs that an update gives to the reference's states."""
  config = tiny_checkpoint.video_config(folder, **(RECIPE | changes))
  pipeline = loading.build_pipeline(config)
  params = {
    "denoiser": components.read_component(str(folder), pipeline.components["denoiser"], None)
  }
  schedule = schedule_of(config, pipeline)
  policy = policy_of(config, pipeline.prediction)

  def roll(params, initial, noise, rows):
    def network_output(x, time):
      return pipeline.denoise(params, x, time, rows)

    return rollout(
      network_output=network_output,
      schedule=schedule,
      policy=policy,
      initial=initial,
      step_noise=lambda i: noise[i],
    )

  def update_scores(params, rows, t):
    def policy_output(params, x, time, prompt):
      return pipeline.denoise(params, x, time, {name: row[prompt] for name, row in rows.items()})

    return score(policy_output, schedule, policy, params, t).log_prob

  drawn = run(roll, params, *inputs)
  numbers, zeros = np.arange(BATCH, dtype=np.int32), np.zeros(BATCH, np.float32)
  scores = []
  for k in range(STEPS - 1):
    t = Transitions(
      step=np.full(BATCH, k, np.int32),
      x=states[k],
      x_next=states[k + 1],
      rollout_log_prob=zeros,
      prompt=numbers,
      advantage=zeros,
      weight=zeros,
    )
    scores.append(run(update_scores, params, inputs.rows, t))
  latents = np.concatenate([drawn.latents, drawn.sample[None]])
  return Trajectory(latents, drawn.log_probs), np.stack(scores)


@pytest.mark.parametrize("whole", [False, True], ids=["exact times", "whole times"])
def test_a_trajectory_and_its_log_probs(folder, measured, whole):
  """States agree to the bound of a trajectory, log-probs to a tenth of the clip range of 1e-4."""
  config = tiny_checkpoint.video_config(folder, **RECIPE)
  shape = loading.build_pipeline(config).latent_shape
  inputs = draw_inputs(shape, tiny_checkpoint.HUNYUAN_VIDEO)
  theirs = reference(folder, inputs, whole)
  mine, update = ours(folder, inputs, theirs.states, sampler__whole_times=whole)
  assert mine.states.shape == theirs.states.shape and mine.log_probs.shape == update.shape
  worst = max(
    tiny_checkpoint.relative_error(*states)
    for states in zip(mine.states, theirs.states, strict=True)
  )
  measured("worst of 16 steps", worst, 1e-5)
  # A rollout's log-prob depends on the noise of its step alone, whatever the mean is.
  squares = np.square(np.float64(inputs.noise[:-1])).mean(axis=(2, 3, 4, 5))
  _, sigmas = times_and_sigmas(whole)
  std = LEVEL * np.sqrt(sigmas[:-2] - sigmas[1:-1])
  expected = -squares / 2 - np.log(std)[:, None] - np.log(2 * np.pi) / 2
  measured("rollout's log-probs against float64", np.abs(mine.log_probs - expected).max(), 1e-5)
  measured("update's log-probs against float64", np.abs(update - theirs.log_probs).max(), 1e-5)


def test_the_network_is_told_the_published_guidance():
  """1000 times the embedded guidance, in float32, is the bfloat16 number of the published code."""
  assert float(jnp.bfloat16(6018)) == TOLD_GUIDANCE
  assert np.float32(6.016) * np.float32(1000) == TOLD_GUIDANCE


def test_whole_times_are_those_of_rollout_and_update(folder):
  """12 of the 16 times have a fraction, so the switch would be seen if it did nothing."""
  times, _ = times_and_sigmas(whole=False)
  config = tiny_checkpoint.video_config(folder, **RECIPE, sampler__whole_times=True)
  pipeline = loading.build_pipeline(config)
  np.testing.assert_array_equal(schedule_of(config, pipeline).model_time, np.trunc(times))
  assert (times[:-1] != np.trunc(times[:-1])).sum() == 12


def test_whole_times_that_meet_are_refused(folder):
  """Of 600 steps some are closer than 1 to each other."""
  changes = RECIPE | {"sampler__steps": 600, "sampler__whole_times": True}
  config = tiny_checkpoint.video_config(folder, **changes)
  with pytest.raises(ConfigError) as caught:
    loading.build_pipeline(config)
  assert str(caught.value) == (
    "config.sampler.whole_times = True: two of the 600 steps get the same time; use False"
  )

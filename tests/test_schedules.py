"""Grids: against diffusers' DDIMScheduler and the closed form of the flow shift."""

import jax
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from dancegrpo_jax.diffusion.schedules import (
  diffusion_schedule,
  flow_schedule,
  point,
  resolution_shift,
)

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
FLUX = {"base_tokens": 256, "max_tokens": 4096, "base_shift": 0.5, "max_shift": 1.15}


def sd_schedule(
  steps, beta_schedule="scaled_linear", spacing="leading", steps_offset=1, set_alpha_to_one=False
):
  return diffusion_schedule(
    steps,
    beta_schedule=beta_schedule,
    spacing=spacing,
    steps_offset=steps_offset,
    set_alpha_to_one=set_alpha_to_one,
    **SD,
  )


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(
  "spacing, offset", [("leading", 1), ("leading", 0), ("trailing", 0), ("linspace", 0)]
)
@pytest.mark.parametrize("to_one", [False, True])
def test_grid_is_that_of_diffusers(beta_schedule, spacing, offset, to_one):
  theirs = DDIMScheduler(
    beta_schedule=beta_schedule,
    timestep_spacing=spacing,
    steps_offset=offset,
    set_alpha_to_one=to_one,
    **SD,
  )
  for steps in (1, 3, 10, 50):
    theirs.set_timesteps(steps)
    ours = sd_schedule(steps, beta_schedule, spacing, offset, to_one)
    np.testing.assert_array_equal(ours.model_time[:-1], theirs.timesteps.numpy())
    alpha_bar = (
      torch.cat([theirs.alphas_cumprod[theirs.timesteps], theirs.final_alpha_cumprod[None]])
      .double()
      .numpy()
    )
    # Their alpha_bar is a product in float32.
    np.testing.assert_allclose(np.square(ours.alpha, dtype=np.float64), alpha_bar, rtol=5e-5)
    np.testing.assert_allclose(np.square(ours.sigma, dtype=np.float64), 1 - alpha_bar, atol=2e-6)


def test_stable_diffusion_grid():
  schedule = sd_schedule(50)
  np.testing.assert_array_equal(schedule.model_time[:-1], np.arange(981, 0, -20))
  # alpha_bar[0] = 1 - beta_start
  assert float(schedule.sigma[-1]) == pytest.approx(0.00085**0.5, rel=1e-5)
  assert schedule.alpha.dtype == schedule.sigma.dtype == schedule.model_time.dtype == np.float32


def test_flow_grid():
  np.testing.assert_allclose(flow_schedule(4, 1.0).sigma, [1, 0.75, 0.5, 0.25, 0])
  shifted = flow_schedule(4, 3.0)
  np.testing.assert_allclose(shifted.sigma, [1, 0.9, 0.75, 0.5, 0], rtol=1e-6)
  np.testing.assert_allclose(shifted.alpha, [0, 0.1, 0.25, 0.5, 1], rtol=1e-6)
  np.testing.assert_allclose(shifted.model_time, [1000, 900, 750, 500, 0], rtol=1e-6)
  assert float(flow_schedule(1, 5.0, 1).model_time[0]) == 1.0
  assert float(flow_schedule(3, 1.0).model_time[1]) == pytest.approx(2000 / 3, rel=1e-6)


@pytest.mark.parametrize("tokens, mu", [(256, 0.5), (4096, 1.15), (2176, 0.825), (64, 0.4675)])
def test_shift_by_resolution(tokens, mu):
  """FLUX.1-dev: linear through (256, 0.5) and (4096, 1.15), and beyond."""
  assert resolution_shift(tokens, **FLUX) == pytest.approx(np.exp(mu), rel=1e-12)
  assert resolution_shift(tokens, **FLUX, kind="linear") == pytest.approx(mu, rel=1e-12)


def test_point_takes_a_traced_index():
  schedule = flow_schedule(4, 3.0)
  got = jax.jit(point)(schedule, 2)
  np.testing.assert_allclose(np.stack(got), [0.25, 0.75, 0.5, 0.5], rtol=1e-6)
  last = point(schedule, 3)
  assert (float(last.alpha_next), float(last.sigma_next)) == (1.0, 0.0)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: sd_schedule(0), "steps is 0"),
    (lambda: sd_schedule(1001), "steps is 1001"),
    (lambda: sd_schedule(1000), "starts at time 1000"),
    (lambda: sd_schedule(10, beta_schedule="cosine"), "beta_schedule is 'cosine'"),
    (lambda: sd_schedule(10, spacing="even"), "spacing is 'even'"),
    (lambda: flow_schedule(0, 1.0), "steps=0"),
    (lambda: flow_schedule(4, 0.0), "shift=0.0"),
    (lambda: resolution_shift(256, **FLUX, kind="cubic"), "'cubic', must be exponential or linear"),
  ],
)
def test_mistakes_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()

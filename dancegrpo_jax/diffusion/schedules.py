"""Sampling grids: at which noise levels a sample is denoised.

A grid runs from noisy to clean and has N + 1 points for N network calls: call i goes from point i
to point i + 1, and the last point is where sampling ends. Everywhere x = alpha * x0 + sigma * eps.
Grids are computed in float64 on the host and stored in float32.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "trailing", "linspace")


class Schedule(NamedTuple):
  """A sampling grid, noisy to clean.

  Attributes:
    model_time: `[N + 1]` what the network is given as time; the last entry is never evaluated.
    alpha: `[N + 1]` factor of the clean sample.
    sigma: `[N + 1]` factor of the noise.
  """

  model_time: Float[Array, "points"]
  alpha: Float[Array, "points"]
  sigma: Float[Array, "points"]


class Point(NamedTuple):
  """One step of a grid: from (alpha, sigma) to (alpha_next, sigma_next), the primed symbols of the
  equations.
  """

  alpha: Float[Array, "*batch"]
  sigma: Float[Array, "*batch"]
  alpha_next: Float[Array, "*batch"]
  sigma_next: Float[Array, "*batch"]


def point(schedule: Schedule, i: Int[Array, "*batch"] | int) -> Point:
  """Step `i` of `schedule`, 0 <= i < N; `i` may be traced (an index out of range is clamped there,
  as JAX does).
  """
  return Point(schedule.alpha[i], schedule.sigma[i], schedule.alpha[i + 1], schedule.sigma[i + 1])


def diffusion_schedule(
  steps: int,
  *,
  num_train_timesteps: int,
  beta_start: float,
  beta_end: float,
  beta_schedule: str,
  spacing: str,
  steps_offset: int,
  set_alpha_to_one: bool,
  rescale_betas_zero_snr: bool = False,
) -> Schedule:
  """Grid of a variance-preserving diffusion model (alpha^2 + sigma^2 = 1), named as in diffusers'
  `DDIMScheduler`.

  A step ends at the next point of the grid. (diffusers steps by `num_train_timesteps // steps`
  instead, which is the same for leading spacing, and for trailing spacing where `steps` divides
  `num_train_timesteps`.)

  Args:
    steps: N, network calls a sample.
    num_train_timesteps: length of the training chain, 1000 for Stable Diffusion.
    beta_start: first beta; "squaredcos_cap_v2" ignores it.
    beta_end: last beta; "squaredcos_cap_v2" ignores it.
    beta_schedule: "linear", "scaled_linear" (linear in sqrt(beta)) or "squaredcos_cap_v2".
    spacing: "leading", "trailing" or "linspace" (arXiv 2305.08891, table 2).
    steps_offset: added to the times of leading spacing.
    set_alpha_to_one: the grid ends at alpha = 1 instead of the chain's first alpha.
    rescale_betas_zero_snr: the chain ends in pure noise, alpha = 0, see `zero_terminal_snr`.

  Raises:
    ValueError: an unknown name, or a number of steps that the chain doesn't have.
  """
  alpha_bar = alphas_cumprod(num_train_timesteps, beta_start, beta_end, beta_schedule)
  if rescale_betas_zero_snr:
    alpha_bar = zero_terminal_snr(alpha_bar)
  times = _training_times(steps, num_train_timesteps, spacing, steps_offset)
  alpha_bar = np.append(alpha_bar[times], 1.0 if set_alpha_to_one else alpha_bar[0])
  return _schedule(np.append(times, 0), np.sqrt(alpha_bar), np.sqrt(1.0 - alpha_bar))


def flow_schedule(steps: int, shift: float = 1.0, num_train_timesteps: int = 1000) -> Schedule:
  """Grid of a rectified-flow model: alpha = 1 - sigma, sigma from 1 to 0.

  sigma = k s / (1 + (k - 1) s) with s = linspace(1, 0, N + 1) and the time shift k (arXiv
  2403.03206, eq. 23). The model time is sigma * num_train_timesteps, not truncated to an integer.

  Args:
    steps: N, network calls a sample.
    shift: k; above 1 there are more steps at high noise.
    num_train_timesteps: the model time of pure noise; 1 for a network whose time is sigma itself.

  Raises:
    ValueError: fewer than one step, or a shift that isn't positive.
  """
  if steps < 1 or shift <= 0:
    raise ValueError(
      f"a flow grid needs steps >= 1 and shift > 0, got steps={steps}, shift={shift}"
    )
  s = np.linspace(1.0, 0.0, steps + 1)
  sigma = shift * s / (1.0 + (shift - 1.0) * s)
  return _schedule(sigma * num_train_timesteps, 1.0 - sigma, sigma)


def whole_times(schedule: Schedule) -> Schedule:
  """The schedule with model times that are cut to whole numbers, as DanceGRPO's code gives them to
  its networks (train_grpo_hunyuan.py, train_grpo_flux.py). The noise levels stay as they are.
  """
  return schedule._replace(model_time=jnp.floor(schedule.model_time))


def resolution_shift(
  tokens: int,
  *,
  base_tokens: int,
  max_tokens: int,
  base_shift: float,
  max_shift: float,
  kind: str = "exponential",
) -> float:
  """The time shift k of `flow_schedule` for a sample of this many tokens (FLUX.1-dev's, named as in
  its scheduler's config).

  mu is linear in the tokens, `base_shift` at `base_tokens` and `max_shift` at `max_tokens`; k =
  exp(mu), or mu itself where `kind` is "linear".

  Raises:
    ValueError: an unknown kind.
  """
  if kind not in ("exponential", "linear"):
    raise ValueError(f"time_shift_type is {kind!r}, must be exponential or linear")
  mu = base_shift + (max_shift - base_shift) * (tokens - base_tokens) / (max_tokens - base_tokens)
  return float(np.exp(mu)) if kind == "exponential" else float(mu)


def _schedule(model_time, alpha, sigma) -> Schedule:
  return Schedule(*(jnp.asarray(values, jnp.float32) for values in (model_time, alpha, sigma)))


def _betas(
  num_train_timesteps: int, beta_start: float, beta_end: float, beta_schedule: str
) -> np.ndarray:
  if beta_schedule == "linear":
    return np.linspace(beta_start, beta_end, num_train_timesteps)
  if beta_schedule == "scaled_linear":
    return np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
  if beta_schedule == "squaredcos_cap_v2":  # arXiv 2102.09672, eq. 17
    edges = np.arange(num_train_timesteps + 1) / num_train_timesteps
    alpha_bar = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
  raise ValueError(
    f"beta_schedule is {beta_schedule!r}, must be one of {', '.join(BETA_SCHEDULES)}"
  )


def alphas_cumprod(
  num_train_timesteps: int, beta_start: float, beta_end: float, beta_schedule: str
) -> np.ndarray:
  """alpha_bar of every training time, float64 `[num_train_timesteps]`; arguments as in
  `diffusion_schedule`.
  """
  return np.cumprod(1.0 - _betas(num_train_timesteps, beta_start, beta_end, beta_schedule))


def zero_terminal_snr(alpha_bar: np.ndarray) -> np.ndarray:
  """Shifts and scales sqrt(alpha_bar) so that its last value is 0 and its first stays (arXiv
  2305.08891, algorithm 1).
  """
  alpha = np.sqrt(alpha_bar)
  return np.square((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1]))


def _training_times(
  steps: int, num_train_timesteps: int, spacing: str, steps_offset: int
) -> np.ndarray:
  """The N training times of the grid, decreasing."""
  if not 1 <= steps <= num_train_timesteps:
    raise ValueError(
      f"steps is {steps}, must lie between 1 and num_train_timesteps = {num_train_timesteps}"
    )
  times: np.ndarray
  if spacing == "leading":
    times = np.arange(steps)[::-1] * (num_train_timesteps // steps) + steps_offset
  elif spacing == "trailing":
    exact = num_train_timesteps - np.arange(steps) * (num_train_timesteps / steps)
    times = np.round(exact).astype(int) - 1
  elif spacing == "linspace":
    times = np.round(np.linspace(0, num_train_timesteps - 1, steps)).astype(int)[::-1]
  else:
    raise ValueError(f"spacing is {spacing!r}, must be one of {', '.join(SPACINGS)}")
  if times[0] >= num_train_timesteps:
    last = num_train_timesteps - 1
    raise ValueError(
      f"steps={steps} with steps_offset={steps_offset} starts at time {times[0]}, beyond the"
      f" chain's {last}"
    )
  return times

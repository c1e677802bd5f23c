"""The rollout against closed forms in float64 and against diffusers' schedulers.

The closed forms are from the tables of the transitions' papers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from dancegrpo_jax.diffusion import schedules
from dancegrpo_jax.rl.rollout import Policy, Rollout, rollout

STEPS, BATCH, SHAPE = 10, 3, (4, 2)
STABLE_DIFFUSION = {
  "num_train_timesteps": 1000,
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
}
# prediction, kind, noise level: every stochastic step of both paradigms
POLICIES = [
  ("velocity", "flow", 0.7),
  ("velocity", "dance", 0.3),
  ("velocity", "cps", 0.8),
  ("epsilon", "ddim", 1.0),
  ("epsilon", "ddim", 0.5),
  ("epsilon", "dance", 0.3),
  ("epsilon", "cps", 0.6),
  ("v", "ddim", 1.0),
]


def make_policy(prediction="velocity", kind="flow", noise_level=0.7, **changes) -> Policy:
  policy = Policy(kind, noise_level, prediction, STEPS, STEPS - 1, "ode", "ode", "mean")
  return policy._replace(**changes)


def grid(prediction: str, steps: int = STEPS) -> schedules.Schedule:
  if prediction == "velocity":
    return schedules.flow_schedule(steps, 1.0)
  return schedules.diffusion_schedule(
    steps, **STABLE_DIFFUSION, spacing="leading", steps_offset=1, set_alpha_to_one=False
  )


def network(seed: int = 0):
  """`(x, time) -> output`: a smooth random function with one hidden layer."""
  rng, size = np.random.default_rng(seed), int(np.prod(SHAPE))
  first, last = rng.standard_normal((size, 16)) / np.sqrt(size), rng.standard_normal((16, size)) / 4
  phase = rng.standard_normal((1, 16))
  first, last, phase = (jnp.asarray(value, jnp.float32) for value in (first, last, phase))

  def denoise(x, time):
    hidden = jnp.tanh(x.reshape(len(x), -1) @ first + jnp.sin(time[:, None] / 100.0 + phase))
    return (hidden @ last).reshape(x.shape)

  return denoise


def draw(seed: int = 1, steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
  """The initial noise, and the noise of every step."""
  rng = np.random.default_rng(seed)
  return rng.standard_normal((BATCH, *SHAPE)).astype(np.float32), rng.standard_normal(
    (steps, BATCH, *SHAPE)
  ).astype(np.float32)


def run(policy: Policy, start=0, seed: int = 1, denoise=None, noise=None) -> Rollout:
  initial, steps = draw(seed, policy.steps)
  steps = jnp.asarray(steps if noise is None else noise)
  function = jax.jit(
    lambda initial: rollout(
      denoise or network(),
      grid(policy.prediction, policy.steps),
      policy,
      initial,
      lambda i: steps[i],
      start,
    )
  )
  return jax.tree.map(np.asarray, function(initial))


def estimates(prediction: str, x, output, alpha, sigma):
  """x0 and epsilon, from the definitions of the three network outputs."""
  if prediction == "velocity":
    return x - sigma * output, x + (1 - sigma) * output
  if prediction == "epsilon":
    return (x - sigma * output) / alpha, output
  return alpha * x - sigma * output, alpha * output + sigma * x


def gaussian(prediction: str, kind: str, level: float, x, output, here, there, first_sigma):
  """Mean and std of a step as in the papers, in float64; here and there are (alpha, sigma)."""
  (alpha, sigma), (alpha2, sigma2) = here, there
  x0, eps = estimates(prediction, x, output, alpha, sigma)
  if kind == "ode":
    return alpha2 * x0 + sigma2 * eps, 0.0
  if kind == "ddim":  # arXiv 2010.02502, eq. (12) and (16)
    std = level * np.sqrt((1 - alpha2**2) / (1 - alpha**2)) * np.sqrt(1 - alpha**2 / alpha2**2)
    return alpha2 * x0 + np.sqrt(1 - alpha2**2 - std**2) * eps, std
  if kind == "cps":  # arXiv 2509.05952
    std = sigma2 * np.sin(level * np.pi / 2)
    return alpha2 * x0 + np.sqrt(sigma2**2 - std**2) * eps, std
  if prediction != "velocity":  # arXiv 2505.07818, eq. (7), in z = x / alpha
    eta, eta2 = sigma / alpha, sigma2 / alpha2
    return alpha2 * (x / alpha + (1 + level**2) * eps * (eta2 - eta)), level * alpha2 * np.sqrt(
      eta**2 - eta2**2
    )
  dt, score = sigma2 - sigma, -eps / sigma
  if kind == "flow":  # arXiv 2505.05470
    level = level * np.sqrt(sigma / (1 - (sigma if sigma < 1 else first_sigma)))
  return x + output * dt - level**2 / 2 * score * dt, level * np.sqrt(-dt)


def points(schedule: schedules.Schedule) -> list[tuple[np.float64, np.float64]]:
  return list(zip(np.float64(schedule.alpha), np.float64(schedule.sigma)))


@pytest.mark.parametrize("prediction, kind, level", POLICIES)
def test_every_state_is_mean_plus_std_times_noise(prediction, kind, level):
  policy, denoise = make_policy(prediction, kind, level), network()
  rolled, (initial, noise), schedule = run(policy), draw(), grid(prediction)
  steps = STEPS - 1  # the last step is deterministic
  assert rolled.latents.shape == (steps + 1, BATCH, *SHAPE) and rolled.latents.dtype == np.float32
  assert rolled.log_probs.shape == (steps, BATCH) and rolled.sample.shape == (BATCH, *SHAPE)
  np.testing.assert_array_equal(rolled.step_index, np.arange(steps))
  np.testing.assert_array_equal(rolled.latents[0], initial)
  at = points(schedule)
  for k in range(steps):
    x = rolled.latents[k]
    output = np.float64(denoise(jnp.asarray(x), jnp.broadcast_to(schedule.model_time[k], BATCH)))
    mean, std = gaussian(prediction, kind, level, np.float64(x), output, at[k], at[k + 1], at[1][1])
    np.testing.assert_allclose(rolled.latents[k + 1], mean + std * np.float64(noise[k]), atol=2e-5)
    # the density of a Gaussian at mean + std * noise, averaged over the dimensions
    expected = (
      -np.square(np.float64(noise[k])).mean((1, 2)) / 2 - np.log(std) - np.log(2 * np.pi) / 2
    )
    np.testing.assert_allclose(rolled.log_probs[k], expected, atol=1e-4)
  x = rolled.latents[-1]
  output = np.float64(denoise(jnp.asarray(x), jnp.broadcast_to(schedule.model_time[steps], BATCH)))
  final, _ = gaussian(prediction, "ode", 0.0, np.float64(x), output, at[steps], at[steps + 1], None)
  np.testing.assert_allclose(rolled.sample, final, atol=2e-5)


def test_sum_reduction_is_the_density_of_all_dimensions():
  mean, total = (run(make_policy(log_prob=reduce)) for reduce in ("mean", "sum"))
  np.testing.assert_allclose(total.log_probs, np.prod(SHAPE) * mean.log_probs, rtol=1e-5)
  np.testing.assert_array_equal(total.sample, mean.sample)


def test_last_step_kinds():
  """x0hat ends at the network's estimate of the clean sample.

  sde makes the last step by the policy, too, and the last state is the sample.
  """
  schedule, denoise = grid("epsilon"), network()
  rolled = run(make_policy("epsilon", "ddim", 1.0, last_step="x0hat"))
  x, (alpha, sigma) = np.float64(rolled.latents[-1]), points(schedule)[-2]
  output = np.float64(
    denoise(jnp.asarray(rolled.latents[-1]), jnp.broadcast_to(schedule.model_time[-2], BATCH))
  )
  np.testing.assert_allclose(rolled.sample, (x - sigma * output) / alpha, atol=2e-5)
  rolled = run(make_policy("epsilon", "ddim", 1.0, last_step="sde", window=STEPS))
  np.testing.assert_array_equal(rolled.sample, rolled.latents[-1])
  assert rolled.log_probs.shape == (STEPS, BATCH) and (rolled.log_probs != 0).all()


@pytest.mark.parametrize(
  "prediction, kind, level", [("velocity", "flow", 0.7), ("epsilon", "ddim", 1.0)]
)
@pytest.mark.parametrize("start", [0, 3, 7])
def test_window_is_stochastic_inside_and_deterministic_outside(prediction, kind, level, start):
  policy, denoise = make_policy(prediction, kind, level, window=2), network()
  rolled, (initial, noise), schedule = run(policy, start), draw(), grid(prediction)
  assert rolled.latents.shape == (3, BATCH, *SHAPE) and rolled.log_probs.shape == (2, BATCH)
  np.testing.assert_array_equal(rolled.step_index, [start, start + 1])
  at, x, kept = points(schedule), np.float64(initial), []
  for i in range(STEPS):
    inside = start <= i < start + 2
    kept += [x] if start <= i <= start + 2 else []
    output = np.float64(denoise(jnp.float32(x), jnp.broadcast_to(schedule.model_time[i], BATCH)))
    mean, std = gaussian(
      prediction, kind if inside else "ode", level, x, output, at[i], at[i + 1], at[1][1]
    )
    x = mean + std * np.float64(noise[i])
  np.testing.assert_allclose(rolled.latents, kept, atol=1e-4)
  np.testing.assert_allclose(rolled.sample, x, atol=1e-4)
  # the noise of the other steps is never used
  outside = np.ones(STEPS, bool)
  outside[start : start + 2] = False
  changed = np.where(outside.reshape(-1, 1, 1, 1), 7.0, noise)
  np.testing.assert_array_equal(run(policy, start, noise=changed).sample, rolled.sample)


def test_a_traced_start_compiles_once_for_all_windows():
  policy, denoise, (initial, noise) = make_policy(window=2), network(), draw()
  steps = jnp.asarray(noise)

  @jax.jit
  def program(start, initial):
    return rollout(denoise, grid("velocity"), policy, initial, lambda i: steps[i], start)

  for start in range(policy.policy_steps - 1):
    traced, static = program(jnp.int32(start), initial), run(policy, start)
    np.testing.assert_array_equal(traced.step_index, [start, start + 1])
    np.testing.assert_allclose(traced.latents, static.latents, atol=1e-6)
    np.testing.assert_allclose(traced.log_probs, static.log_probs, atol=1e-5)
  assert program._cache_size() == 1


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_trajectory_is_that_of_diffusers(eta):
  """Stable Diffusion's grid with 10 steps.

  Eta 0 is `window = 0`. With eta 1 every step takes the same noise, including the last.
  """
  scheduler = DDIMScheduler(
    **STABLE_DIFFUSION, steps_offset=1, set_alpha_to_one=False, clip_sample=False
  )
  scheduler.set_timesteps(STEPS)
  denoise, (initial, noise) = network(), draw()
  np.testing.assert_array_equal(grid("epsilon").model_time[:-1], scheduler.timesteps.numpy())
  x, states = torch.from_numpy(initial), [initial]
  for i, time in enumerate(scheduler.timesteps):
    output = np.array(denoise(jnp.asarray(x.numpy()), jnp.full(BATCH, float(time))))
    x = scheduler.step(
      torch.from_numpy(output),
      time,
      x,
      eta=eta,
      variance_noise=torch.from_numpy(noise[i]) if eta else None,
    ).prev_sample
    states.append(x.numpy())
  if eta:
    rolled = run(make_policy("epsilon", "ddim", eta, window=STEPS, last_step="sde"))
    np.testing.assert_allclose(rolled.latents, states, atol=1e-5 * np.abs(states).max())
  else:
    rolled = run(make_policy("epsilon", "ddim", 1.0, window=0))
    assert (
      rolled.latents.shape[0] == 1
      and rolled.log_probs.shape == (0, BATCH)
      and rolled.step_index.shape == (0,)
    )
  np.testing.assert_allclose(rolled.sample, states[-1], atol=1e-5 * np.abs(states[-1]).max())


SPREAD = 0.5  # g: data x0 ~ N(0, g^2)


def exact_velocity(x, time):
  """E[eps - x0 | x] of Gaussian data, on the grid whose model time is 1000 sigma."""
  sigma = (time / 1000.0).reshape(-1, 1, 1)
  return x * (sigma - (1 - sigma) * SPREAD**2) / ((1 - sigma) ** 2 * SPREAD**2 + sigma**2)


def deterministic_error(steps: int, outside: str) -> float:
  """Error of the exact flow, which maps N(0, 1) to N(0, g^2) by scaling: x_0 = g x_T."""
  policy = make_policy(steps=steps, window=0, outside=outside)
  rolled = run(policy, denoise=exact_velocity)
  return float(np.abs(rolled.sample / draw()[0] - SPREAD).max())


def test_flow_euler_is_the_product_of_its_factors_and_converges():
  sigma = np.linspace(1.0, 0.0, STEPS + 1)
  rate = (sigma - (1 - sigma) * SPREAD**2) / ((1 - sigma) ** 2 * SPREAD**2 + sigma**2)
  factor = np.prod(1 - rate[:-1] / STEPS)  # each step: x + c x dt
  rolled = run(make_policy(window=0), denoise=exact_velocity)
  np.testing.assert_allclose(rolled.sample, factor * draw()[0], rtol=1e-5)
  errors = [deterministic_error(steps, "ode") for steps in (25, 50, 100)]
  assert 1.8 < errors[0] / errors[1] < 2.2 and 1.8 < errors[1] / errors[2] < 2.2


def test_dpm_solver_is_of_second_order():
  errors = [deterministic_error(steps, "dpm++") for steps in (50, 100)]
  assert errors[0] / errors[1] > 2.7  # 4 for a second-order method
  assert errors[1] < deterministic_error(100, "ode") / 5


def test_dpm_solver_outside_the_window_starts_anew_after_it():
  """arXiv 2211.01095, algorithm 2; the window's noise ends the multistep history."""
  start, width = 3, 2
  policy = make_policy(outside="dpm++", window=width)
  rolled = run(policy, start)
  initial, noise = draw()
  denoise = network()
  schedule = grid("velocity")
  at, x, previous = points(schedule), np.float64(initial), None
  with np.errstate(divide="ignore"):
    logs = [np.log(alpha) - np.log(sigma) for alpha, sigma in at]
  for i in range(STEPS):
    (alpha, sigma), (alpha2, sigma2) = at[i], at[i + 1]
    output = np.float64(denoise(jnp.float32(x), jnp.broadcast_to(schedule.model_time[i], BATCH)))
    if start <= i < start + width:
      mean, std = gaussian("velocity", "flow", 0.7, x, output, at[i], at[i + 1], at[1][1])
      x, previous = mean + std * np.float64(noise[i]), None
      continue
    m, h = x - sigma * output, logs[i + 1] - logs[i]
    estimate = m
    if previous is not None and np.isfinite(h):  # the last step, to sigma = 0, is of first order
      m_prev, h_prev = previous
      estimate = m + (m - m_prev) * h / (2 * h_prev) if np.isfinite(h_prev) else m
    x = (
      sigma2 / sigma * x - alpha2 * np.expm1(-h) * estimate
      if np.isfinite(h)
      else alpha2 * m + sigma2 / sigma * (x - alpha * m)
    )
    previous = (m, h)
  np.testing.assert_allclose(rolled.sample, x, atol=1e-4)
  euler = run(policy._replace(outside="ode"), start)
  # Otherwise the comparison would prove nothing.
  assert np.abs(euler.sample - rolled.sample).max() > 1e-3

"""KL-regularised GRPO on one-dimensional Gaussian data ends at the optimum, found by quadrature.

Data N(0, 1) has the exact velocity c(sigma) x. The policy is that velocity plus an affine
correction of each step. The sampler is Flow-GRPO's with a = sqrt 2, and every stochastic step is
trained. Given x_T, the policy with the largest E[r] - beta sum KL ends in p(x_0 | x_T) exp(r /
beta) / Z(x_T), with the reference chain's p. Rollout and update are the project's.

Two effects keep a trained policy from this optimum. First, its steps have the sampler's std,
although the tilt of a curved reward would need smaller ones; the gap is of the order of 1 / steps.
Second, the update differentiates the KL at the visited states, but not the effect of an action on
the KL of later steps. For a linear reward later KLs do not depend on the state; for other rewards
they have to be in the returns.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dancegrpo_jax.diffusion import schedules
from dancegrpo_jax.rl import grpo, optimize, state
from dancegrpo_jax.rl.grpo import Objective
from dancegrpo_jax.rl.rollout import Policy, distribution, rollout
from dancegrpo_jax.rl.trajectories import Batch

BETA, LEVEL = 1.0, 2**0.5
PROMPTS, GROUP, ITERATIONS, RATE = 8, 64, 200, 0.05  # a "prompt" is an x_T that its group shares
SAMPLES = PROMPTS * GROUP
REWARDS = {"linear": lambda x: x, "curved": lambda x: -((x - 1) ** 2)}
X, X_T = np.linspace(-8, 8, 1601), np.linspace(-5, 5, 101)
WEIGHT = np.exp(-(X_T**2) / 2) / np.exp(-(X_T**2) / 2).sum()


def policy_of(steps: int) -> Policy:
  return Policy("flow", LEVEL, "velocity", steps, steps - 1, "ode", "ode", "sum")


def no_correction(steps: int) -> dict:
  return {"slope": jnp.zeros(steps - 1), "shift": jnp.zeros(steps - 1)}


def velocity(params, x, time, prompt=None):
  """Exact velocity of N(0, 1) data plus the correction of the step at `time`."""
  sigma, steps = time[:, None] / 1000, len(params["slope"]) + 1
  i = jnp.round((1 - sigma) * steps).astype(jnp.int32)
  slope, shift = (
    jnp.where(i < steps - 1, params[name][jnp.minimum(i, steps - 2)], 0.0)
    for name in ("slope", "shift")
  )
  return (2 * sigma - 1) / ((1 - sigma) ** 2 + sigma**2) * x + slope * x + shift


def step_costs(params, policy: Policy, schedule, rolled) -> jax.Array:
  """KL of every step to the uncorrected policy, `[steps, samples]`."""

  def one(i, x):
    rows, time = jnp.full(SAMPLES, i), jnp.full(SAMPLES, schedule.model_time[i])
    new, old = (
      distribution(policy, schedule, rows, x, velocity(p, x, time))
      for p in (params, no_correction(policy.steps))
    )
    return jnp.square((new.mean - old.mean)[:, 0] / new.std) / 2

  return jax.vmap(one)(rolled.step_index, rolled.latents[:-1])


@functools.cache
def train(steps: int, reward: str, costs_in_returns: bool, seed: int = 0) -> dict:
  """Trains, and returns the corrections."""
  policy = policy_of(steps)
  schedule = schedules.flow_schedule(steps, 1.0)
  start = no_correction(steps)
  settings = Objective(
    old_log_prob="recompute",
    timesteps="all",
    timestep_fraction=1.0,
    kl_weight=BETA,
    kl_mode="exact",
    updates=1,
    microbatch=SAMPLES * (steps - 1),
  )
  algorithm = grpo.algorithm(velocity, schedule, policy, settings, grpo.clipped(1e-4), start)
  optimizer = optax.adam(optax.cosine_decay_schedule(RATE, ITERATIONS))

  def iteration(train_state, key):
    initial_key, noise_key, step_key, shuffle_key = jax.random.split(key, 4)
    initial = jnp.repeat(jax.random.normal(initial_key, (PROMPTS, 1)), GROUP, axis=0)
    noise = jax.random.normal(noise_key, (steps, SAMPLES, 1))
    denoise = functools.partial(velocity, train_state.trainable)
    rolled = rollout(denoise, schedule, policy, initial, lambda i: noise[i])
    returns = REWARDS[reward](rolled.sample[:, 0])
    if costs_in_returns:
      returns = returns - BETA * step_costs(train_state.trainable, policy, schedule, rolled).sum(0)
    groups = returns.reshape(PROMPTS, GROUP)
    advantage = (groups - groups.mean(1, keepdims=True)).reshape(1, -1)
    owners = (jnp.arange(SAMPLES, dtype=jnp.int32) // GROUP)[None]
    latents, log_probs = rolled.latents[:, None], rolled.log_probs[:, None]  # one lane
    batch = Batch(rolled.step_index, latents, log_probs, owners, advantage, jnp.ones((1, SAMPLES)))
    keys = (jax.random.split(step_key, SAMPLES), shuffle_key)
    return optimize.update(algorithm, optimizer, train_state, batch, keys)[0], None

  def run(key):
    first = state.create(start, optimizer, 0.0, {})
    return jax.lax.scan(iteration, first, jax.random.split(key, ITERATIONS))[0].trainable

  return jax.device_get(jax.jit(run)(jax.random.key(seed)))


def compose(steps) -> tuple[float, float, float]:
  """Composes affine Gaussian steps (factor, shift, variance).

  Returns (factor, shift, variance) of x_0 given x_T.
  """
  factor, shift, variance = 1.0, 0.0, 0.0
  for a, b, v in steps:
    factor, shift, variance = a * factor, a * shift + b, a**2 * variance + v
  return factor, shift, variance


def reference_chain(n: int) -> tuple[float, float, float]:
  """The uncorrected sampler.

  dx = (v - eta^2 / 2 score) dt + eta dw with v = c x, score = -(x + (1 - sigma) v) / sigma.
  """
  steps, sigma = [], np.linspace(1, 0, n + 1)
  for i in range(n):
    c, d = (2 * sigma[i] - 1) / ((1 - sigma[i]) ** 2 + sigma[i] ** 2), 1 / n
    eta2 = LEVEL**2 * sigma[i] / (1 - sigma[i] if i else 1 - sigma[1]) if i < n - 1 else 0.0
    steps.append((1 - c * d - eta2 / (2 * sigma[i]) * (1 + (1 - sigma[i]) * c) * d, 0.0, eta2 * d))
  return compose(steps)


def policy_chain(params, n: int) -> tuple[float, float, float]:
  """The trained sampler as the project draws it.

  It is affine in x, so that two values of x determine it.
  """
  policy = policy_of(n)
  schedule = schedules.flow_schedule(n, 1.0)
  probe = jnp.array([[0.0], [1.0]])
  steps = []
  for i in range(n):
    output = velocity(params, probe, jnp.full(2, schedule.model_time[i]))
    if i < n - 1:
      mean, std = distribution(policy, schedule, jnp.full(2, i), probe, output)
    else:
      mean, std = probe - output / n, jnp.zeros(2)
    steps.append((float(mean[1, 0] - mean[0, 0]), float(mean[0, 0]), float(std[0]) ** 2))
  return compose(steps)


def densities(chain) -> np.ndarray:
  """p(x_0 | x_T) on the grid, `[x_T, x_0]`."""
  factor, shift, variance = chain
  return np.exp(-((X[None] - factor * X_T[:, None] - shift) ** 2) / (2 * variance)) / np.sqrt(
    2 * np.pi * variance
  )


def optimum(n: int, reward: str, beta: float) -> np.ndarray:
  """p(x_0 | x_T) exp(r / beta) / Z(x_T) by quadrature."""
  tilted = densities(reference_chain(n)) * np.exp(REWARDS[reward](X) / beta)
  return tilted / tilted.sum(1, keepdims=True) / (X[1] - X[0])


def distance(p: np.ndarray, q: np.ndarray) -> float:
  """Total variation of x_0 given x_T, averaged over x_T ~ N(0, 1)."""
  return float(WEIGHT @ np.abs(p - q).sum(1) * (X[1] - X[0]) / 2)


def test_the_reference_chain_is_the_projects_sampler():
  np.testing.assert_allclose(policy_chain(no_correction(8), 8), reference_chain(8), atol=1e-5)


@pytest.mark.parametrize(
  "steps, reward, costs_in_returns, bound", [(8, "linear", False, 0.02), (20, "curved", True, 0.04)]
)
def test_training_ends_at_the_optimum(steps, reward, costs_in_returns, bound):
  """The bound is a tenth (linear: a twentieth) of the distance at the start.

  The optimum of another beta is far outside of it.
  """
  trained = densities(policy_chain(train(steps, reward, costs_in_returns), steps))
  assert distance(densities(reference_chain(steps)), optimum(steps, reward, BETA)) > 0.35
  assert distance(trained, optimum(steps, reward, BETA)) < bound
  assert distance(trained, optimum(steps, reward, BETA / 2)) > 2.5 * bound
  assert distance(trained, optimum(steps, reward, BETA * 2)) > 2.5 * bound


def test_a_penalty_on_visited_states_alone_is_weaker():
  """With a curved reward the plain update does not end at the optimum.

  Its returns do not include the KL of later steps. This is a known property, not the aim; the
  returns of the test above make the difference.
  """
  trained = densities(policy_chain(train(20, "curved", False), 20))
  assert 0.06 < distance(trained, optimum(20, "curved", BETA)) < 0.13

"""The surrogate, its gradient at ratio 1, and GRPO-Guard's ratio."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dancegrpo_jax.diffusion import predictions, transitions
from dancegrpo_jax.diffusion.schedules import Point
from dancegrpo_jax.diffusion.transitions import Transition
from dancegrpo_jax.rl import objective


def flow_policy(v, x, noise_level=0.7):
  at = Point(*(jnp.float32(value) for value in (0.3, 0.7, 0.38, 0.62)))
  prediction = predictions.from_output("velocity", x, v, at.alpha, at.sigma)
  return transitions.transition("flow", "velocity", noise_level, at, x, prediction)


def test_golden_ratio_and_guard_ratio():
  x = jnp.full(5, 0.3)
  old, new = (flow_policy(jnp.full(5, v), x) for v in (-0.45, -0.5))
  x_next = old.mean + 0.4 * old.std
  log_ratio = objective.log_ratio(
    *(transitions.log_prob(policy, x_next, "mean")[None] for policy in (new, old))
  )
  np.testing.assert_allclose(jnp.exp(log_ratio), [1.006471830], rtol=1e-6)
  guard = objective.guard_log_ratio(new.mean, old.mean, old.std, x_next)
  np.testing.assert_allclose(jnp.exp(guard), 1.001993985, rtol=1e-6)


def test_guard_is_the_unbiased_log_ratio_times_std():
  """The definition, std (log ratio + m/2), against the closed form without log-probs."""
  old_mean, shift, noise = jax.random.normal(jax.random.key(0), (3, 64))
  std, mean = 0.3, old_mean + 0.1 * shift
  x_next = old_mean + std * noise
  new, old = (
    transitions.log_prob(Transition(m, jnp.float32(std)), x_next, "mean") for m in (mean, old_mean)
  )
  m = np.mean((0.1 * np.float64(shift)) ** 2) / std**2
  guard = objective.guard_log_ratio(mean, old_mean, jnp.float32(std), x_next)
  np.testing.assert_allclose(guard, std * (float(new - old) + m / 2), atol=1e-6)


def test_guard_log_ratio_has_mean_0_under_the_old_policy():
  noise = jax.random.normal(jax.random.key(1), (100_000, 4))
  old_mean, mean, std = jnp.zeros(4), jnp.full(4, 0.15), jnp.float32(0.3)
  guard = jax.vmap(lambda n: objective.guard_log_ratio(mean, old_mean, std, std * n))(noise)
  assert float(jnp.mean(guard)) == pytest.approx(0.0, abs=1e-3)  # standard error 2.4e-4


def test_guard_of_a_deterministic_step_is_0():
  """Value and gradient: a step outside of the window has no density."""
  mean, x_next = jax.random.normal(jax.random.key(4), (2, 6))
  value, gradient = jax.value_and_grad(objective.guard_log_ratio)(
    mean, mean - 0.1, jnp.float32(0.0), x_next
  )
  assert value == 0 and not gradient.any()


def test_gradient_at_ratio_1_is_minus_advantage_times_that_of_the_log_prob():
  x, x_next = jax.random.normal(jax.random.key(2), (2, 6))
  weight = jnp.float32(0.7)

  def log_prob(weight):
    return transitions.log_prob(flow_policy(weight * x, x), x_next, "mean")

  old = log_prob(weight)
  for advantage in (1.3, -0.8):

    def loss(weight, advantage=advantage):
      ratio = jnp.exp(objective.log_ratio(log_prob(weight)[None], old[None]))
      return objective.surrogate(ratio, jnp.float32([advantage]), 1e-4)[0]

    value, gradient = jax.value_and_grad(loss)(weight)
    assert float(value) == pytest.approx(-advantage, rel=1e-6)
    np.testing.assert_allclose(gradient, -advantage * jax.grad(log_prob)(weight), rtol=1e-5)


def test_guard_gradient_at_the_old_policy():
  """The guard log ratio has the gradient noise / n.

  That is the gradient of the mean log-prob, noise / (n std), times std.
  """
  mean, noise = jax.random.normal(jax.random.key(3), (2, 6))
  gradient = jax.grad(objective.guard_log_ratio)(mean, mean, jnp.float32(0.3), mean + 0.3 * noise)
  np.testing.assert_allclose(gradient, noise / 6, atol=1e-6)


def test_clipping():
  ratio = jnp.float32([1.5, 1.5, 0.5, 0.5, 1.1])
  advantage = jnp.float32([2.0, -2.0, 2.0, -2.0, 3.0])
  np.testing.assert_allclose(
    objective.surrogate(ratio, advantage, 0.2), [-2.4, 3.0, -1.0, 1.6, -3.3], rtol=1e-6
  )
  gradient = jax.grad(lambda r: jnp.sum(objective.surrogate(r, advantage, 0.2)))(ratio)
  np.testing.assert_allclose(gradient, [0.0, 2.0, -2.0, 0.0, -3.0], rtol=1e-6)
  np.testing.assert_array_equal(
    objective.is_clipped(ratio, advantage, 0.2), [True, False, False, True, False]
  )


def test_loss_is_0_without_advantages():
  assert not np.any(objective.surrogate(jnp.float32([0.9, 1.0, 1.2]), jnp.zeros(3), 1e-4))


def test_guard_weight():
  np.testing.assert_allclose(
    objective.guard_weight(jnp.float32([0.7]), jnp.float32([0.62])), [12.5], rtol=1e-5
  )

"""Surrogates of the policy's improvement, one value a transition.

Sums over transitions and their weights belong to the engine, rl/optimize.py.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike


def log_ratio(
  log_prob: Float[Array, "batch"], old_log_prob: Float[Array, "batch"]
) -> Float[Array, "batch"]:
  """log of the importance ratio p_new(x' | x) / p_old(x' | x)."""
  return log_prob - old_log_prob


def guard_log_ratio(
  mean: Float[Array, "*shape"],
  old_mean: Float[Array, "*shape"],
  std: Float[Array, ""],
  x_next: Float[Array, "*shape"],
) -> Float[Array, ""]:
  """GRPO-Guard (arXiv 2510.22319): the log ratio of ONE sample without its bias and its dependence
  on the step.

  std (log ratio + m/2) with m = mean((mean - old_mean)^2) / std^2, for the mean-reduced log ratio.
  Computed as mean((mean - old_mean) noise), noise = (x_next - old_mean) / std: the same without the
  difference of two log-probs. A deterministic step (std 0) has no density: the value is 0 there.
  """
  distance = jnp.mean((mean - old_mean) * (x_next - old_mean))
  return jnp.where(std > 0, distance / jnp.where(std > 0, std, 1.0), 0.0)


def guard_weight(
  sigma: Float[Array, "batch"], sigma_next: Float[Array, "batch"]
) -> Float[Array, "batch"]:
  """GRPO-Guard's weight of a transition's loss: 1 / (sigma - sigma')."""
  return 1.0 / (sigma - sigma_next)


def surrogate(
  ratio: Float[Array, "batch"], advantage: Float[Array, "batch"], clip_range: ScalarLike
) -> Float[Array, "batch"]:
  """Loss to minimise: -min(ratio A, clip(ratio, 1 - c, 1 + c) A), arXiv 1707.06347, eq. (7)."""
  return -jnp.minimum(
    ratio * advantage, jnp.clip(ratio, 1.0 - clip_range, 1.0 + clip_range) * advantage
  )


def is_clipped(
  ratio: Float[Array, "batch"], advantage: Float[Array, "batch"], clip_range: ScalarLike
) -> Bool[Array, "batch"]:
  """Whether the clipping stops this transition's gradient: the ratio has left the range in the
  advantage's direction.
  """
  return ((advantage > 0) & (ratio > 1.0 + clip_range)) | (
    (advantage < 0) & (ratio < 1.0 - clip_range)
  )


def approximate_kl(log_ratio: Float[Array, "batch"]) -> Float[Array, "batch"]:
  """ratio - 1 - log ratio, an estimate of KL(old, new) that is never negative (k3 of Schulman).

  It keeps its digits at a ratio of 1 + 1e-4, where ratio - 1 has none left.
  """
  return jnp.expm1(log_ratio) - log_ratio


def mean_kl(
  mean: Float[Array, "batch *shape"],
  old_mean: Float[Array, "batch *shape"],
  std: Float[Array, "batch"],
) -> Float[Array, "batch"]:
  """KL between two Gaussian steps of the same std, averaged over the latent dimensions.

  (mean - old_mean)^2 / (2 std^2) in each dimension (Flow-DPPO, arXiv 2606.11025, eq. (14)). A
  deterministic step (std 0) has no density: the value is 0 there, as that of its log-prob is.
  """
  squares = jnp.square(mean - old_mean).reshape(len(mean), -1)
  variance = jnp.square(jnp.where(std > 0, std, 1.0))
  return jnp.where(std > 0, jnp.mean(squares, axis=1) / (2.0 * variance), 0.0)


def moves_outwards(
  ratio: Float[Array, "batch"], advantage: Float[Array, "batch"]
) -> Bool[Array, "batch"]:
  """Whether a larger advantage would drive the ratio further from 1 than it is already."""
  return ((advantage > 0) & (ratio > 1.0)) | ((advantage < 0) & (ratio < 1.0))

"""The clipped surrogate, one value a transition. Sums over transitions and their weights belong to
the update.
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
  difference of two log-probs. The step must be stochastic (std > 0).
  """
  return jnp.mean((mean - old_mean) * (x_next - old_mean)) / std


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

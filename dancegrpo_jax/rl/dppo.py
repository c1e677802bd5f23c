"""Flow-DPPO (arXiv 2606.11025): a trust region in the place of GRPO's clipping.

A step of a diffusion sampler is a Gaussian, so the divergence of the new policy from the old one is
known exactly. A transition whose divergence has reached `tau` is dropped from the loss where its
ratio moves further outwards, and nothing is clipped (eq. (14) and (18)).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dancegrpo_jax.diffusion.schedules import Schedule
from dancegrpo_jax.rl import objective
from dancegrpo_jax.rl.grpo import Remembered, Scored, Surrogate
from dancegrpo_jax.rl.trajectories import Transitions


def trust_region(tau: float = 1e-4) -> Surrogate:
  """-ratio A, and 0 for transitions that are dropped; "drop_fraction" is their share.

  It needs the old policy's means, so the objective's `old_log_prob` must be "recompute".

  Args:
    tau: nats a latent dimension; a transition is dropped where its KL is at least this.
  """

  def loss(t: Transitions, new: Scored, old: Remembered, schedule: Schedule) -> tuple[Array, dict]:
    del schedule
    assert old.mean is not None  # because of needs_means
    log_ratio = objective.log_ratio(new.log_prob, old.log_prob)
    ratio = jnp.exp(log_ratio)
    divergence = jax.lax.stop_gradient(objective.mean_kl(new.mean, old.mean, new.std))
    dropped = (divergence >= tau) & objective.moves_outwards(ratio, t.advantage)
    # Where a ratio overflows, its gradient would be 0 * inf: a dropped one must not enter at all.
    trained = jnp.exp(jnp.where(dropped, 0.0, log_ratio))
    losses = jnp.where(dropped, 0.0, -trained * t.advantage)
    return losses, {
      "ratio": ratio,
      "drop_fraction": dropped.astype(jnp.float32),
      "policy_kl": divergence,
      "approx_kl": objective.approximate_kl(log_ratio),
    }

  return Surrogate(loss=loss, reports=("drop_fraction", "policy_kl"), needs_means=True)

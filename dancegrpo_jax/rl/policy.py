"""The sampler and the objective that a config describes, as the static values that the rollout and
the update take.
"""

from ml_collections import ConfigDict

from dancegrpo_jax.diffusion import windows
from dancegrpo_jax.rl import update
from dancegrpo_jax.rl.rollout import Policy


def policy_of(config: ConfigDict, prediction: str) -> Policy:
  """The training sampler of a config."""
  sampler = config.sampler
  policy = Policy(
    sampler.kind,
    sampler.noise_level,
    prediction,
    sampler.steps,
    0,
    sampler.window.outside,
    sampler.last_step,
    config.objective.log_prob,
  )
  return policy._replace(window=windows.size(sampler.window, policy.policy_steps))


def objective_of(config: ConfigDict) -> update.Objective:
  """The update's static choices."""
  c, o = config.objective, config.optimizer
  return update.Objective(
    c.clip_range,
    c.old_log_prob,
    c.timesteps,
    c.timestep_fraction,
    c.guard,
    c.kl.weight,
    c.kl.mode,
    o.updates_per_iteration,
    o.microbatch,
    config.ema.decay,
  )

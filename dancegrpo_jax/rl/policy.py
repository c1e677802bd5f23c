"""The sampler that a config describes, as the rollout and the update take it."""

from ml_collections import ConfigDict

from dancegrpo_jax.diffusion import windows
from dancegrpo_jax.rl.rollout import Policy


def policy_of(config: ConfigDict, prediction: str) -> Policy:
  """The training sampler of a config."""
  sampler = config.sampler
  policy = Policy(
    kind=sampler.kind,
    noise_level=sampler.noise_level,
    prediction=prediction,
    steps=sampler.steps,
    window=0,
    outside=sampler.window.outside,
    last_step=sampler.last_step,
    log_prob=config.objective.log_prob,
  )
  return policy._replace(window=windows.size(sampler.window, policy.policy_steps))

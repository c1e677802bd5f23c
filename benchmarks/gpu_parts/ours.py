"""This project's side of the comparison: the rollout and the update, and how much work each is."""

import jax

from dancegrpo_jax.rl import timesteps
from dancegrpo_jax.settings import checks
from gpu_parts import loaded


class Ours:
  """The compiled rollout and update, with their arguments."""

  def __init__(self, made: loaded.Loaded, given: loaded.Feed):
    self._made, self._given, self._state = made, given, made.state
    self._rollout = None

  def rollout(self):
    """Runs one rollout: `steps` forward passes and the transitions between them."""
    arguments = loaded.rollout_arguments(self._made._replace(state=self._state), self._given)
    with jax.set_mesh(self._made.mesh):
      self._rollout = self._made.calls["rollout"].program(*arguments)
    return self._rollout

  def update(self):
    """Runs one update on the trajectories of the last rollout and returns its metrics."""
    rest = loaded.update_rest(self._made, self._given, self._rollout)
    with jax.set_mesh(self._made.mesh):
      self._state, metrics = self._made.calls["update"].program(self._state, *rest)
    return metrics


class Work:
  """The rows that an iteration passes through the network. With guidance a sample has two rows."""

  def __init__(self, config):
    branches = 1 + (config.sampler.guidance_scale != 1.0)
    samples = config.data.prompts_per_iteration * config.rollout.samples_per_prompt
    policy = config.sampler.window.size or checks.policy_steps(config)
    trained = samples * timesteps.count(
      config.objective.timesteps, config.objective.timestep_fraction, policy
    )
    self.steps = config.sampler.steps
    self.chunk_rows = config.rollout.chunk * branches
    self.microbatch_rows = config.optimizer.microbatch * branches
    self.microbatches = trained // config.optimizer.microbatch
    updates = config.optimizer.updates_per_iteration
    # The old policy's pass is made for every optimizer step but the first.
    again = config.objective.old_log_prob == "recompute"
    self.old_passes = self.microbatches * (updates - 1) // updates if again else 0

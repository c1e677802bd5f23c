"""Our side of the comparison: the rollout and the update, and how much work each of them is."""

import jax

from dancegrpo_jax.settings import geometry
from gpu_parts import loaded


class Ours:
  """The rollout and the update, compiled, with what they are called with."""

  def __init__(self, made: loaded.Loaded, given: loaded.Feed):
    self._made, self._given, self._state = made, given, made.state
    self._rollout = None

  def rollout(self):
    """One rollout, which is `steps` forward passes and what is between them."""
    arguments = loaded.rollout_arguments(self._made._replace(state=self._state), self._given)
    with jax.set_mesh(self._made.mesh):
      self._rollout = self._made.calls["rollout"].program(*arguments)
    return self._rollout

  def update(self):
    """One update on the last rollout's trajectories; its metrics."""
    rest = loaded.update_rest(self._made, self._given, self._rollout)
    with jax.set_mesh(self._made.mesh):
      self._state, metrics = self._made.calls["update"].program(self._state, *rest)
    return metrics


class Work:
  """What an iteration asks of the network, in rows; with guidance a sample is two."""

  def __init__(self, config):
    branches = 1 + (config.sampler.guidance_scale != 1.0)
    trained = geometry.of(config).transitions
    self.steps = config.sampler.steps
    self.chunk_rows = config.rollout.chunk * branches
    self.microbatch_rows = config.optimizer.microbatch * branches
    self.microbatches = trained // config.optimizer.microbatch
    updates = config.optimizer.updates_per_iteration
    # The old policy's pass is made for every optimizer step but the first.
    again = config.objective.old_log_prob == "recompute"
    self.old_passes = self.microbatches * (updates - 1) // updates if again else 0

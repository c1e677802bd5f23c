"""This project's side of the comparison: the rollout and the update, and how much work each is."""

import jax

from dancegrpo_jax.settings import geometry
from gpu_parts import loaded


class Ours:
  """The compiled rollout and update, with their arguments."""

  def __init__(self, made: loaded.Loaded, given: loaded.Feed):
    self._made, self._given = made, given
    self._update: loaded.Update | None = None

  def rollout(self):
    """One rollout, which is `steps` forward passes and what is between them."""
    made = self._made
    state = self._update.state if self._update else made.state
    arguments = loaded.rollout_arguments(made._replace(state=state), self._given)
    with jax.set_mesh(made.mesh):
      rollout = made.calls["rollout"].program(*arguments)
    if self._update is None:
      self._update = loaded.Update(made, self._given, rollout)
    self._update.rollout = rollout
    return rollout

  def update(self):
    """One update on the last rollout's trajectories; its metrics."""
    assert self._update is not None  # there was a rollout
    with jax.set_mesh(self._made.mesh):
      return self._update()


class Work:
  """The rows that an iteration passes through the network. With guidance a sample has two rows."""

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

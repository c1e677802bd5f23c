"""How many samples, chunks, trained transitions and microbatches an iteration has."""

from typing import NamedTuple

from ml_collections import ConfigDict

from dancegrpo_jax.rl import timesteps


class Geometry(NamedTuple):
  """The batches of an iteration. In a valid config every quotient below is a whole number.

  Attributes:
    prompts: prompts of an iteration.
    group: samples of each prompt.
    chunk: samples that are drawn, decoded and scored at once.
    trained_samples: samples that are trained on: all of them, or `advantage.best_of` of each group.
    steps: the sampler steps from which the trained ones are chosen.
    trained_steps: steps of each sample that are trained on.
    updates: optimizer steps.
    microbatch: transitions, which are (sample, step) pairs, that one gradient is computed from.
  """

  prompts: int
  group: int
  chunk: int
  trained_samples: int
  steps: int
  trained_steps: int
  updates: int
  microbatch: int

  @property
  def samples(self) -> int:
    """All samples."""
    return self.prompts * self.group

  @property
  def chunks(self) -> int:
    """Chunks of all samples."""
    return self.samples // self.chunk

  @property
  def transitions(self) -> int:
    """Trained transitions of all optimizer steps."""
    return self.trained_samples * self.trained_steps

  @property
  def transitions_per_update(self) -> int:
    """Trained transitions of one optimizer step."""
    return self.transitions // self.updates

  @property
  def microbatches(self) -> int:
    """Microbatches of one optimizer step."""
    return self.transitions_per_update // self.microbatch


def policy_steps(config: ConfigDict) -> int:
  """Stochastic steps of the whole schedule. The last step is deterministic unless
  `sampler.last_step` is "sde".
  """
  if config.sampler.last_step == "sde":
    return config.sampler.steps
  return config.sampler.steps - 1


def of(config: ConfigDict) -> Geometry:
  """The batches of an iteration of this config.

  Raises:
    ValueError: the config has no policy step, or trains an invalid choice of steps.
  """
  objective, group = config.objective, config.rollout.samples_per_prompt
  steps = config.sampler.window.size or policy_steps(config)
  return Geometry(
    prompts=config.data.prompts_per_iteration,
    group=group,
    chunk=config.rollout.chunk,
    trained_samples=config.data.prompts_per_iteration * (config.advantage.best_of or group),
    steps=steps,
    trained_steps=timesteps.count(objective.timesteps, objective.timestep_fraction, steps),
    updates=config.optimizer.updates_per_iteration,
    microbatch=config.optimizer.microbatch,
  )

"""What an iteration came to: its numbers, and the ends that a run can have."""

from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.report import metrics
from dancegrpo_jax.report.clock import Clock
from dancegrpo_jax.rl.state import TrainState


class RunError(ConfigError):
  """A run that had to stop: the message says why, and what is left."""


class Pending(NamedTuple):
  """An iteration that is dispatched and whose numbers have not been read."""

  iteration: int
  values: dict
  clock: Clock


def flush(
  config: ConfigDict,
  workdir: Path,
  pending: Pending | None,
  writer: metrics.Writer,
  progress: metrics.Progress,
) -> None:
  """Writes and shows an iteration's numbers, which waits until it is done. RunError where the run
  can't go on.
  """
  if pending is None:
    return
  times = pending.clock.read()
  images = config.data.prompts_per_iteration * config.rollout.samples_per_prompt
  values = {
    **jax.device_get(pending.values),
    **times,
    "images_per_second": images / times["time/total"],
  }
  row = writer.write(pending.iteration, values)
  progress.update(pending.iteration, row)
  left = what_is_left(workdir)
  if row["optimizer/skipped_total"] > config.optimizer.max_skipped:
    raise RunError(
      f"stopped at iteration {pending.iteration + 1}: {row['optimizer/skipped_total']:.0f}"
      " optimizer steps had a non-finite loss"
      f" or gradient, more than optimizer.max_skipped = {config.optimizer.max_skipped}; {left};"
      " lower"
      f" optimizer.learning_rate = {config.optimizer.learning_rate}"
    )
  if row["reward/failed"] > config.reward.max_failed:
    raise RunError(
      f"stopped at iteration {pending.iteration + 1}: {row['reward/failed']:.0%} of the rewards"
      " failed, more than"
      f" reward.max_failed = {config.reward.max_failed}; {left}"
    )


def what_is_left(workdir: Path) -> str:
  """What a run that has to stop leaves to go on from, in words."""
  last = store.latest(workdir / "checkpoints")
  if last is None:
    return "no checkpoint was saved yet"
  return f"the last good checkpoint is that of iteration {last}"


def give_up(
  saver: store.Saver,
  workdir: Path,
  state: TrainState,
  iteration: int,
  first: int,
  meta: dict,
  progress: metrics.Progress,
) -> None:
  """Ends a run that was asked to stop: saves the state as of the last whole iteration, and says so.

  Args:
    saver: of the workdir.
    workdir: of the run.
    state: before the iteration that is given up.
    iteration: its number, and so that of whole iterations.
    first: the iteration that this process began with, whose state is saved already.
    meta: saved beside the state.
    progress: where it is said.
  """
  if iteration > first:
    saver.save(iteration, state, meta | {"iteration": iteration})
    saver.wait()
  message = f"stopped by SIGTERM: {iteration} iterations are saved in {workdir}"
  progress.message(f"{message}; the same command goes on from there")

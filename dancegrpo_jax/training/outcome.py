"""What comes of an iteration: its numbers, and the ways in which a run can end early."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.report import metrics
from dancegrpo_jax.report.clock import Clock
from dancegrpo_jax.rl.state import TrainState


class RunError(ConfigError):
  """A run that had to stop. The message says why, and from which checkpoint it can go on."""


class Pending(NamedTuple):
  """An iteration whose work is queued on the devices and whose numbers have not been read.

  Attributes:
    iteration: its number.
    values: scalars by name, on a device or not.
    clock: of the iteration.
  """

  iteration: int
  values: dict[str, Any]
  clock: Clock


class Numbers:
  """The numbers of the iterations, which are read late so that no device waits for the host.

  Args:
    config: of the run.
    workdir: of the run.
    writer: of metrics.
    progress: of the run.
  """

  def __init__(
    self, config: ConfigDict, workdir: Path, writer: metrics.Writer, progress: metrics.Progress
  ):
    self._config, self._workdir, self._writer, self._progress = config, workdir, writer, progress
    self._pending: Pending | None = None

  def add(self, pending: Pending) -> None:
    """Takes the numbers of an iteration; those of the one before have been read."""
    self._pending = pending

  def read(self) -> None:
    """Waits for the iteration that is pending, if there is one. Else as `flush`."""
    if self._pending is not None:
      flush(self._config, self._workdir, self._pending, self._writer, self._progress)
      self._pending = None


def flush(
  config: ConfigDict,
  workdir: Path,
  pending: Pending,
  writer: metrics.Writer,
  progress: metrics.Progress,
) -> None:
  """Waits until an iteration is done, then writes and shows its numbers.

  Raises:
    RunError: more skipped optimizer steps than optimizer.max_skipped, or a larger share of failed
      rewards than reward.max_failed.
  """
  times = pending.clock.read()
  images = config.data.prompts_per_iteration * config.rollout.samples_per_prompt
  speed = {"images_per_second": images / times["time/total"]}
  row = writer.write(pending.iteration, {**jax.device_get(pending.values), **times, **speed})
  progress.update(pending.iteration, row)
  where = f"stopped at iteration {pending.iteration + 1}"
  skipped, failed = row["optimizer/skipped_total"], row["reward/failed"]
  if skipped > config.optimizer.max_skipped:
    raise RunError(
      f"{where}: {skipped:.0f} optimizer steps had a non-finite loss or gradient, more than"
      f" optimizer.max_skipped = {config.optimizer.max_skipped}; {what_is_left(workdir)};"
      f" lower optimizer.learning_rate = {config.optimizer.learning_rate}"
    )
  if failed > config.reward.max_failed:
    raise RunError(
      f"{where}: {failed:.0%} of the rewards failed, more than"
      f" reward.max_failed = {config.reward.max_failed}; {what_is_left(workdir)}"
    )


def what_is_left(workdir: Path) -> str:
  """Says from which checkpoint a run that has to stop can go on."""
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
  """Ends a run that was asked to stop: saves the state before the iteration that is given up.

  Args:
    saver: of the workdir.
    workdir: of the run.
    state: before this iteration.
    iteration: its number, which is also the number of finished iterations.
    first: the iteration with which this process began, whose state is saved already.
    meta: saved beside the state.
    progress: shows a message.
  """
  if iteration > first:
    saver.save(iteration, state, meta | {"iteration": iteration})
    saver.wait()
  message = f"stopped by SIGTERM: {iteration} iterations are saved in {workdir}"
  progress.message(f"{message}; the same command goes on from there")

"""What comes of an iteration: its numbers, and the ways in which a run can end early."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from dancegrpo_jax import buckets
from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.report import metrics, status
from dancegrpo_jax.report.clock import Clock
from dancegrpo_jax.report.progress import Progress, phase
from dancegrpo_jax.rl.state import TrainState


class RunError(ConfigError):
  """A run that had to stop. The message says why, and from which checkpoint it can go on."""


class Pending(NamedTuple):
  """An iteration whose work is queued on the devices and whose numbers have not been read.

  Attributes:
    iteration: its number.
    values: scalars by name, on a device or not.
    clock: of the iteration.
    samples: arrays by name, of which histograms are drawn, on a device or not.
  """

  iteration: int
  values: dict[str, Any]
  clock: Clock
  samples: dict[str, Any] = {}


class Numbers:
  """The numbers of the iterations, which are read late so that no device waits for the host.

  Args:
    config: of the run.
    workdir: of the run.
    writer: of metrics.
    progress: of the run.
  """

  def __init__(self, config: ConfigDict, workdir: Path, writer: metrics.Writer, progress: Progress):
    self._config, self._workdir, self._writer, self._progress = config, workdir, writer, progress
    self._pending: Pending | None = None
    self._recent: list[metrics.Row] = []  # of this process, the last ones

  def add(self, pending: Pending) -> None:
    """Takes the numbers of an iteration; those of the one before have been read."""
    self._pending = pending

  def read(self) -> None:
    """Waits for the iteration that is pending, if there is one. Else as `flush`."""
    if self._pending is not None:
      row = flush(
        self._config, self._workdir, self._pending, self._writer, self._progress, self._recent
      )
      self._pending = None
      self._recent = [*self._recent, row][-self._config.reward.failed_iterations :]


def flush(
  config: ConfigDict,
  workdir: Path,
  pending: Pending,
  writer: metrics.Writer,
  progress: Progress,
  before: Sequence[metrics.Row] = (),
) -> metrics.Row:
  """Waits until an iteration is done, then writes and shows its numbers.

  Args:
    config, workdir, writer, progress: of the run.
    pending: the iteration.
    before: the rows of the iterations before it, at least reward.failed_iterations - 1 where there
      are so many.

  Returns:
    Its row.

  Raises:
    RunError: more skipped optimizer steps than optimizer.max_skipped, or in each of the last
      reward.failed_iterations iterations a larger share of failed rewards than reward.max_failed.
  """
  times = pending.clock.read()
  samples = config.data.prompts_per_iteration * config.rollout.samples_per_prompt
  speed = {"samples_per_second": samples / times["time/total"]}
  values = {**jax.device_get(pending.values), **times, **speed}
  row = writer.write(pending.iteration, values, pending.samples)
  progress.update(pending.iteration, row)
  where = f"stopped at iteration {pending.iteration + 1}"
  if is_flat(row) and not (before and is_flat(before[-1])):
    progress.message(flat_notice(config, pending.iteration))
  skipped = row["optimizer/skipped_total"]
  if skipped > config.optimizer.max_skipped:
    raise RunError(
      f"{where}: {skipped:.0f} optimizer steps had a non-finite loss or gradient, more than"
      f" optimizer.max_skipped = {config.optimizer.max_skipped}; {what_is_left(workdir)};"
      f" lower optimizer.learning_rate = {config.optimizer.learning_rate}"
    )
  count = failing_iterations([*before, row], config)
  if count:
    raise RunError(
      f"{where}: {row['reward/failed']:.0%} of the rewards failed, more than reward.max_failed ="
      f" {config.reward.max_failed}, and so in each of the last {count} iterations (reward."
      f"failed_iterations = {config.reward.failed_iterations}); {what_is_left(workdir)}"
    )
  return row


def failing_iterations(rows: Sequence[metrics.Row], config: ConfigDict) -> int:
  """The number of last iterations in each of which too many rewards failed, if these are enough to
  stop the run; else 0. A run of fewer iterations than reward.failed_iterations needs all of them.

  Args:
    rows: of iterations without a gap, the last of which is the newest.
    config: of the run.
  """
  count = min(config.reward.failed_iterations, config.iterations)
  bad = [row["reward/failed"] > config.reward.max_failed for row in rows[-count:]]
  return count if len(bad) == count and all(bad) else 0


def is_flat(row: metrics.Row) -> bool:
  """Whether an iteration had rewards, and none of its groups had a spread of them."""
  return row.get("group/zero_variance", 0.0) == 1 and row["reward/failed"] < 1


def flat_notice(config: ConfigDict, iteration: int) -> str:
  """What the user reads when nothing can be learned from an iteration."""
  names = ", ".join(name for name, _ in config.reward.terms)
  causes = "a reward that is the same for every picture or too coarse for a group"
  if config.reward.thresholds:
    causes += ", a value of reward.thresholds that all or no samples reach"
  if config.advantage.min_spread:
    causes += (
      f", scores that differ by less than advantage.min_spread = {config.advantage.min_spread:g}"
    )
  return (
    f"note: in iteration {iteration + 1} no group had a spread of rewards, so that nothing could be"
    f" learned from {names}. Likely causes: {causes}, or samples that are all alike. This is said"
    " again only after it has been otherwise"
  )


def what_is_left(workdir: Path) -> str:
  """Says from which checkpoint a run that has to stop can go on."""
  last = store.latest(store.folder_of(workdir))
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
  progress: Progress,
  signal: str = "SIGTERM",
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
    signal: the name of what has asked.
  """
  if iteration > first:
    with phase("saving the checkpoint"):
      saver.save(iteration, state, meta | {"iteration": iteration})
      saver.wait()
  message = f"stopped by {signal}: {iteration} iterations are saved in {buckets.behind(workdir)}"
  status.end(workdir, status.STOPPED, message)
  progress.message(f"{message}; the same command goes on from there")

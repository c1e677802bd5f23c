"""Where the metrics of a run go: metrics.jsonl, TensorBoard, wandb, and a progress line. Only
process 0 writes.

A row of metrics.jsonl is one iteration: {"iteration": 3, "reward/mean": 0.51, ...}. A value that is
not finite is null.
"""

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import rich.progress
from ml_collections import ConfigDict
from rich.console import Console

from dancegrpo_jax import strict_json
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.settings import stored_config

FILE = "metrics.jsonl"
Row = Mapping[str, Any]  # metric -> scalar


# The file


def read(workdir: str | os.PathLike) -> list[Row]:
  """The rows of a workdir's metrics.jsonl in order, with NaN for null; [] where there is no file.

  An incomplete last line, which a killed process leaves, is ignored.
  """
  path = Path(workdir) / FILE
  rows: list[Row] = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      row = json.loads(line)
    except json.JSONDecodeError:
      continue
    rows.append({key: math.nan if value is None else value for key, value in row.items()})
  return rows


def drop_from(workdir: str | os.PathLike, iteration: int) -> None:
  """Removes the rows of this iteration and later ones, which a resumed run writes again."""
  path = Path(workdir) / FILE
  if path.exists():
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(_line(row) for row in read(workdir) if row["iteration"] < iteration))
    os.replace(partial, path)


def _line(row: Row) -> str:
  return strict_json.dumps(row) + "\n"


# The writer


class Writer:
  """Writes one row for each iteration to every place that the config turns on. Processes other than
  0 write nothing.

  Args:
    workdir: of the run; it is made if it is missing. Its rows of `first_iteration` and later ones
      are removed.
    config: of the run, with `logging.tensorboard` and `logging.wandb`.
    first_iteration: the iteration with which this process starts.

  Raises:
    ConfigError: the config turns wandb on, and it is not installed.
  """

  def __init__(self, workdir: str | os.PathLike, config: ConfigDict, first_iteration: int = 0):
    self._file = self._tensorboard = self._wandb = None
    if jax.process_index() != 0:
      return
    if config.logging.wandb:
      self._wandb = _open_wandb(workdir, config)
    Path(workdir).mkdir(parents=True, exist_ok=True)
    drop_from(workdir, first_iteration)
    self._file = (Path(workdir) / FILE).open("a")
    if config.logging.tensorboard:
      from tensorboardX import SummaryWriter  # with protobuf, for runs that turn it on

      self._tensorboard = SummaryWriter(
        str(Path(workdir) / "tensorboard"), purge_step=first_iteration
      )

  def write(self, iteration: int, values: Row) -> dict[str, float]:
    """Writes a row and flushes it.

    Args:
      iteration: counted from 0.
      values: scalars, on a device or on the host.

    Returns:
      The row as floats, on every process.
    """
    row = {key: float(value) for key, value in values.items()}
    if self._file is not None:
      self._file.write(_line({"iteration": iteration, **row}))
      self._file.flush()
    if self._tensorboard is not None:
      for key, value in row.items():
        if math.isfinite(value):  # a missing value is a gap in the curve, without a warning
          self._tensorboard.add_scalar(key, value, iteration)
      self._tensorboard.flush()
    if self._wandb is not None:
      self._wandb.log(row, step=iteration)
    return row

  def close(self) -> None:
    for place in (self._file, self._tensorboard):
      if place is not None:
        place.close()
    if self._wandb is not None:
      self._wandb.finish()

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, *_) -> None:
    self.close()


def _open_wandb(workdir: str | os.PathLike, config: ConfigDict) -> Any:
  try:
    import wandb
  except ImportError as error:
    raise ConfigError(
      "config.logging.wandb = True: wandb is not installed; pip install wandb, or set False"
    ) from error
  Path(workdir).mkdir(parents=True, exist_ok=True)
  values = json.loads(stored_config.to_json(config))
  return wandb.init(
    project="dancegrpo_jax",
    name=config.name,
    id=f"{Path(workdir).name}-{stored_config.digest(config)}",  # a resumed run continues its curves
    resume="allow",
    dir=str(workdir),
    config=values,
  )


# The progress line


class Progress:
  """A bar with iteration, reward, samples/s and remaining time on a terminal. Elsewhere it prints
  lines, so that a log file is readable.

  Args:
    total: iterations of the whole run.
    first_iteration: the iteration with which this process starts.
    stream: a text stream; sys.stdout by default.
  """

  def __init__(self, total: int, first_iteration: int = 0, stream: Any = None):
    self._total, self._stream = total, stream or sys.stdout
    # Ends of the last iterations. The duration of the first one, which compiles, is not measured.
    self._times = deque(maxlen=21)
    self._is_quiet, self._bar = jax.process_index() != 0, None
    if not self._is_quiet and self._stream.isatty():
      self._bar, self._task = _open_bar(self._stream, total, first_iteration)

  def update(self, iteration: int, values: Row) -> None:
    """Shows an iteration that is done.

    Args:
      iteration: counted from 0.
      values: its metrics, of which `reward/mean` and `images_per_second` are shown.
    """
    self._times.append(time.monotonic())
    status = self._status(iteration, values)
    if self._bar is not None:
      self._bar.update(self._task, completed=iteration + 1, status=status)
    elif not self._is_quiet:
      print(f"iteration {iteration + 1}/{self._total}  {status}", file=self._stream, flush=True)

  def _status(self, iteration: int, values: Row) -> str:
    left = "--"
    if len(self._times) > 1:
      seconds = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
      left = duration(seconds * (self._total - iteration - 1))
    reward, speed = values.get("reward/mean", math.nan), values.get("images_per_second", math.nan)
    return f"reward {reward:.4f}  {speed:.1f} samples/s  {left} left"

  @property
  def is_live(self) -> bool:
    """Whether there is a bar, whose text may change often."""
    return self._bar is not None

  def status(self, text: str) -> None:
    """Shows what happens before the first iteration: beside the bar, or as a line."""
    if self._bar is not None:
      self._bar.update(self._task, status=text)
    elif not self._is_quiet:
      print(text, file=self._stream, flush=True)

  def message(self, text: str) -> None:
    """Prints a line above the bar."""
    if self._bar is not None:
      self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
    elif not self._is_quiet:
      print(text, file=self._stream, flush=True)

  def warning(self, text: str) -> None:
    """Prints a line from any process and any thread, as about a reward that has failed there."""
    if self._is_quiet:
      print(f"process {jax.process_index()}: {text}", file=self._stream, flush=True)
    else:
      self.message(text)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.stop()

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_) -> None:
    self.close()


def _open_bar(
  stream: Any, total: int, first_iteration: int
) -> tuple[rich.progress.Progress, rich.progress.TaskID]:
  columns = (
    rich.progress.TextColumn("iteration"),
    rich.progress.MofNCompleteColumn(),
    rich.progress.BarColumn(bar_width=24),
    rich.progress.TextColumn("{task.fields[status]}"),
  )
  bar = rich.progress.Progress(*columns, console=Console(file=stream))
  bar.start()
  return bar, bar.add_task("", total=total, completed=first_iteration, status="")


def duration(seconds: float | int) -> str:
  """Seconds as text: 4.2 s, 3 min 05 s, 2 h 10 min."""
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes = int(seconds) // 60
  if minutes < 60:
    return f"{minutes} min {int(seconds) % 60:02d} s"
  return f"{minutes // 60} h {minutes % 60:02d} min"


def gain(rows: Sequence[Row], key: str = "reward/mean") -> tuple[float, float, int]:
  """How a metric has changed over a run.

  Returns:
    Its means over the first n and the last n rows where it is finite, and n, which is 5 or, in a
    short run, less. (nan, nan, 0) where no row has it.
  """
  values = [row[key] for row in rows if math.isfinite(row.get(key, math.nan))]
  count = min(5, max(1, len(values) // 2)) if values else 0
  if not count:
    return math.nan, math.nan, 0
  return sum(values[:count]) / count, sum(values[-count:]) / count, count


def last_line(workdir: str | os.PathLike, report: str | os.PathLike | None = None) -> str:
  """The line at the end of a run: how the reward has changed, and where the report is."""
  first, last, count = gain(read(workdir))
  line = "no iteration was run"
  if count:
    line = f"reward/mean: {first:.4f} -> {last:.4f} (first and last {count} iterations)"
  return f"{line}; report: {report}" if report else line

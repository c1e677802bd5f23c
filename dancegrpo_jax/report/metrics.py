"""What a run says while it runs: metrics.jsonl, TensorBoard, wandb, and a progress line. Process 0
alone writes.

A row of metrics.jsonl is one iteration: {"iteration": 3, "reward/mean": 0.51, ...}; a value that
isn't finite is null there.
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
from ml_collections import ConfigDict

from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.settings import stored_config

FILE = "metrics.jsonl"
Row = Mapping[str, Any]  # metric -> scalar


# The file


def read(workdir: str | os.PathLike) -> list[Row]:
  """Rows of a workdir's metrics.jsonl in order, null as NaN; [] where there is none. A last line
  cut by a kill is left out.
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
  """Drops the rows of this iteration and later ones, which a resumed run writes again."""
  path = Path(workdir) / FILE
  if path.exists():
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(_line(row) for row in read(workdir) if row["iteration"] < iteration))
    os.replace(partial, path)


def _line(row: Row) -> str:
  return (
    json.dumps({key: value if math.isfinite(value) else None for key, value in row.items()}) + "\n"
  )


# The writer


class Writer:
  """Writes one row an iteration to every place that the config asks for; on processes other than 0
  it does nothing.

  Args:
    workdir: made where missing; rows of `first_iteration` and later that are there already are
      dropped.
    config: the run's; `logging.tensorboard` and `logging.wandb` are read.
    first_iteration: the one this process starts with: 0, or where it resumes.

  Raises:
    ConfigError: wandb is asked for and not installed.
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
      from tensorboardX import SummaryWriter

      self._tensorboard = SummaryWriter(
        str(Path(workdir) / "tensorboard"), purge_step=first_iteration
      )

  def write(self, iteration: int, values: Row) -> dict[str, float]:
    """Writes a row and flushes it. Values are scalars, on a device or not. Returns the row as
    floats, on every process.
    """
    row = {key: float(value) for key, value in values.items()}
    if self._file is not None:
      self._file.write(_line({"iteration": iteration, **row}))
      self._file.flush()
    if self._tensorboard is not None:
      for key, value in row.items():
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
  run_id = (
    f"{Path(workdir).name}-{stored_config.digest(config)}"  # a resumed run goes on in its own curve
  )
  return wandb.init(
    project="dancegrpo_jax",
    name=config.name,
    id=run_id,
    resume="allow",
    dir=str(workdir),
    config=values,
  )


# The progress line


class Progress:
  """A bar with iteration, reward, images/s and time left on a terminal; plain lines elsewhere, so
  that a log file is readable.

  Args:
    total: iterations of the whole run.
    first_iteration: where this process starts.
    stream: a text stream; sys.stdout by default.
  """

  def __init__(self, total: int, first_iteration: int = 0, stream: Any = None):
    self._total, self._stream = total, stream or sys.stdout
    self._times = deque(
      maxlen=21
    )  # ends of the last iterations; the first one, which compiles, only starts the clock
    self._quiet, self._bar = jax.process_index() != 0, None
    if not self._quiet and self._stream.isatty():
      self._bar, self._task = _open_bar(self._stream, total, first_iteration)

  def update(self, iteration: int, values: Row) -> None:
    """Shows an iteration (counted from 0) that is done; reads `reward/mean` and
    `images_per_second`.
    """
    self._times.append(time.monotonic())
    status = self._status(iteration, values)
    if self._bar is not None:
      self._bar.update(self._task, completed=iteration + 1, status=status)
    elif not self._quiet:
      print(f"iteration {iteration + 1}/{self._total}  {status}", file=self._stream, flush=True)

  def _status(self, iteration: int, values: Row) -> str:
    left = "--"
    if len(self._times) > 1:
      seconds = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
      left = duration(seconds * (self._total - iteration - 1))
    reward, speed = values.get("reward/mean", math.nan), values.get("images_per_second", math.nan)
    return f"reward {reward:.4f}  {speed:.1f} images/s  {left} left"

  @property
  def is_live(self) -> bool:
    """Whether a bar is there whose text can be changed as often as one likes."""
    return self._bar is not None

  def status(self, text: str) -> None:
    """What is going on before the first iteration: beside the bar, or a line."""
    if self._bar is not None:
      self._bar.update(self._task, status=text)
    elif not self._quiet:
      print(text, file=self._stream, flush=True)

  def message(self, text: str) -> None:
    """A line above the bar."""
    if self._bar is not None:
      self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
    elif not self._quiet:
      print(text, file=self._stream, flush=True)

  def warning(self, text: str) -> None:
    """A line from whichever process has something to say, as a reward that failed there; any
    thread.
    """
    if self._quiet:
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


def _open_bar(stream: Any, total: int, first_iteration: int) -> tuple[Any, Any]:
  from rich.console import Console
  from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
  from rich.progress import Progress as Bar

  columns = (
    TextColumn("iteration"),
    MofNCompleteColumn(),
    BarColumn(bar_width=24),
    TextColumn("{task.fields[status]}"),
  )
  bar = Bar(*columns, console=Console(file=stream))
  bar.start()
  return bar, bar.add_task("", total=total, completed=first_iteration, status="")


def duration(seconds: float | int) -> str:
  """A time for people: 4.2 s, 3 min 05 s, 2 h 10 min."""
  if seconds < 60:
    return f"{seconds:.1f} s"
  minutes = int(seconds) // 60
  return (
    f"{minutes} min {int(seconds) % 60:02d} s"
    if minutes < 60
    else f"{minutes // 60} h {minutes % 60:02d} min"
  )


def gain(rows: Sequence[Row], key: str = "reward/mean") -> tuple[float, float, int]:
  """Means of a metric over the first and the last n rows where it is finite, and n: 5, or fewer
  where the run is short.

  (nan, nan, 0) where no row has it.
  """
  values = [row[key] for row in rows if math.isfinite(row.get(key, math.nan))]
  count = min(5, max(1, len(values) // 2)) if values else 0
  if not count:
    return math.nan, math.nan, 0
  return sum(values[:count]) / count, sum(values[-count:]) / count, count


def last_line(workdir: str | os.PathLike, report: str | os.PathLike | None = None) -> str:
  """The line that ends a run: what was gained, and where to look."""
  first, last, count = gain(read(workdir))
  what = (
    f"reward/mean: {first:.4f} -> {last:.4f} (first and last {count} iterations)"
    if count
    else "no iteration was run"
  )
  return f"{what}; report: {report}" if report else what

"""Where the metrics of a run go: metrics.jsonl, TensorBoard and wandb. Only process 0 writes.

A row of metrics.jsonl is one iteration: {"iteration": 3, "reward/mean": 0.51, ...}. A value that is
not finite is null.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax import buckets, strict_json
from dancegrpo_jax.report import trackers

FILE = "metrics.jsonl"
Row = Mapping[str, Any]  # metric -> scalar
_RENAMED = {"images_per_second": "samples_per_second"}  # since 0.2.0


# The file


def read(workdir: str | os.PathLike) -> list[Row]:
  """The rows of a workdir's metrics.jsonl in order, with NaN for null; [] where there is no file.

  An incomplete last line, which a killed process leaves, is ignored. Metrics that had another name
  in an earlier version have the present one.
  """
  path = Path(workdir) / FILE
  rows: list[Row] = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      row = json.loads(line)
    except json.JSONDecodeError:
      continue
    rows.append(
      {_RENAMED.get(key, key): math.nan if value is None else value for key, value in row.items()}
    )
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
    config: of the run, with `logging`.
    first_iteration: the iteration with which this process starts.

  Raises:
    ConfigError: the config turns wandb on, and it can't be used.
  """

  def __init__(self, workdir: str | os.PathLike, config: ConfigDict, first_iteration: int = 0):
    self._config, self._file = config, None
    self._trackers: list[trackers.TensorBoard | trackers.Wandb] = []
    if jax.process_index() != 0:
      return
    if config.logging.wandb:
      self._trackers.append(trackers.Wandb(workdir, config, first_iteration))
    Path(workdir).mkdir(parents=True, exist_ok=True)
    drop_from(workdir, first_iteration)
    self._file = (Path(workdir) / FILE).open("a")
    if config.logging.tensorboard:
      self._trackers.append(trackers.TensorBoard(workdir, config, first_iteration))

  def write(
    self, iteration: int, values: Row, samples: Mapping[str, Any] | None = None
  ) -> dict[str, float]:
    """Writes a row and flushes it.

    Args:
      iteration: counted from 0.
      values: scalars, on a device or on the host.
      samples: by name, the scores of the iteration's samples by term, and "advantage"; arrays on a
        device or on the host, whole in every process. Trackers draw histograms of them.

    Returns:
      The row as floats, on every process.
    """
    row = {key: float(value) for key, value in values.items()}
    if self._file is not None:
      self._file.write(_line({"iteration": iteration, **row}))
      self._file.flush()
    drawn = self._distributions(samples) if samples and self._trackers else {}
    for tracker in self._trackers:
      tracker.histograms(iteration + 1, drawn)
      tracker.scalars(iteration + 1, row)
    return row

  def _distributions(self, samples: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of which histograms are drawn: rewards, their terms where there are several, and
    advantages.
    """
    arrays = {name: np.asarray(values) for name, values in samples.items()}
    terms = self._config.reward.terms
    total = sum(weight * arrays[term] for term, weight in terms)
    several = [term for term, _ in terms] if len(terms) > 1 else []
    parts = {f"reward/{term}": arrays[term] for term in (*several, *self._config.reward.watch)}
    return {"rewards": total, **parts, "advantages": arrays["advantage"]}

  def show(
    self,
    done: int,
    values: Row,
    pixels: np.ndarray,
    prompts: Sequence[str],
    scores: Sequence[float] | np.ndarray,
  ) -> None:
    """Sends an evaluation to the trackers.

    Args:
      done: number of finished iterations; 0 is the base model.
      values: metrics of the evaluation.
      pixels: `[n, (frames,) height, width, 3]` in [0, 1].
      prompts: n texts.
      scores: n scores, NaN for failed ones.
    """
    captions = [f"{prompt} ({score:.4f})" for prompt, score in zip(prompts, scores)]
    for tracker in self._trackers:
      tracker.pictures(done, pixels, prompts, captions)
      if done == 0:  # later evaluations are part of their iteration's row
        tracker.scalars(done, values)

  def close(self) -> None:
    for place in (self._file, *self._trackers):
      if place is not None:
        place.close()

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, *_) -> None:
    self.close()


# Text


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
  if not report:
    return line
  bucket = buckets.behind(workdir)
  also = f", and {bucket}/{Path(report).name}" if buckets.is_url(bucket) else ""
  return f"{line}; report: {report}{also}"

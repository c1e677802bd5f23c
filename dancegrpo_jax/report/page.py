"""Writes report.html of a workdir: one file that can be read offline and has no scripts.

It is made from these files of the workdir, so it can be made again at any time:

    config.json  metrics.jsonl  environment.json
    samples/iteration_000010/00.png ... prompts.json  (iteration 0 is the base model)
      {"prompts": texts, "scores": numbers, "held_out": numbers}
    samples/extremes_000010/best.png worst.png scores.json
      {"prompt": text, "best": number, "worst": number}
"""

import base64
import io
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from dancegrpo_jax import strict_json
from dancegrpo_jax.report import images, metrics
from dancegrpo_jax.report.charts import Band, Series, chart, number
from dancegrpo_jax.settings import stored_config

FILE = "report.html"
_TEMPLATE = Path(__file__).with_name("template.html")
_MAX_COLUMNS = 8  # of the grid of samples
_MAX_PAIRS = 4  # of a best and a worst sample
_THUMBNAIL = 224  # pixels; larger images are embedded at this width, as JPEG

Workdir = str | os.PathLike


class SmallChart(NamedTuple):
  """A small chart: its title, the unit of its values, and its metrics by their labels."""

  title: str
  unit: str
  metrics: dict[str, str]


# A chart is left out if the run has none of its metrics.
_SMALL_CHARTS = (
  SmallChart("Spread within groups", "mean std of rewards", {"std": "group/std_mean"}),
  SmallChart("Clipped", "share of transitions", {"clipped": "clip_fraction"}),
  SmallChart("Dropped", "share of transitions", {"dropped": "drop_fraction"}),
  SmallChart("Divergence", "mean, nats a latent dimension", {"from the old policy": "policy_kl"}),
  SmallChart(
    "KL",
    "nats, as the log-prob is reduced",
    {"to the iteration's start": "approx_kl", "to the initial model": "kl"},
  ),
  SmallChart("Gradient", "global norm before clipping", {"norm": "grad_norm"}),
  SmallChart("Learning rate", "", {"rate": "learning_rate"}),
  SmallChart(
    "Drift before the first update",
    "largest |ratio - 1|; 0 is exact",
    {"drift": "ratio/drift_max"},
  ),
  SmallChart("Advantage", "mean |A|", {"mean |A|": "advantage/abs_mean"}),
  SmallChart(
    "Failed or flat",
    "share",
    {"rewards that failed": "reward/failed", "groups without spread": "group/zero_variance"},
  ),
  SmallChart(
    "Time of an iteration",
    "seconds",
    {part: f"time/{part}" for part in ("encode", "rollout", "decode", "reward", "update")},
  ),
  SmallChart("Speed", "samples a second", {"samples": "images_per_second"}),
)


# Files of the training loop


def save_environment(workdir: Workdir) -> None:
  """Writes environment.json: versions and devices of this process."""
  devices = jax.devices()
  values = {
    "jax": jax.__version__,
    "python": platform.python_version(),
    "system": platform.platform(),
    "backend": jax.default_backend(),
    "devices": f"{len(devices)} x {devices[0].device_kind}",
    "processes": jax.process_count(),
    "processors of this host": os.cpu_count(),
  }
  _write_text(Path(workdir) / "environment.json", strict_json.dumps(values, indent=2))


def save_samples(
  workdir: Workdir,
  iteration: int,
  pixels: np.ndarray,
  prompts: Sequence[str],
  scores: Sequence[float] | np.ndarray,
  held_out: Sequence[float] | np.ndarray = (),
) -> Path:
  """Writes samples of the fixed prompts.

  Args:
    workdir: of the run.
    iteration: how many iterations were done; 0 is the base model.
    pixels: `[batch, height, width, 3]` in [0, 1].
    prompts: their prompts.
    scores: their scores.
    held_out: scores of prompts that are never trained on. Their samples are not written.

  Returns:
    The folder.
  """
  folder = Path(workdir) / "samples" / f"iteration_{iteration:06d}"
  images.save_images(folder, pixels)
  values = {
    "prompts": list(prompts),
    "scores": list(map(_json, scores)),
    "held_out": list(map(_json, held_out)),
  }
  # Written last: a folder that has this file is complete.
  _write_text(folder / "prompts.json", strict_json.dumps(values))
  return folder


def save_extremes(
  workdir: Workdir,
  iteration: int,
  best: np.ndarray,
  worst: np.ndarray,
  prompt: str,
  best_score: float,
  worst_score: float,
) -> Path:
  """Writes the best and the worst sample of one group of an iteration, `[height, width, 3]`.

  Returns:
    The folder.
  """
  folder = Path(workdir) / "samples" / f"extremes_{iteration:06d}"
  images.save(folder / "best.png", best)
  images.save(folder / "worst.png", worst)
  scores = {"prompt": prompt, "best": _json(best_score), "worst": _json(worst_score)}
  _write_text(folder / "scores.json", strict_json.dumps(scores))
  return folder


def write(workdir: Workdir) -> Path:
  """Writes report.html of a workdir and returns its path.

  Parts for which there are no files yet are left out of the page.
  """
  workdir = Path(workdir)
  config = _read_json(workdir / "config.json")
  rows = metrics.read(workdir)
  sampled = _sampled(workdir)
  environment = jinja2.Environment(
    autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
  )
  figures = {"large": _large(rows, config), "small": _small(rows, sampled)}
  page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
    name=config.get("name", workdir.name),
    subtitle=_subtitle(config),
    tiles=_tiles(rows, config),
    grid=_grid(sampled),
    extremes=_extremes(workdir),
    summary=_summary(rows),
    environment=list(_read_json(workdir / "environment.json").items()),
    config=list(stored_config.flatten(config).items()),
    **{size: [Markup(figure) for figure in drawn] for size, drawn in figures.items()},
  )
  _write_text(workdir / FILE, page)
  return workdir / FILE


# The parts of the page


def _subtitle(config: Mapping[str, Any]) -> str:
  fields = stored_config.flatten(dict(config))
  family, kind = fields.get("model.family", "?").replace("_", " "), fields.get("sampler.kind", "?")
  group = fields.get("rollout.samples_per_prompt", "?")
  prompts = fields.get("data.prompts_per_iteration", "?")
  steps = fields.get("sampler.steps", "?")
  batch = f"{prompts} prompts × {group} samples an iteration, {steps} steps of the {kind} sampler"
  algorithm = fields.get("objective.kind", "grpo").upper()
  return f"{algorithm} on {family}; reward {_terms(config)}; {batch}"


def _tiles(rows: Sequence[metrics.Row], config: Mapping[str, Any]) -> list[dict[str, str]]:
  """The numbers at the top: the change of the reward, the progress of the run, and its time."""
  tiles = []
  first, last, count = metrics.gain(rows)
  if count:
    gained = last - first
    kind = "up" if gained > 0 else "down"
    tiles.append({"value": f"{gained:+.4f}", "label": "reward gained", "kind": kind})
    spread = f"mean of {count} iterations" if count > 1 else "one iteration"
    label = f"reward, first and last ({spread})"
    tiles.append({"value": f"{first:.4f} → {last:.4f}", "label": label, "kind": ""})
  done = f"{len(rows)} of {config.get('iterations', '?')}"
  tiles.append({"value": done, "label": "iterations", "kind": ""})
  seconds = sum(value for value in _column(rows, "time/total") if math.isfinite(value))
  if seconds:
    value = metrics.duration(seconds)
    tiles.append({"value": value, "label": "time of the iterations", "kind": ""})
  skipped = rows[-1].get("optimizer/skipped_total", 0) if rows else 0
  if skipped > 0:
    label = "optimizer steps skipped (not finite)"
    tiles.append({"value": f"{skipped:g}", "label": label, "kind": "down"})
  return tiles


def _column(rows: Sequence[metrics.Row], key: str) -> list[float]:
  return [row.get(key, math.nan) for row in rows]


def _large(rows: Sequence[metrics.Row], config: Mapping[str, Any]) -> list[str]:
  """Charts of reward and ratio, with their spread."""
  x = [row["iteration"] for row in rows]
  mean, std = _column(rows, "reward/mean"), _column(rows, "reward/std")
  low = [m - s for m, s in zip(mean, std)]
  high = [m + s for m, s in zip(mean, std)]
  bands = (
    Band("± 1 std of the samples", low, high),
    Band("least to greatest", _column(rows, "reward/min"), _column(rows, "reward/max"), weak=True),
  )
  reward = chart("Reward", _terms(config), x, [Series("mean", mean)], bands)
  line = Series("mean", _column(rows, "ratio/mean"), 2)
  band = Band("least to greatest", _column(rows, "ratio/min"), _column(rows, "ratio/max"), 2)
  ratio = chart("Importance ratio", "new / old probability of a step", x, [line], [band])
  return [figure for figure in (reward, ratio) if figure]


def _terms(config: Mapping[str, Any]) -> str:
  """The reward as text, as "clip + 0.5 hps"."""
  return " + ".join(
    f"{weight:g} {name}" if weight != 1 else name
    for name, weight in config.get("reward", {}).get("terms", ())
  )


def _small(rows: Sequence[metrics.Row], sampled: list[dict[str, Any]]) -> list[str]:
  """The small charts for which there is anything to show."""
  x = [row["iteration"] for row in rows]
  figures = [_fixed_prompts(sampled)]
  for title, unit, keys in _SMALL_CHARTS:
    # A metric that is always NaN or 0 belongs to a part that is turned off, as a KL penalty without
    # weight. If all metrics of a chart are so, it shows the first.
    columns = {label: _column(rows, key) for label, key in keys.items()}
    used = [label for label, column in columns.items() if any(map(_is_used, column))]
    labels = used or list(columns)[:1]
    lines = [Series(label, columns[label], color) for color, label in enumerate(labels, 1)]
    figures.append(chart(title, unit, x, lines))
  return [figure for figure in figures if figure]


def _is_used(value: float) -> bool:
  return math.isfinite(value) and value != 0


def _fixed_prompts(sampled: list[dict[str, Any]]) -> str:
  """The chart of the scores of the fixed prompts."""
  x = [entry["iteration"] for entry in sampled]
  lines = [
    Series(label, [_mean(entry.get(key, ())) for entry in sampled], color)
    for label, key, color in (("training", "scores", 1), ("held out", "held_out", 2))
    if any(entry.get(key) for entry in sampled)
  ]
  return chart("Fixed prompts", "mean score, deterministic sampler", x, lines)


def _mean(scores: Sequence[float | None]) -> float:
  finite = [score for score in scores if score is not None]
  return sum(finite) / len(finite) if finite else math.nan


def _sampled(workdir: Path) -> list[dict[str, Any]]:
  """The complete folders of samples, by iteration.

  Returns:
    Dicts with "iteration", "folder", and the content of prompts.json.
  """
  files = (workdir / "samples").glob("iteration_*/prompts.json")
  entries = [
    {"iteration": _iteration(file.parent), "folder": file.parent, **_read_json(file)}
    for file in files
  ]
  return sorted(entries, key=lambda entry: entry["iteration"])


def _iteration(folder: Path) -> int:
  """The iteration in a folder's name."""
  return int(folder.name.rpartition("_")[2])


def _grid(sampled: list[dict[str, Any]]) -> dict[str, Any]:
  """The grid of samples: a row for each prompt, and a column for the first iteration, the last one,
  and some between them.
  """
  shown = _spaced(sampled, _MAX_COLUMNS)
  names = [
    "base" if entry["iteration"] == 0 else f"iteration {entry['iteration']}" for entry in shown
  ]
  rows = []
  for index, prompt in enumerate(shown[0]["prompts"] if shown else ()):
    cells = []
    for column, entry in zip(names, shown):
      files = sorted(entry["folder"].glob("*.png"))
      cell = _EMPTY_CELL
      # A resumed run may have other prompts, because evaluation.prompts may change.
      if index < len(files) and entry["prompts"][index] == prompt:
        cell = _cell(files[index], entry["scores"][index])
      cells.append({"column": column, **cell})
    rows.append({"prompt": prompt, "cells": cells})
  return {"columns": names, "rows": rows, "base": bool(shown) and shown[0]["iteration"] == 0}


def _extremes(workdir: Path) -> list[dict[str, Any]]:
  """Pairs of a best and a worst sample."""
  files = sorted((workdir / "samples").glob("extremes_*/scores.json"))
  pairs = []
  for file in _spaced(files, _MAX_PAIRS):
    scores = _read_json(file)
    sides = [
      {"name": name, **_cell(file.parent / f"{name}.png", scores[name])}
      for name in ("best", "worst")
    ]
    title = f"iteration {_iteration(file.parent)}"
    pairs.append({"title": title, "prompt": scores["prompt"], "sides": sides})
  return pairs


def _spaced(items: Sequence[Any], most: int) -> list[Any]:
  """At most `most` of the items, evenly spaced, with the first and the last."""
  if len(items) <= most:
    return list(items)
  return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


_EMPTY_CELL = {"image": "", "kind": "", "score": ""}


def _cell(file: Path, score: float | int | None) -> dict[str, str]:
  """An image and its score, which is None if the reward has failed."""
  if not file.exists():
    return _EMPTY_CELL
  uri, small = _data_uri(file)
  return {
    "image": uri,
    "kind": "pixelated" if small else "",
    "score": "failed" if score is None else number(score),
  }


def _data_uri(file: Path) -> tuple[str, bool]:
  """The image as a data URI, and whether it is so small that the page enlarges it."""
  with Image.open(file) as image:
    width = image.width
    if width <= _THUMBNAIL:
      return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}", width < 100
    content = io.BytesIO()
    image.convert("RGB").resize((_THUMBNAIL, round(image.height * _THUMBNAIL / width))).save(
      content, "JPEG", quality=88
    )
  return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}", False


def _summary(rows: Sequence[metrics.Row]) -> list[dict[str, Any]]:
  """First, last, least and greatest value of every metric."""
  keys = dict.fromkeys(key for row in rows for key in row if key != "iteration")
  table = []
  for key in keys:
    values = [value for value in _column(rows, key) if math.isfinite(value)]
    ends = (values[0], values[-1], min(values), max(values)) if values else ()
    table.append({"key": key, "values": [number(value) for value in ends]})
  return table


# Files


def _json(score: Any) -> float | None:
  """A score for JSON, which has no NaN: None for a failed one."""
  value = float(score)
  return value if math.isfinite(value) else None


def _read_json(path: Path) -> dict[str, Any]:
  """The content of a file, {} if there is none."""
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write_text(path: Path, text: str) -> None:
  """Writes a file that appears whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.partial")
  partial.write_text(text, encoding="utf-8")
  os.replace(partial, path)

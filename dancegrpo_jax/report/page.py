"""report.html of a workdir: one file, readable offline, without scripts.

It is made from what lies in the workdir, so that it can be made again at any time:

    config.json  metrics.jsonl  environment.json
    samples/iteration_000010/00.png ... prompts.json      {"prompts", "scores", "held_out": scores}; 0 is the base
    samples/extremes_000010/best.png worst.png scores.json   {"prompt": ..., "best": score, "worst": score}
"""

import base64
import io
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dancegrpo_jax.report import images, metrics
from dancegrpo_jax.report.charts import Band, Series, chart, number
from dancegrpo_jax.settings import stored_config

FILE = "report.html"
_TEMPLATE = Path(__file__).with_name("template.html")
_MAX_COLUMNS, _MAX_PAIRS = 8, 4
_THUMBNAIL = 224  # pixels; larger images are embedded at this width, as JPEG

Workdir = str | os.PathLike
_PARTS = ("encode", "rollout", "decode", "reward", "update")
# Small charts: title, unit, metrics (label, key). Those whose metrics a run doesn't have are left
# out.
_SMALL = (
  ("Fixed prompts", "mean score, deterministic sampler", (("training", "samples/score"),)),
  ("Spread within groups", "mean std of rewards", (("std", "group/std_mean"),)),
  ("Clipped", "share of transitions", (("clipped", "clip_fraction"),)),
  ("Dropped", "share of transitions", (("dropped", "drop_fraction"),)),
  ("Divergence", "mean, nats a latent dimension", (("from the old policy", "policy_kl"),)),
  (
    "KL",
    "nats, as the log-prob is reduced",
    (("to the iteration's start", "approx_kl"), ("to the initial model", "kl")),
  ),
  ("Gradient", "global norm before clipping", (("norm", "grad_norm"),)),
  ("Learning rate", "", (("rate", "learning_rate"),)),
  (
    "Drift before the first update",
    "largest |ratio - 1|; 0 is exact",
    (("drift", "ratio/drift_max"),),
  ),
  ("Advantage", "mean |A|", (("mean |A|", "advantage/abs_mean"),)),
  (
    "Failed or flat",
    "share",
    (("rewards that failed", "reward/failed"), ("groups without spread", "group/zero_variance")),
  ),
  ("Time of an iteration", "seconds", tuple((part, f"time/{part}") for part in _PARTS)),
  ("Speed", "images a second", (("images", "images_per_second"),)),
)


# What the loop writes


def save_environment(workdir: Workdir) -> None:
  """Writes environment.json: versions and devices of this process."""
  import jax

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
  _write_text(Path(workdir) / "environment.json", json.dumps(values, indent=2))


def save_samples(
  workdir: Workdir,
  iteration: int,
  pixels: np.ndarray,
  prompts: Sequence[str],
  scores: Sequence[float] | np.ndarray,
  held_out: Sequence[float] | np.ndarray = (),
) -> Path:
  """Writes the samples of the fixed prompts `[batch, height, width, 3]` after `iteration`
  iterations (0: the base model's).

  `held_out` are scores of other prompts, which training never sees; their samples aren't kept.
  """
  folder = Path(workdir) / "samples" / f"iteration_{iteration:06d}"
  images.save_images(folder, pixels)
  # last, so that a folder with prompts.json is whole
  values = {
    "prompts": list(prompts),
    "scores": list(map(_json, scores)),
    "held_out": list(map(_json, held_out)),
  }
  _write_text(folder / "prompts.json", json.dumps(values))
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
  """Writes the best and the worst sample `[height, width, 3]` of one group of an iteration."""
  folder = Path(workdir) / "samples" / f"extremes_{iteration:06d}"
  images.save(folder / "best.png", best)
  images.save(folder / "worst.png", worst)
  scores = {"prompt": prompt, "best": _json(best_score), "worst": _json(worst_score)}
  _write_text(folder / "scores.json", json.dumps(scores))
  return folder


def write(workdir: Workdir) -> Path:
  """Writes <workdir>/report.html from what is there, and returns its path. Missing parts are left
  out of the page.
  """
  import jinja2
  from markupsafe import Markup

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
  group, prompts = (
    fields.get("rollout.samples_per_prompt", "?"),
    fields.get("data.prompts_per_iteration", "?"),
  )
  steps = fields.get("sampler.steps", "?")
  batch = f"{prompts} prompts × {group} samples an iteration, {steps} steps of the {kind} sampler"
  algorithm = fields.get("objective.kind", "grpo").upper()
  return f"{algorithm} on {family}; reward {_terms(config)}; {batch}"


def _tiles(rows: Sequence[metrics.Row], config: Mapping[str, Any]) -> list[dict[str, str]]:
  """Figures at the top: what was gained, how far the run is, how long it took."""
  first, last, count = metrics.gain(rows)
  total = config.get("iterations", "?")
  tiles = [{"value": f"{len(rows)} of {total}", "label": "iterations", "kind": ""}]
  if count:
    gained = last - first
    spread = f"mean of {count} iterations" if count > 1 else "one iteration"
    tiles.insert(
      0,
      {"value": f"{gained:+.4f}", "label": "reward gained", "kind": "up" if gained > 0 else "down"},
    )
    tiles.insert(
      1,
      {
        "value": f"{first:.4f} → {last:.4f}",
        "label": f"reward, first and last ({spread})",
        "kind": "",
      },
    )
  seconds = sum(value for value in _column(rows, "time/total") if math.isfinite(value))
  if seconds:
    tiles.append(
      {"value": metrics.duration(seconds), "label": "time of the iterations", "kind": ""}
    )
  skipped = rows[-1].get("optimizer/skipped_total", 0) if rows else 0
  if skipped > 0:
    tiles.append(
      {"value": f"{skipped:g}", "label": "optimizer steps skipped (not finite)", "kind": "down"}
    )
  return tiles


def _column(rows: Sequence[metrics.Row], key: str) -> list[float]:
  return [row.get(key, math.nan) for row in rows]


def _large(rows: Sequence[metrics.Row], config: Mapping[str, Any]) -> list[str]:
  """Reward and ratio, with their spread."""
  x = [row["iteration"] for row in rows]
  mean, std = _column(rows, "reward/mean"), _column(rows, "reward/std")
  spread = Band(
    "± 1 std of the samples", [m - s for m, s in zip(mean, std)], [m + s for m, s in zip(mean, std)]
  )
  extent = Band(
    "least to greatest", _column(rows, "reward/min"), _column(rows, "reward/max"), weak=True
  )
  reward = chart("Reward", _terms(config), x, [Series("mean", mean)], [spread, extent])
  line = Series("mean", _column(rows, "ratio/mean"), 2)
  extent = Band("least to greatest", _column(rows, "ratio/min"), _column(rows, "ratio/max"), 2)
  ratio = chart("Importance ratio", "new / old probability of a step", x, [line], [extent])
  return [figure for figure in (reward, ratio) if figure]


def _terms(config: Mapping[str, Any]) -> str:
  return " + ".join(
    f"{weight:g} {name}" if weight != 1 else name
    for name, weight in config.get("reward", {}).get("terms", ())
  )


def _small(rows: Sequence[metrics.Row], sampled: list[dict[str, Any]]) -> list[str]:
  figures = []
  for title, unit, columns in _SMALL:
    if columns[0][1] == "samples/score":
      x = [entry["iteration"] for entry in sampled]
      lines = [
        Series(label, [_mean(entry.get(key, ())) for entry in sampled], color)
        for color, (label, key) in enumerate((("training", "scores"), ("held out", "held_out")), 1)
        if any(entry.get(key) for entry in sampled)
      ]
    else:
      x = [row["iteration"] for row in rows]
      # NaN and 0 everywhere is a part that is off (a KL without weight); a chart of nothing else
      # shows its first
      present = [
        (label, key)
        for label, key in columns
        if any(value for value in _column(rows, key) if math.isfinite(value))
      ]
      present = present or list(columns[:1])
      lines = [
        Series(label, _column(rows, key), color) for color, (label, key) in enumerate(present, 1)
      ]
    figures.append(chart(title, unit, x, lines))
  return [figure for figure in figures if figure]


def _mean(scores: Sequence[float | None]) -> float:
  finite = [score for score in scores if score is not None]
  return sum(finite) / len(finite) if finite else math.nan


def _sampled(workdir: Path) -> list[dict[str, Any]]:
  """The sample folders that are whole, by iteration: {"iteration", "folder", "prompts",
  "scores"}.
  """
  entries = []
  for file in sorted((workdir / "samples").glob("iteration_*/prompts.json")):
    entries.append(
      {
        "iteration": int(file.parent.name.rpartition("_")[2]),
        "folder": file.parent,
        **_read_json(file),
      }
    )
  return sorted(entries, key=lambda entry: entry["iteration"])


def _grid(sampled: list[dict[str, Any]]) -> dict[str, Any]:
  """Rows of prompts, columns of times: the first, the last, and some between them."""
  shown = _spaced(sampled, _MAX_COLUMNS)
  names = [
    "base" if entry["iteration"] == 0 else f"iteration {entry['iteration']}" for entry in shown
  ]
  rows = []
  for index, prompt in enumerate(shown[0]["prompts"] if shown else ()):
    cells = []
    for column, entry in zip(names, shown):
      files = sorted(entry["folder"].glob("*.png"))
      same = (
        index < len(files) and entry["prompts"][index] == prompt
      )  # evaluation.prompts may change on resume
      cells.append(
        {
          "column": column,
          **_cell(files[index] if same else None, entry["scores"][index] if same else None),
        }
      )
    rows.append({"prompt": prompt, "cells": cells})
  return {"columns": names, "rows": rows, "base": bool(shown) and shown[0]["iteration"] == 0}


def _extremes(workdir: Path) -> list[dict[str, Any]]:
  files = sorted((workdir / "samples").glob("extremes_*/scores.json"))
  pairs = []
  for file in _spaced(files, _MAX_PAIRS):
    scores = _read_json(file)
    sides = [
      {"name": name, **_cell(file.parent / f"{name}.png", scores[name])}
      for name in ("best", "worst")
    ]
    iteration = int(file.parent.name.rpartition("_")[2])
    pairs.append({"title": f"iteration {iteration}", "prompt": scores["prompt"], "sides": sides})
  return pairs


def _spaced(items: Sequence[Any], most: int) -> list[Any]:
  """At most `most` items, evenly spaced, the first and the last among them."""
  if len(items) <= most:
    return list(items)
  return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _cell(file: Path | None, score: float | int | None) -> dict[str, str]:
  if file is None or not file.exists():
    return {"image": "", "kind": "", "score": ""}
  uri, small = _data_uri(file)
  return {
    "image": uri,
    "kind": "pixelated" if small else "",
    "score": "failed" if score is None else number(score),
  }


def _data_uri(file: Path) -> tuple[str, bool]:
  """The image as a data URI, and whether it is so small that the page enlarges it."""
  from PIL import Image

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
  keys = dict.fromkeys(key for row in rows for key in row if key != "iteration")
  table = []
  for key in keys:
    values = [value for value in _column(rows, key) if math.isfinite(value)]
    ends = (values[0], values[-1], min(values), max(values)) if values else ()
    table.append({"key": key, "values": [number(value) for value in ends]})
  return table


# Files


def _json(score: Any) -> float | None:
  """A score for JSON, which has no NaN: a failed one is null."""
  value = float(score)
  return value if math.isfinite(value) else None


def _read_json(path: Path) -> dict[str, Any]:
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write_text(path: Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.partial")
  partial.write_text(text, encoding="utf-8")
  os.replace(partial, path)

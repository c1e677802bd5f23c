"""Writes report.html of a workdir: one file that can be read offline. Its one short script enlarges
pictures.

It is made from these files of the workdir, so it can be made again at any time:

    config.json  metrics.jsonl  environment.json  status.json
    samples/iteration_000010/00.png ... prompts.json  (iteration 0 is the base model)
      {"prompts": texts, "scores": numbers, "held_out": numbers}
    samples/extremes_000010/best.png worst.png scores.json
      {"prompt": text, "best": number, "worst": number, "rewards": numbers}
"""

import importlib.metadata
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jinja2
import numpy as np
from markupsafe import Markup

from dancegrpo_jax import __version__, installation, strict_json
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.report import curves, files, images, metrics, pictures, samples, status, story
from dancegrpo_jax.report.charts import number_text
from dancegrpo_jax.rewards import failures
from dancegrpo_jax.settings import config_file, stored_config
from dancegrpo_jax.types import Media

FILE = "report.html"
_TEMPLATE = Path(__file__).with_name("template.html")
_MOST_REWARDS = 1000  # of an iteration, which are kept for the histogram
_MOST_TEXT = 100_000  # characters of all prompts in full
_MOST_ERRORS = 5000  # characters of the errors of rewards
_PACKAGES = ("jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

Workdir = str | os.PathLike


# Files of the training loop


def save_environment(workdir: Workdir) -> None:
  """Writes environment.json: versions and devices of this process."""
  devices = jax.devices()
  values = {
    "dancegrpo_jax": __version__,
    "commit": _commit(),
    "jax": jax.__version__,
    **{name: _version(name) for name in _PACKAGES},
    "python": platform.python_version(),
    "system": platform.platform(),
    "backend": jax.default_backend(),
    "devices": f"{len(devices)} x {devices[0].device_kind}",
    "processes": jax.process_count(),
    "processors of this host": os.cpu_count(),
  }
  known = {key: value for key, value in values.items() if value}
  files.write_text(Path(workdir) / "environment.json", strict_json.dumps(known, indent=2))


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return ""


def _commit() -> str:
  """The commit of a checkout of this package, with "-dirty" where files differ from it; ""
  elsewhere.
  """
  command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
  if not (installation.ROOT / ".git").exists():
    return ""
  try:
    done = subprocess.run(
      command, cwd=installation.ROOT, capture_output=True, text=True, timeout=10, check=True
    )
  except (OSError, subprocess.SubprocessError):  # no git, or a folder of another user
    return ""
  return done.stdout.strip()


def save_samples(
  workdir: Workdir,
  iteration: int,
  media: Media,
  prompts: Sequence[str],
  scores: Sequence[float] | np.ndarray,
  held_out: Sequence[float] | np.ndarray = (),
) -> Path:
  """Writes samples of the fixed prompts.

  Args:
    workdir: of the run.
    iteration: how many iterations were done; 0 is the base model.
    media: the samples.
    prompts: their prompts.
    scores: their scores.
    held_out: scores of prompts that are never trained on. Their samples are not written.

  Returns:
    The folder.
  """
  folder = Path(workdir) / "samples" / f"iteration_{iteration:06d}"
  images.save_samples(folder, media.pixels, media.fps)
  values = {
    "prompts": list(prompts),
    "scores": list(map(_json, scores)),
    "held_out": list(map(_json, held_out)),
  }
  # Written last: a folder that has this file is complete.
  files.write_text(folder / "prompts.json", strict_json.dumps(values))
  return folder


def save_extremes(
  workdir: Workdir,
  iteration: int,
  best: np.ndarray,
  worst: np.ndarray,
  fps: float | None,
  prompt: str,
  best_score: float,
  worst_score: float,
  rewards: Sequence[float] | np.ndarray = (),
) -> Path:
  """Writes the best and the worst sample of one group of an iteration.

  Args:
    workdir: of the run.
    iteration: how many iterations were done, with this one.
    best, worst: pixels `[(frames,) height, width, 3]` in [0, 1].
    fps: frames a second; None for images.
    prompt: of both.
    best_score, worst_score: their rewards.
    rewards: of all samples of the iteration; at most 1000 are kept, evenly spaced in their order.

  Returns:
    The folder.
  """
  folder = Path(workdir) / "samples" / f"extremes_{iteration:06d}"
  images.save_sample(folder / "best", best, fps)
  images.save_sample(folder / "worst", worst, fps)
  ordered = np.sort(np.asarray(rewards, np.float64))
  ordered = ordered[np.isfinite(ordered)]
  if len(ordered) > _MOST_REWARDS:
    ordered = ordered[np.linspace(0, len(ordered) - 1, _MOST_REWARDS).round().astype(int)]
  scores = {
    "prompt": prompt,
    "best": _json(best_score),
    "worst": _json(worst_score),
    "rewards": [round(value, 6) for value in ordered.tolist()],
  }
  files.write_text(folder / "scores.json", strict_json.dumps(scores))
  return folder


def write(workdir: Workdir) -> Path:
  """Writes report.html of a workdir and returns its path.

  Parts for which there are no files yet are left out of the page.
  """
  workdir = Path(workdir)
  config = files.read_json(workdir / "config.json")
  environment_of_run = files.read_json(workdir / "environment.json")
  started = status.read(workdir)
  rows, evaluations = metrics.read(workdir), samples.evaluations(workdir)
  pairs = samples.extremes(workdir)
  small, zero = curves.small_charts(rows, config)
  environment = jinja2.Environment(
    autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
  )
  page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
    title=story.title(config, workdir),
    subtitle=story.subtitle(config),
    name=config.get("name", workdir.name),
    workdir=started.get("workdir", str(workdir.resolve())),
    verdict=story.verdict(rows, evaluations, environment_of_run.get("devices", "")),
    ending=story.ending(started, rows, config, status.now()),
    reward_errors=_tail(workdir / failures.FILE),
    tiles=story.tiles(rows, evaluations, config),
    before_after=pictures.before_after(evaluations, workdir),
    main=Markup(curves.main_chart(rows, evaluations, config)),
    histogram=Markup(curves.reward_histogram(pairs)),
    diversity=Markup(curves.diversity_chart(rows)),
    has_videos=pictures.has_videos(evaluations, pairs),
    over_training=pictures.over_training(evaluations, workdir),
    extremes=pictures.best_and_worst(pairs, workdir),
    small=[Markup(figure) for figure in small],
    zero=zero,
    prompts=_prompts_in_full(evaluations),
    started=started,
    changed=[(field, *values) for field, values in started.get("changed", {}).items()],
    set_by_file=_set_by_file(config, started.get("changed", {})),
    environment=list(environment_of_run.items()),
    seed=config.get("seed", "?"),
    summary=_summary(rows),
    config=list(stored_config.flatten(config).items()),
  )
  files.write_text(workdir / FILE, page)
  return workdir / FILE


def _tail(file: Path) -> str:
  """The end of a text file, from the beginning of a line; "" where there is none."""
  if not file.exists():
    return ""
  text = file.read_text(encoding="utf-8", errors="replace")
  return text if len(text) <= _MOST_ERRORS else text[-_MOST_ERRORS:].partition("\n")[2]


def _prompts_in_full(evaluations: Sequence[samples.Evaluation]) -> list[str]:
  """The prompts beside whose pictures there is no room for their whole text."""
  prompts = dict.fromkeys(prompt for each in evaluations for prompt in each.prompts)
  result, room = [], _MOST_TEXT
  for prompt in prompts:
    if pictures.short(prompt) != prompt and room >= len(prompt):
      result.append(prompt)
      room -= len(prompt)
  return result


def _set_by_file(
  config: Mapping[str, Any], changed: Mapping[str, Any]
) -> list[tuple[str, Any, Any]]:
  """The fields that the config file of a run has set: (field, default of configs/common.py, value
  of the file).
  """
  try:
    defaults = stored_config.flatten(config_file.load(str(installation.ROOT / "configs/common.py")))
  except ConfigError:  # an installation without the configs
    return []
  values = stored_config.tuples(stored_config.flatten(dict(config)))
  values |= {field: stored_config.tuples(ends[0]) for field, ends in changed.items()}
  return [
    (field, defaults[field], value)
    for field, value in values.items()
    if field in defaults and field != "name" and stored_config.tuples(defaults[field]) != value
  ]


def _summary(rows: Sequence[metrics.Row]) -> list[dict[str, Any]]:
  """First, last, least and greatest value of every metric."""
  keys = dict.fromkeys(key for row in rows for key in row if key != "iteration")
  table = []
  for key in keys:
    values = [value for value in curves.columns(rows, key)[0] if math.isfinite(value)]
    ends = (values[0], values[-1], min(values), max(values)) if values else ()
    table.append({"key": key, "values": [number_text(value) for value in ends]})
  return table


def _json(score: Any) -> float | None:
  """A score for JSON, which has no NaN: None for a failed one."""
  value = float(score)
  return value if math.isfinite(value) else None

"""The charts of the page, made of the rows of metrics and of the evaluations."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dancegrpo_jax.report.charts import Band, Series, chart, histogram
from dancegrpo_jax.report.metrics import Row
from dancegrpo_jax.report.samples import Evaluation, Extremes
from dancegrpo_jax.settings import stored_config

DIVERSITY = "samples/diversity"


class SmallChart(NamedTuple):
  """A small chart: its title, the unit of its values, and its metrics by their labels.

  `field` is a field of the config without which, if it is 0, the chart says nothing.
  """

  title: str
  unit: str
  metrics: dict[str, str]
  field: str = ""


_SMALL_CHARTS = (
  SmallChart("Spread within groups", "mean std of rewards", {"std": "group/std_mean"}),
  SmallChart(
    "Failed or flat",
    "share",
    {"rewards that failed": "reward/failed", "groups without spread": "group/zero_variance"},
  ),
  SmallChart("Clipped", "share of transitions", {"clipped": "clip_fraction"}),
  SmallChart("Dropped", "share of transitions", {"dropped": "drop_fraction"}),
  SmallChart("Divergence", "mean, nats a latent dimension", {"from the old policy": "policy_kl"}),
  SmallChart("KL to the initial model", "nats", {"KL": "kl"}, field="objective.kl.weight"),
  SmallChart("Gradient", "global norm before clipping", {"norm": "grad_norm"}),
  SmallChart("Learning rate", "", {"rate": "learning_rate"}),
  SmallChart(
    "Drift before the first update",
    "largest |ratio - 1|; 0 is exact",
    {"drift": "ratio/drift_max"},
  ),
  SmallChart("Advantage", "mean |A|", {"mean |A|": "advantage/abs_mean"}),
  SmallChart(
    "Time of an iteration",
    "seconds",
    {part: f"time/{part}" for part in ("encode", "rollout", "decode", "reward", "update")},
  ),
  SmallChart("Speed", "samples a second", {"samples": "samples_per_second"}),
)


def main_chart(
  rows: Sequence[Row], evaluations: Sequence[Evaluation], config: Mapping[str, Any]
) -> str:
  """Fixed and held-out prompts, and the reward of training with the spread of its samples.

  The samples of row i are those of the model after i iterations.
  """
  x = [each.iteration for each in evaluations]
  lines = [
    Series(label, x, [mean(getattr(each, field)) for each in evaluations], color, dots=True)
    for label, field, color in (("fixed prompts", "scores", 1), ("held-out prompts", "held_out", 3))
    if any(getattr(each, field) for each in evaluations)
  ]
  at, average, std = [row["iteration"] for row in rows], *columns(rows, "reward/mean", "reward/std")
  bands = []
  if rows:
    lines.append(Series("samples of training, mean", at, average, 2))
    low = [m - s for m, s in zip(average, std)]
    high = [m + s for m, s in zip(average, std)]
    bands.append(Band("± 1 std of them", at, low, high, 2))
  return chart("Reward", terms(config), lines, bands, "iterations that were done")


def reward_histogram(pairs: Sequence[Extremes]) -> str:
  """The rewards of the samples of the first and the last iteration that have been kept."""
  kept = [pair for pair in pairs if pair.rewards]
  ends = [kept[0], kept[-1]] if len(kept) > 1 else kept
  groups = [(f"iteration {pair.iteration}", pair.rewards) for pair in ends]
  return histogram("Distribution of the reward", "samples of training", groups, "reward")


def diversity_chart(rows: Sequence[Row]) -> str:
  """How far the samples of a prompt lie apart."""
  (values,) = columns(rows, DIVERSITY)
  kept = [(row["iteration"], v) for row, v in zip(rows, values) if math.isfinite(v)]
  if not kept:
    return ""
  x, distances = [at for at, _ in kept], [v for _, v in kept]
  line = Series("diversity", x, distances, dots=True)
  # From 0, at which all samples of a prompt are alike, so that a loss looks as large as it is.
  return chart("Diversity", "distance of two samples of a prompt", [line], from_zero=True)


def small_charts(rows: Sequence[Row], config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
  """The other charts.

  Returns:
    The charts, and the titles of those whose metrics were 0 all the time.
  """
  fields = stored_config.flatten(dict(config))
  x = [row["iteration"] for row in rows]
  figures, zero = [], []
  ratio = _ratio(rows)
  if ratio:
    figures.append(ratio)
  for title, unit, keys, field in _SMALL_CHARTS:
    if field and not fields.get(field):
      continue
    values = {label: columns(rows, key)[0] for label, key in keys.items()}
    finite = {label: [v for v in v_s if math.isfinite(v)] for label, v_s in values.items()}
    used = [label for label, column in finite.items() if any(column)]
    if not used and any(finite.values()):
      zero.append(title)
    if not used or len({v for label in used for v in finite[label]}) == 1 < len(rows):
      continue  # nothing, or one number all the time, which the table of metrics has
    lines = [Series(label, x, values[label], color) for color, label in enumerate(used, 1)]
    figures.append(chart(title, unit, lines))
  return figures, zero


def terms(config: Mapping[str, Any]) -> str:
  """The reward as text, as "clip + 0.5 hps"."""
  return " + ".join(
    f"{weight:g} {name}" if weight != 1 else name
    for name, weight in config.get("reward", {}).get("terms", ())
  )


def columns(rows: Sequence[Row], *keys: str) -> tuple[list[float], ...]:
  """The values of metrics, NaN where a row has none."""
  return tuple([row.get(key, math.nan) for row in rows] for key in keys)


def mean(scores: Sequence[float | None]) -> float:
  """The mean of the scores that did not fail; NaN where all did."""
  finite = [score for score in scores if score is not None]
  return sum(finite) / len(finite) if finite else math.nan


def _ratio(rows: Sequence[Row]) -> str:
  """The chart of the importance ratio; "" where it was 1 all the time, as with one update."""
  x = [row["iteration"] for row in rows]
  average, low, high = columns(rows, "ratio/mean", "ratio/min", "ratio/max")
  if all(v == 1 for v in (*low, *high) if math.isfinite(v)):
    return ""
  return chart(
    "Importance ratio",
    "new / old probability of a step",
    [Series("mean", x, average)],
    [Band("least to greatest", x, low, high)],
  )

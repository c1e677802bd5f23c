"""What the page says first: what was trained, what came of it, and how the run ended."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy import special

from dancegrpo_jax.report import curves, metrics, status
from dancegrpo_jax.report.charts import number_text
from dancegrpo_jax.report.samples import Evaluation
from dancegrpo_jax.settings import stored_config


class Change(NamedTuple):
  """How the mean score of some prompts has changed between two evaluations.

  Attributes:
    prompts: those that were scored both times.
    before, after: means; NaN where there are none.
    half: half of the 95 % interval of their difference, by Student's t over the prompts; NaN for a
      single prompt.
  """

  prompts: int
  before: float
  after: float
  half: float

  @property
  def difference(self) -> float:
    """How much the mean has risen."""
    return self.after - self.before

  @property
  def is_clear(self) -> bool:
    """Whether the interval leaves 0 out; a single prompt has none."""
    return abs(self.difference) > self.half


def change(before: Sequence[float | None], after: Sequence[float | None]) -> Change:
  """The change of scores; prompt i is the same in both."""
  pairs = [(x, y) for x, y in zip(before, after) if x is not None and y is not None]
  n = len(pairs)
  if not n:
    return Change(prompts=0, before=math.nan, after=math.nan, half=math.nan)
  first, last = sum(x for x, _ in pairs) / n, sum(y for _, y in pairs) / n
  half = math.nan
  if n > 1:
    squares = sum((y - x - (last - first)) ** 2 for x, y in pairs)
    half = float(special.stdtrit(n - 1, 0.975)) * math.sqrt(squares / (n - 1) / n)
  return Change(prompts=n, before=first, after=last, half=half)


def changes(evaluations: Sequence[Evaluation]) -> tuple[Change, Change]:
  """The changes of the fixed prompts that the first and the last evaluation share, and of the
  held-out prompts.
  """
  if len(evaluations) < 2:
    return change([], []), change([], [])
  first, last = evaluations[0], evaluations[-1]
  before, after = (dict(zip(each.prompts, each.scores)) for each in (first, last))
  shared = [prompt for prompt in before if prompt in after]
  fixed = change([before[prompt] for prompt in shared], [after[prompt] for prompt in shared])
  is_same = len(first.held_out) == len(last.held_out)
  return fixed, change(first.held_out, last.held_out) if is_same else change([], [])


def title(config: Mapping[str, Any], workdir: Path) -> str:
  """What was trained on what."""
  model = str(config.get("model", {}).get("checkpoint", "")).rstrip("/").rpartition("/")[2]
  reward = curves.terms(config)
  return f"{model} trained on {reward}" if model and reward else config.get("name", workdir.name)


def subtitle(config: Mapping[str, Any]) -> str:
  """The method, and the sizes of an iteration."""
  fields = stored_config.flatten(dict(config))
  if not fields:
    return ""
  family = fields.get("model.family", "?").replace("_", " ")
  group = fields.get("rollout.samples_per_prompt", "?")
  prompts = fields.get("data.prompts_per_iteration", "?")
  rank = fields.get("lora.rank")
  parts = [
    f"{fields.get('objective.kind', 'grpo').upper()} on {family}",
    f"LoRA of rank {rank}" if rank else "all weights",
    f"{prompts} prompts × {group} samples an iteration",
    f"{fields.get('sampler.steps', '?')} steps of the {fields.get('sampler.kind', '?')} sampler",
    f"prompts of {Path(fields.get('data.prompts', '?')).name}",
  ]
  return " · ".join(parts)


def verdict(rows: Sequence[metrics.Row], evaluations: Sequence[Evaluation], device: str) -> str:
  """The sentences at the top of the page."""
  done = iterations_done(rows)
  if not done:
    return "No iteration has been finished, so that there is nothing to compare yet."
  seconds = sum(value for value in curves.columns(rows, "time/total")[0] if math.isfinite(value))
  count = "1 iteration" if done == 1 else f"{done} iterations"
  took = f" ({metrics.duration(seconds)}{f' on {device}' if device else ''})" if seconds else ""
  fixed, held_out = changes(evaluations)
  parts = [_clause(fixed, "fixed"), _clause(held_out, "held-out")]
  parts = [part for part in parts if part]
  if not parts:
    first, last, n = metrics.gain(rows)
    if not n:
      return f"In {count}{took} no reward was a number, so that nothing could be learned."
    return (
      f"In {count}{took} the mean reward of training went from {number_text(first)} to"
      f" {number_text(last)} (first and last {n})."
    )
  last = evaluations[-1].iteration
  when = "" if last == done else f", as measured after {last} of them"
  note = " Intervals are 95 %, over the prompts." if any("±" in part for part in parts) else ""
  return f"In {count}{took} {'; '.join(parts)}{when}.{note}"


def _clause(changed: Change, kind: str) -> str:
  """A change in words, as "the mean score of the 16 fixed prompts rose from 0.545 to 0.773"."""
  if not changed.prompts:
    return ""
  text = f"the {kind} prompt" if changed.prompts == 1 else f"{changed.prompts} {kind} prompts"
  ends = f"from {changed.before:.3f} to {changed.after:.3f}"
  if not math.isfinite(changed.half):
    return f"the mean score of {text} went {ends} ({changed.difference:+.3f})"
  interval = f"{changed.difference:+.3f} ± {changed.half:.3f}"
  if not changed.is_clear:
    return f"the mean score of {text} went {ends} ({interval}, which may be chance)"
  verb = "rose" if changed.difference > 0 else "fell"
  return f"the mean score of {text} {verb} {ends} ({interval})"


def tiles(
  rows: Sequence[metrics.Row], evaluations: Sequence[Evaluation], config: Mapping[str, Any]
) -> list[dict[str, str]]:
  """The numbers at the top: what has changed, and how far the run is."""
  result = []
  fixed, held_out = changes(evaluations)
  for changed, label in ((fixed, "fixed prompts"), (held_out, "held-out prompts")):
    if changed.prompts:
      tile = _tile(changed.before, changed.after, f"{label}, base → now")
      result.append(tile if changed.is_clear else tile | {"kind": ""})
  first, last, count = metrics.gain(rows)
  if count:
    mean = f"mean of {count}" if count > 1 else "one"
    result.append(_tile(first, last, f"training, first → last ({mean})"))
  result.append(
    {
      "value": f"{iterations_done(rows)} of {config.get('iterations', '?')}",
      "change": "",
      "kind": "",
      "label": "iterations",
    }
  )
  for key, label in (
    ("optimizer/skipped_total", "optimizer steps skipped (not finite)"),
    ("reward/failed", "of the last rewards failed"),
  ):
    value = rows[-1].get(key, 0) if rows else 0
    if value > 0:
      text = f"{value:.0%}" if key == "reward/failed" else f"{value:g}"
      result.append({"value": text, "change": "", "kind": "down", "label": label})
  return result


def _tile(before: float, after: float, label: str) -> dict[str, str]:
  kind = "up" if after > before else "down"
  value = f"{before:.3f} → {after:.3f}"
  return {"value": value, "change": f"{after - before:+.3f}", "kind": kind, "label": label}


def ending(
  values: Mapping[str, Any], rows: Sequence[metrics.Row], config: Mapping[str, Any], when: str
) -> dict[str, str]:
  """How the run ended: "kind" for the CSS, "text", "reason" and "traceback".

  Args:
    values: of status.json.
    rows: of metrics.
    config: of the run.
    when: the present time.
  """
  done, total = iterations_done(rows), config.get("iterations", "?")
  at, after = values.get("ended", ""), f"after {done} of {total} iterations"
  state = values.get("state", "")
  reason, trace = values.get("reason", ""), values.get("traceback", "")
  texts = {
    status.FINISHED: ("good", f"Finished {after}, {at}."),
    status.STOPPED: ("warn", f"Stopped {after}, {at}."),
    status.FAILED: ("bad", f"Ended by an error {after}, {at}."),
    status.RUNNING: (
      "live",
      f"Running: {done} of {total} iterations were done when this page was written, {when}. If"
      " the run is killed, the page stays as it is.",
    ),
  }
  missing = ("", f"{done} of {total} iterations; how the run ended is not recorded.")
  kind, text = texts.get(state, missing)
  return {"kind": kind, "text": text, "reason": reason, "traceback": trace}


def iterations_done(rows: Sequence[metrics.Row]) -> int:
  """The number of finished iterations."""
  return int(rows[-1]["iteration"]) + 1 if rows else 0

"""Checks tiny runs of `main` on the device.

Is the ratio 1 before the first update, do two runs agree, and does the CPU compute the same?
"""

import threading
from pathlib import Path

from gpu_parts import follow, measure, registry

CONFIG = "configs/emoji_clip.py:tiny"
DRIFT, TWICE, CPU = registry.RUNS.rows


def command(cache: Path) -> list[str]:
  """The command for three iterations."""
  changes = {"iterations": 3, "logging.compilation_cache": cache, "logging.tensorboard": False}
  return [
    "-m",
    "dancegrpo_jax.main",
    f"--config={CONFIG}",
    *(f"--config.{k}={v}" for k, v in changes.items()),
  ]


def run(context) -> None:
  def rows(name: str, cache: Path, environment: dict | None = None) -> list[dict]:
    found = follow.rows(command(cache), context.folder / name, 3, environment, whole=True)
    return [values for _, values in found]

  reference, failure = [], []

  def on_cpu() -> None:
    try:
      reference.extend(rows("cpu", context.folder / "cpu_programs", {"JAX_PLATFORMS": "cpu"}))
    except follow.Failed as error:
      failure.append(str(error))

  thread = threading.Thread(target=on_cpu)
  thread.start()  # beside the device's: no time is measured here
  try:
    first = rows("first", context.cache)
    drift = max(row["ratio/drift_max"] for row in first)
    context.say.row(DRIFT, result=measure.number(drift), note="largest of 3 iterations")
    context.say.row(TWICE, **agreement(first, rows("second", context.cache)))
  finally:
    thread.join()
  if failure:
    context.say.failed(CPU, failure[0])
  else:
    context.say.row(CPU, **agreement(first, reference))


def agreement(first: list[dict], second: list[dict]) -> dict:
  """Whether rows are equal but for their times, and where they differ most."""
  worst, where, unequal = 0.0, "", set()
  for a, b in zip(first, second):
    for name in sorted(set(a) | set(b)):
      if name.startswith("time/") or name == "samples_per_second":
        continue
      if a.get(name) != b.get(name):
        unequal.add(name)
        size = difference(a.get(name), b.get(name))
        if size > worst:
          worst, where = size, f"{name} of iteration {a['iteration'] + 1}"
  reward = max(difference(a["reward/mean"], b["reward/mean"]) for a, b in zip(first, second))
  if not unequal:
    return {
      "result": measure.text("equal"),
      "note": "all metrics of 3 iterations but times, to the last digit",
    }
  note = f"{len(unequal)} metrics differ, most by {worst:.2g} of its size ({where})"
  note += f"; reward/mean by {reward:.2g}"
  return {"result": measure.text("not equal"), "note": note}


def difference(a: float | None, b: float | None) -> float:
  """Relative difference; infinite where one run lacks a finite number."""
  if a is None or b is None:
    return float("inf")
  return abs(a - b) / max(abs(a), abs(b), 1e-12)

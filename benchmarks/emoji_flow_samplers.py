"""Compares seven ways of choosing the steps of a trajectory to train, on emoji-flux.

All of them get the same number of forward passes of the denoiser.

    # 21 runs of about 3 minutes each:
    python benchmarks/emoji_flow_samplers.py run [--folder=runs/samplers] [ARM ...]
    # The figure and the table:
    python benchmarks/emoji_flow_samplers.py plot

Each finished run is a line of emoji_flow_samplers.jsonl, beside this file, and is not repeated. An
interrupted run resumes from its checkpoint.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dancegrpo_jax.settings import config_file, geometry  # noqa: E402

CONFIG = str(ROOT / "configs" / "emoji_flow_clip.py")
RESULTS = Path(__file__).with_suffix(".jsonl")
FIGURE = ROOT / "assets" / "images" / "timestep_selection.png"
SEEDS = (0, 1, 2)
BUDGET = 28_000  # forward passes of the denoiser: rollout, old log-probs and update
SHARED = {
  "data.prompts_per_iteration": 8,
  "rollout.samples_per_prompt": 8,
  "rollout.chunk": 64,
  "optimizer.microbatch": 32,
  "optimizer.updates_per_iteration": 2,
  "optimizer.learning_rate": 1e-4,
  "optimizer.warmup_steps": 10,
  "evaluation.every": 0,
  "logging.tensorboard": False,
}
ARMS = {
  "dance, all steps": {"objective.timesteps": "all"},
  "dance, random 60 %": {},
  "dance, random 30 %": {"objective.timestep_fraction": 0.3},
  "dance, first 30 %": {"objective.timesteps": "first", "objective.timestep_fraction": 0.3},
  "dance, last 40 %": {"objective.timesteps": "last", "objective.timestep_fraction": 0.4},
  "dance, sliding window of 4": {
    "objective.timesteps": "all",
    "sampler.window.size": 4,
    "sampler.window.mode": "sliding",
    "sampler.window.interval": 6,
  },
  "cps, random 60 %": {"sampler.kind": "cps"},
}


def passes(config) -> int:
  """Forward passes of the denoiser in one iteration. One with a backward pass counts as one."""
  batches = geometry.of(config)
  again = batches.transitions * (batches.updates - 1) // batches.updates  # of the old policy
  return batches.samples * config.sampler.steps + batches.transitions + again


def train(arm: str, seed: int, folder: Path) -> dict:
  """Trains one run in a process of its own and returns its line of the results."""
  changes = SHARED | ARMS[arm] | {"seed": seed}
  words = [f"{key}={value}" for key, value in changes.items()]
  each = passes(config_file.load(CONFIG, words))
  words.append(f"iterations={BUDGET // each}")
  workdir = folder / f"{arm.replace(',', '').replace(' %', '').replace(' ', '_')}-{seed}"
  flags = [f"--config={CONFIG}", f"--workdir={workdir}", *(f"--config.{word}" for word in words)]
  subprocess.run([sys.executable, "-m", "dancegrpo_jax.main", *flags], cwd=ROOT, check=True)
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {
    "arm": arm,
    "seed": seed,
    "passes": each,
    "reward": [round(row["reward/mean"], 5) for row in rows],
    "evaluation": round(rows[-1]["evaluation/score"], 5),
    "held_out": round(rows[-1]["evaluation/held_out"], 5),
    "seconds": round(sum(row["time/total"] for row in rows)),
  }


def run(arms: list[str], folder: Path) -> None:
  """Trains the missing runs of these arms: one seed of every arm, then the next seed."""
  for seed in SEEDS:
    for arm in arms:
      if not any(row["arm"] == arm and row["seed"] == seed for row in read()):
        row = train(arm, seed, folder)
        with RESULTS.open("a") as file:
          print(json.dumps(row), file=file)


def read() -> list[dict]:
  """The lines of the finished runs."""
  return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def smooth(values: list[float], width: int = 4) -> np.ndarray:
  """Running mean over `width` iterations, which are two passes over the prompts.

  The first means are of fewer iterations.
  """
  total = np.concatenate([[0.0], np.cumsum(values)])
  stop = np.arange(1, len(values) + 1)
  start = np.maximum(stop - width, 0)
  return (total[stop] - total[start]) / (stop - start)


def plot() -> None:
  """Draws the figure and prints its numbers as a table."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
  print(
    "| steps trained | passes an iteration | iterations | reward at the end | evaluation | held"
    " out | runs |"
  )
  print("| --- | --- | --- | --- | --- | --- | --- |")
  for number, arm in enumerate(ARMS):
    rows = [row for row in read() if row["arm"] == arm]
    if not rows:
      continue
    x = rows[0]["passes"] * np.arange(1, len(rows[0]["reward"]) + 1) / 1000
    curves = np.array([smooth(row["reward"]) for row in rows])
    axes.plot(x, curves.mean(0), label=arm, color=f"C{number}")
    axes.fill_between(x, curves.min(0), curves.max(0), color=f"C{number}", alpha=0.12, linewidth=0)
    scores = (
      [np.mean(row["reward"][-4:]) for row in rows],
      *([row[name] for row in rows] for name in ("evaluation", "held_out")),
    )
    cells = [f"{np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})" for values in scores]
    print(
      f"| {arm} | {rows[0]['passes']} | {len(rows[0]['reward'])} | {' | '.join(cells)} |"
      f" {len(rows)} |"
    )
  axes.set(xlabel="thousand forward passes of the denoiser", ylabel="reward, mean of 4 iterations")
  axes.legend(fontsize=8, frameon=False)
  axes.spines[["top", "right"]].set_visible(False)
  figure.savefig(FIGURE, dpi=130)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("command", choices=("run", "plot"))
  parser.add_argument("arms", nargs="*", help=f"default: all of {', '.join(ARMS)}")
  parser.add_argument("--folder", type=Path, default=Path("runs/samplers"))
  flags = parser.parse_args()
  unknown = [arm for arm in flags.arms if arm not in ARMS]
  if unknown:
    parser.error(f"unknown arm {unknown[0]!r}; one of: {', '.join(ARMS)}")
  run(flags.arms or list(ARMS), flags.folder) if flags.command == "run" else plot()


if __name__ == "__main__":
  main()

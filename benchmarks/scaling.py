"""How the cost of a FLUX update grows from 8 to 256 v5p chips when each chip's work is fixed.

The numbers come from programs that are compiled without a TPU.

    python benchmarks/scaling.py run     # writes plans to scaling.jsonl, beside this file
    python benchmarks/scaling.py plot    # the figure and the table

A finished plan is not repeated.

Each chip has 3 samples an iteration and 27 of their transitions, in 3 optimizer steps of 9
microbatches with 1 transition a chip: flux_hps's recipe, which 64 chips give its 192 samples.
Weights and optimizer are split over all chips.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_suffix(".jsonl")
FIGURE = ROOT / "assets" / "images" / "scaling.png"
SHAPES = {8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}


def plan(chips: int) -> dict:
  """Plans one update iteration and returns the rows of all its programs."""
  changes = {
    "mesh.lanes": chips,
    "rollout.chunk": chips,
    "optimizer.microbatch": chips,
    "data.prompts_per_iteration": 3 * chips // 12,
  }
  words = [f"--config.{key}={value}" for key, value in changes.items()]
  with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "plan.json"
    flags = [
      "--config=configs/flux_hps.py",
      *words,
      f"--topology=v5p:{SHAPES[chips]}",
      "--only=update",
      f"--out={out}",
    ]
    subprocess.run([sys.executable, "-m", "dancegrpo_jax.plan", *flags], cwd=ROOT, check=True)
    result = json.loads(out.read_text())
  return {"chips": chips, "versions": result["versions"]} | whole(result)


def whole(result: dict) -> dict:
  """Sums over all calls of an iteration, and the most memory that one of them takes."""
  rows, iterations = result["rows"], result["iterations"]

  def total(value: Callable[[dict], float]) -> float:
    return sum(value(row) * row["times"] / iterations for row in rows)

  def seconds(row: dict) -> float:
    return row["compute_seconds"] + row["network_seconds"]

  summed = ("flops", "collective", "compute_seconds", "network_seconds")
  return {
    "peak": max(row["peak"] for row in rows),
    "arguments": max(row["arguments"] for row in rows),
    **{name: total(lambda row, name=name: row[name]) for name in summed},
    "compile_seconds": sum(row["compile_seconds"] for row in rows),
    "mfu": total(lambda row: (row["mfu"] or 0.0) * seconds(row)) / total(seconds),
  }


def read() -> list[dict]:
  return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def run() -> None:
  """Makes the plans that are missing, the smallest first."""
  done = {row["chips"] for row in read()}
  for chips in SHAPES:
    if chips not in done:
      row = plan(chips)
      with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def plot() -> None:
  """Draws the figure and prints its numbers as a table."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
  rows = sorted(read(), key=lambda row: row["chips"])
  hbm, sent = ([row[name] / 2**30 for row in rows] for name in ("peak", "collective"))
  compute, network = (
    [row[name] for row in rows] for name in ("compute_seconds", "network_seconds")
  )
  places, chips = range(len(rows)), [row["chips"] for row in rows]
  axes[0].bar(places, hbm)
  axes[1].bar(places, sent)
  axes[2].bar(places, compute, label="compute")
  axes[2].bar(places, network, bottom=compute, label="network")
  axes[2].legend(fontsize=8, frameon=False)
  titles = (
    "HBM of a chip, GiB of 95.7",
    "sent or received by a chip, GiB",
    "estimated time of an update, s",
  )
  for panel, title in zip(axes, titles, strict=True):
    panel.set(title=title, xlabel="v5p chips")
    panel.set_xticks(places, chips)
    panel.spines[["top", "right"]].set_visible(False)
  figure.savefig(FIGURE, dpi=130)
  print("| chips | HBM GiB | collectives GiB | compute s | network s | MFU | compile s |")
  print("| --- | --- | --- | --- | --- | --- | --- |")
  for row, *numbers in zip(rows, hbm, sent, compute, network, strict=True):
    cells = " | ".join(f"{number:.1f}" for number in numbers)
    print(f"| {row['chips']} | {cells} | {row['mfu']:.0%} | {row['compile_seconds']:.0f} |")


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("command", choices=("run", "plot"))
  {"run": run, "plot": plot}[parser.parse_args().command]()

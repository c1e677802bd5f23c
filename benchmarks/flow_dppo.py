"""GRPO's clipping beside Flow-DPPO's trust region (arXiv 2606.11025) on emoji-flux, by tau.

    python benchmarks/flow_dppo.py run [--folder=FOLDER] [--cores=0,1] [ARM ...]
                                          # about 2 minutes a run on an idle core, 15 runs
    python benchmarks/flow_dppo.py table  # its section of RESULTS.md

A run that is finished is a line of flow_dppo.jsonl, beside this file, and is not repeated; one that
was interrupted goes on from its checkpoint.
"""

import argparse
import json
import math
import os
import queue
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import results

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "emoji_flow_clip.py"
RESULTS = Path(__file__).with_suffix(".jsonl")
SEEDS = (0, 1, 2)
ITERATIONS, LAST = 15, 5  # of a run; of which the reward at the end is the mean
SHARED = {
  "iterations": ITERATIONS,
  "data.prompts_per_iteration": 8,
  "rollout.samples_per_prompt": 8,
  "rollout.chunk": 64,
  "optimizer.microbatch": 64,
  "evaluation.every": 0,
  "checkpoint.every": 5,
  "logging.tensorboard": False,
}
ARMS = {
  "grpo": {},
  **{
    f"dppo tau={tau}": {"objective.kind": "dppo", "objective.dppo.tau": tau}
    for tau in ("1e-5", "1e-4", "1e-3", "1e-2")
  },
}
# What a line keeps of each iteration. Of the first two a run has one.
KEPT = (
  "clip_fraction",
  "drop_fraction",
  "reward/mean",
  "policy_kl",
  "approx_kl",
  "ratio/min",
  "ratio/max",
  "grad_norm",
  "time/total",
)
ONE_THREAD = {  # of the processor; a run's own threads share the core that it is bound to
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
  "OMP_NUM_THREADS": "1",
}


HEAD = f"""## Flow-DPPO beside GRPO, on a toy

`python benchmarks/flow_dppo.py run`, then `table`: `configs/emoji_flow_clip.py` with {ITERATIONS}
iterations of 8 prompts x 8 samples in 4 optimizer steps, one CPU core a run. Everything else is the
config's: a learning rate of 5e-5 after a warm-up of 5 iterations, and for GRPO a clip range of
5e-3. Runs of one seed start with the same weights, prompts and noise. Numbers are means and
standard errors over the seeds.

- less GRPO's: the difference in reward to the run of GRPO with the same seed
- evaluation, held out: what the deterministic sampler's score gained between the start and the end,
  one sample a prompt, on the run's 16 prompts and on 16 others
- left out: the share of transitions that GRPO clipped or Flow-DPPO dropped, in all iterations and
  in the last {LAST}; the first of the 4 optimizer steps leaves nothing out by construction
- divergence: what is compared with tau, in nats a latent dimension; approx. KL: the same as the
  mean-reduced ratio alone tells it, smaller by the number of dimensions; both are means over all
  transitions and iterations
- ratio: the least and the greatest of all transitions
"""
# By hand, of the committed runs; tests/test_flow_dppo.py holds them to the numbers.
NOTES = """What it shows: at this learning rate GRPO clips nothing, as no ratio that moves outwards
is further from 1 than 5e-3, and with tau = 1e-3 or 1e-2 nothing is dropped. Rewards and gradients
of these runs are GRPO's own, number for number, over all 15 iterations. The mean divergence of an
iteration never exceeds 8.1e-5, so that 1e-3 is no bound at all. tau = 1e-4 drops 6 % of the
transitions and holds the divergence a fifth lower; its reward differs from GRPO's by about one
standard error. tau = 1e-5 drops 26 % (35 % of those after the first optimizer step; only what moves
outwards ever is) and halves the divergence. It seems to slow the learning: its evaluation gains
less than GRPO's with all three seeds, by 0.016 with a standard error of 0.007, and its training
reward is lower with two of them.

What it doesn't show: whether Flow-DPPO is better than GRPO. The paper's case is training that
clipping spoils, and here nothing is clipped; that would need a higher learning rate or more
optimizer steps an iteration. Three seeds, 15 iterations and a model of 3 million weights are
little. The reward does rise (GRPO's from 0.598 over the first 5 iterations to 0.637 over the last,
and with each seed), but the arms differ by less than the seeds do, and no arm gains more than 2
standard errors on held-out prompts. The last 5 iterations are not whole rounds of the 16 prompts,
which the pairing by seed evens out and the column of rewards does not. The log-prob is the
config's, averaged over the dimensions, so that ratios lie close to 1. The machine was shared:
times, which the lines of flow_dppo.jsonl hold, compare nothing."""


def name_of(arm: str, seed: int) -> str:
  """The workdir's name."""
  return f"{arm.replace(' ', '_').replace('=', '_')}-{seed}"


def train(arm: str, seed: int, folder: Path, core: int) -> dict:
  """One run, as a process of its own on one core; its line of the results."""
  workdir = folder / name_of(arm, seed)
  changes = SHARED | ARMS[arm] | {"seed": seed}
  flags = [f"--config={CONFIG}", f"--workdir={workdir}"]
  flags += [f"--config.{key}={value}" for key, value in changes.items()]
  command = ["taskset", "-c", str(core), sys.executable, "-m", "dancegrpo_jax.main", *flags]
  subprocess.run(command, cwd=ROOT, env=os.environ | ONE_THREAD, check=True)
  return line_of(arm, seed, workdir)


def line_of(arm: str, seed: int, workdir: Path) -> dict:
  """What a finished run's files say."""
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  if len(rows) != ITERATIONS:
    raise SystemExit(f"error: {workdir} has {len(rows)} of {ITERATIONS} iterations; run it again")
  shown = json.loads((workdir / "samples" / "iteration_000000" / "prompts.json").read_text())
  scores = {
    "base": float(np.mean(shown["scores"])),
    "evaluation": rows[-1]["evaluation/score"],
    "base_held_out": float(np.mean(shown["held_out"])),
    "held_out": rows[-1]["evaluation/held_out"],
  }
  iterations = {key: [rounded(row[key]) for row in rows] for key in KEPT if key in rows[0]}
  return (
    {"arm": arm, "seed": seed}
    | {key: rounded(value) for key, value in scores.items()}
    | {"iterations": iterations}
  )


def rounded(value: float, digits: int = 6) -> float:
  """With as many significant digits."""
  return float(f"{value:.{digits}g}")


def run(arms: list[str], folder: Path, cores: list[int]) -> None:
  """What is missing of these arms, a seed of every arm before the next, a run on each core."""
  done = {(line["arm"], line["seed"]) for line in read()}
  free, writing = queue.SimpleQueue(), threading.Lock()
  for core in cores:
    free.put(core)

  def one(task: tuple[str, int]) -> None:
    core = free.get()
    try:
      line = train(*task, folder=folder, core=core)
    finally:
      free.put(core)
    with writing, RESULTS.open("a") as file:
      print(json.dumps(line), file=file)

  tasks = [(arm, seed) for seed in SEEDS for arm in arms if (arm, seed) not in done]
  with ThreadPoolExecutor(len(cores)) as pool:
    for _ in pool.map(one, tasks):  # to hear of errors
      pass


def read() -> list[dict]:
  """The finished runs."""
  return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def of(line: dict, key: str) -> np.ndarray:
  """A metric of every iteration of a run."""
  return np.array(line["iterations"][key])


def at_end(line: dict) -> float:
  """The reward of the last iterations."""
  return of(line, "reward/mean")[-LAST:].mean()


def left_out(line: dict) -> np.ndarray:
  """Share of an iteration's transitions that were clipped or dropped."""
  return of(line, "clip_fraction" if "clip_fraction" in line["iterations"] else "drop_fraction")


def with_error(values: list[float], form: str = ".3f") -> str:
  """Mean over the seeds and its standard error; "-" for what isn't there."""
  if not values:
    return "-"
  mean = f"{np.mean(values):{form}}"
  if len(values) == 1:
    return mean
  return f"{mean} ± {np.std(values, ddof=1) / math.sqrt(len(values)):{form.lstrip('+')}}"


def row_of(arm: str, lines: list[dict]) -> list[str]:
  """An arm's cells of the table, from all finished runs."""
  own = [line for line in lines if line["arm"] == arm]
  grpo = {line["seed"]: line for line in lines if line["arm"] == "grpo"}
  paired = [line for line in own if line["seed"] in grpo and arm != "grpo"]
  divergence = [of(line, "policy_kl").mean() for line in own if "policy_kl" in line["iterations"]]
  return [
    arm,
    str(len(own)),
    with_error([at_end(line) for line in own]),
    with_error([at_end(line) - at_end(grpo[line["seed"]]) for line in paired], "+.4f"),
    with_error([line["evaluation"] - line["base"] for line in own], "+.3f"),
    with_error([line["held_out"] - line["base_held_out"] for line in own], "+.3f"),
    with_error([100 * left_out(line).mean() for line in own], ".1f"),
    with_error([100 * left_out(line)[-LAST:].mean() for line in own], ".1f"),
    f"{np.mean(divergence):.1e}" if divergence else "-",
    f"{np.mean([of(line, 'approx_kl').mean() for line in own]):.1e}",
    f"{min(of(line, 'ratio/min').min() for line in own):.4f}"
    f" to {max(of(line, 'ratio/max').max() for line in own):.4f}",
  ]


COLUMNS = (
  "arm",
  "runs",
  f"reward, last {LAST}",
  "less GRPO's",
  "evaluation",
  "held out",
  "left out, %",
  f"last {LAST}, %",
  "divergence",
  "approx. KL",
  "ratio",
)


def page() -> str:
  """The section of RESULTS.md."""
  lines = read()
  rows = [row_of(arm, lines) for arm in ARMS if any(line["arm"] == arm for line in lines)]
  table = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *rows]
  return "\n".join([HEAD, *(f"| {' | '.join(cells)} |" for cells in table), "", NOTES])


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("command", choices=("run", "table"))
  parser.add_argument("arms", nargs="*", help=f"some of: {', '.join(ARMS)}; all by default")
  parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "flow_dppo")
  parser.add_argument("--cores", default="0,1", help="numbers of the cores, one run at a time each")
  flags = parser.parse_args(arguments)
  unknown = [arm for arm in flags.arms if arm not in ARMS]
  if unknown:
    parser.error(f"unknown arm {unknown[0]!r}; one of: {', '.join(ARMS)}")
  if flags.command == "run":
    run(flags.arms or list(ARMS), flags.folder, [int(core) for core in flags.cores.split(",")])
  else:
    results.write_section("flow_dppo", page())


if __name__ == "__main__":
  main()

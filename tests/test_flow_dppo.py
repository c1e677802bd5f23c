"""benchmarks/flow_dppo.py: what is run, what a line keeps of a run, and the table's arithmetic."""

import json
import math
import sys

import numpy as np
import pytest
from tiny_checkpoint import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import flow_dppo  # noqa: E402

from dancegrpo_jax.settings import checks, config_file  # noqa: E402


def line_of(arm: str, seed: int, reward: float, **metrics) -> dict:
  """A finished run whose reward is 0 and at the end `reward`."""
  count = flow_dppo.ITERATIONS
  known = {"approx_kl": 1e-8, "ratio/min": 0.9, "ratio/max": 1.1, "time/total": 1.0} | metrics
  iterations = {key: [value] * count for key, value in known.items()}
  rewards = [0.0] * (count - flow_dppo.LAST) + [reward] * flow_dppo.LAST
  scores = {"base": 0.5, "evaluation": 0.6, "base_held_out": 0.5, "held_out": 0.45}
  return {"arm": arm, "seed": seed} | scores | {"iterations": {"reward/mean": rewards} | iterations}


@pytest.fixture
def file(tmp_path, monkeypatch):
  monkeypatch.setattr(flow_dppo, "RESULTS", tmp_path / "flow_dppo.jsonl")
  return flow_dppo.RESULTS


@pytest.mark.parametrize("arm", flow_dppo.ARMS)
def test_every_arm_is_a_sound_config(arm):
  changes = flow_dppo.SHARED | flow_dppo.ARMS[arm]
  config = config_file.load(
    str(flow_dppo.CONFIG), [f"{key}={value}" for key, value in changes.items()]
  )
  assert checks.problems(config, num_devices=1) == []
  assert config.objective.kind == arm.split()[0] and config.optimizer.updates_per_iteration == 4
  assert arm == "grpo" or config.objective.dppo.tau == float(arm.partition("=")[2])


def test_what_is_finished_is_not_repeated(file, tmp_path, monkeypatch):
  trained = []

  def train(arm, seed, folder, core):
    trained.append((arm, seed))
    return line_of(arm, seed, 0.0)

  monkeypatch.setattr(flow_dppo, "train", train)
  arms = ["grpo", "dppo tau=1e-4"]
  file.write_text(json.dumps(line_of("grpo", 1, 0.0)) + "\n")
  flow_dppo.run(arms, tmp_path, [0])
  assert trained == [
    (arm, seed) for seed in (0, 1, 2) for arm in arms if (arm, seed) != (arms[0], 1)
  ]
  assert len(flow_dppo.read()) == 6
  flow_dppo.run(arms, tmp_path, [0, 1])
  assert len(trained) == 5


def test_a_line_holds_the_run(tmp_path):
  """...where it is whole."""
  shown = tmp_path / "samples" / "iteration_000000"
  shown.mkdir(parents=True)
  scores = {"scores": [0.25, 0.75], "held_out": [0.5, 0.75]}
  (shown / "prompts.json").write_text(json.dumps(scores))
  rows = [
    {"iteration": i, "reward/mean": i / 8, "drop_fraction": 0.125, "other": 1.0}
    for i in range(flow_dppo.ITERATIONS)
  ]
  rows[-1] |= {"evaluation/score": 0.625, "evaluation/held_out": 0.5}
  (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
  assert flow_dppo.line_of("grpo", 3, tmp_path) == {
    "arm": "grpo",
    "seed": 3,
    "base": 0.5,
    "evaluation": 0.625,
    "base_held_out": 0.625,
    "held_out": 0.5,
    "iterations": {
      "drop_fraction": [0.125] * flow_dppo.ITERATIONS,
      "reward/mean": [i / 8 for i in range(flow_dppo.ITERATIONS)],
    },
  }
  (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows[:-1])))
  with pytest.raises(SystemExit, match="14 of 15 iterations; run it again"):
    flow_dppo.line_of("grpo", 3, tmp_path)


def test_the_table_pairs_the_seeds():
  arm = "dppo tau=1e-4"
  lines = [line_of("grpo", seed, 0.5 + seed / 10, clip_fraction=0.02) for seed in (0, 1)]
  lines += [
    line_of(arm, seed, 0.5 + seed / 5, drop_fraction=0.25, policy_kl=3e-5) for seed in (1, 0)
  ]
  cells = dict(zip(flow_dppo.COLUMNS, flow_dppo.row_of(arm, lines)))
  assert cells["arm"] == arm and cells["runs"] == "2"
  # 0.5 and 0.7: a mean of 0.6, a standard deviation of 0.1414
  assert cells["reward, last 5"] == f"0.600 ± {0.2 / math.sqrt(2) / math.sqrt(2):.3f}"
  assert cells["less GRPO's"] == "+0.0500 ± 0.0500"  # 0 and 0.1
  assert cells["evaluation"] == "+0.100 ± 0.000" and cells["held out"] == "-0.050 ± 0.000"
  assert cells["left out, %"] == cells["last 5, %"] == "25.0 ± 0.0"
  assert (cells["divergence"], cells["approx. KL"]) == ("3.0e-05", "1.0e-08")
  assert cells["ratio"] == "0.9000 to 1.1000"
  grpo = dict(zip(flow_dppo.COLUMNS, flow_dppo.row_of("grpo", lines)))
  assert grpo["less GRPO's"] == grpo["divergence"] == "-" and grpo["left out, %"] == "2.0 ± 0.0"


def test_the_notes_are_what_the_runs_say():
  """They are written by hand."""
  lines = {(line["arm"], line["seed"]): line for line in flow_dppo.read()}
  assert set(lines) == {(arm, seed) for arm in flow_dppo.ARMS for seed in flow_dppo.SEEDS}
  of = flow_dppo.of

  def over_seeds(arm, value):
    return [value(lines[arm, seed]) for seed in flow_dppo.SEEDS]

  def less_grpo(arm, value):
    return np.subtract(over_seeds(arm, value), over_seeds("grpo", value))

  def left_out(line):
    return flow_dppo.left_out(line).mean()

  def divergence(line):
    return of(line, "policy_kl").mean()

  def evaluation(line):
    return line["evaluation"]

  for arm in ("dppo tau=1e-3", "dppo tau=1e-2"):
    assert over_seeds(arm, left_out) == over_seeds("grpo", left_out) == [0, 0, 0]
    for value in (evaluation, *(lambda x, k=k: of(x, k) for k in ("reward/mean", "grad_norm"))):
      assert not less_grpo(arm, value).any()
  assert (
    8.0e-5 < max(of(x, "policy_kl").max() for (a, _), x in lines.items() if a != "grpo") < 8.1e-5
  )
  free = np.mean(over_seeds("dppo tau=1e-2", divergence))
  near, tight = "dppo tau=1e-4", "dppo tau=1e-5"
  assert 0.055 < np.mean(over_seeds(near, left_out)) < 0.065
  assert 0.78 < np.mean(over_seeds(near, divergence)) / free < 0.82
  rewards = less_grpo(near, flow_dppo.at_end)
  assert abs(rewards.mean()) < 1.2 * rewards.std(ddof=1) / 3**0.5
  assert f"{np.mean(over_seeds(tight, left_out)):.2f}" == "0.26"
  assert f"{np.mean(over_seeds(tight, left_out)) * 4 / 3:.2f}" == "0.35"
  assert 0.48 < np.mean(over_seeds(tight, divergence)) / free < 0.54
  gains = less_grpo(tight, evaluation)
  assert (gains < 0).all()
  assert flow_dppo.with_error(list(gains)) == "-0.016 ± 0.007"
  assert sorted(np.sign(less_grpo(tight, flow_dppo.at_end))) == [-1, -1, 1]
  first = over_seeds("grpo", lambda line: of(line, "reward/mean")[: flow_dppo.LAST].mean())
  last = over_seeds("grpo", flow_dppo.at_end)
  assert (f"{np.mean(first):.3f}", f"{np.mean(last):.3f}") == ("0.598", "0.637")
  assert np.less(first, last).all()
  for arm in flow_dppo.ARMS:
    held_out = over_seeds(arm, lambda line: line["held_out"] - line["base_held_out"])
    assert np.mean(held_out) < 2 * np.std(held_out, ddof=1) / 3**0.5

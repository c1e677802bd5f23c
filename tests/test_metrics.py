"""Metrics on disk are complete, valid, and without duplicates after a resume.

Also the progress line.
"""

import io
import json
import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.report import metrics
from dancegrpo_jax.report import progress as progress_module
from dancegrpo_jax.report.progress import Progress
from dancegrpo_jax.settings import config_file

COMMON = str(Path(__file__).parent.parent / "configs" / "common.py")


def config(**logging) -> ConfigDict:
  values = {"tensorboard": False, "wandb": False, **logging}
  return config_file.load(COMMON, [f"logging.{key}={value}" for key, value in values.items()])


def write(workdir, iterations, offset=0.0, **logging):
  with metrics.Writer(workdir, config(**logging), first_iteration=iterations[0]) as writer:
    for iteration in iterations:
      writer.write(iteration, {"reward/mean": jnp.float32(iteration + offset), "time/rollout": 1})


def test_one_row_an_iteration(tmp_path):
  write(tmp_path / "new" / "run", range(3))
  lines = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {"iteration": i, "reward/mean": i, "time/rollout": 1.0} for i in range(3)
  ]


def test_resume_leaves_no_duplicates(tmp_path):
  write(tmp_path, range(5))
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"iteration": 5, "rew')  # as if killed while writing
  write(tmp_path, range(3, 6), offset=0.5)
  rows = metrics.read(tmp_path)
  assert [(row["iteration"], row["reward/mean"]) for row in rows] == [
    (0, 0),
    (1, 1),
    (2, 2),
    (3, 3.5),
    (4, 4.5),
    (5, 5.5),
  ]


def test_a_new_run_in_an_old_folder_starts_empty(tmp_path):
  write(tmp_path, range(5))
  write(tmp_path, range(1))
  assert len(metrics.read(tmp_path)) == 1


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
  with metrics.Writer(tmp_path, config()) as writer:
    row = writer.write(0, {"reward/mean": float("nan"), "grad_norm": jnp.inf})
  assert math.isnan(row["reward/mean"]) and math.isinf(row["grad_norm"])
  text = (tmp_path / "metrics.jsonl").read_text()
  assert json.loads(text, parse_constant=pytest.fail) == {
    "iteration": 0,
    "reward/mean": None,
    "grad_norm": None,
  }
  assert math.isnan(metrics.read(tmp_path)[0]["reward/mean"])


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with metrics.Writer(tmp_path / "run", config(tensorboard=True)) as writer:
    assert writer.write(0, {"reward/mean": jnp.float32(2)}) == {"reward/mean": 2.0}
  stream = io.StringIO()
  with Progress(3, stream=stream) as progress:
    progress.update(0, {})
    progress.message("text")
  assert not (tmp_path / "run").exists() and stream.getvalue() == ""


def test_tensorboard_events_can_be_read(tmp_path):
  pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
  write(tmp_path, range(3), tensorboard=True)
  files = list((tmp_path / "tensorboard").glob("events*"))
  assert len(files) == 1 and b"reward/mean" in files[0].read_bytes()


def test_wandb_that_is_not_installed_is_one_clear_line(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(
    ConfigError,
    match="config.logging.wandb = True: wandb is not installed; pip install wandb, or set False",
  ):
    metrics.Writer(tmp_path / "run", config(wandb=True))
  assert not (tmp_path / "run").exists()


class FakeWandb:
  rows, settings, finished = [], {}, False

  def init(self, **settings):
    self.settings.update(settings)
    return self

  def log(self, row, step):
    self.rows.append((step, row["reward/mean"]))

  def finish(self):
    FakeWandb.finished = True


def test_wandb_gets_every_row(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
  write(tmp_path, range(2), wandb=True)
  # Step 0 is the base model.
  assert FakeWandb.rows == [(1, 0.0), (2, 1.0)] and FakeWandb.finished
  assert FakeWandb.settings["config"]["rollout"]["samples_per_prompt"] == 16


# Progress


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
  """Without the thread that names phases, whose clock is the same."""
  clock, now = iter([100.0, 102.0, 104.0, 106.0]), [0.0]
  stream = io.StringIO()
  with Progress(100, stream=stream) as progress:
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    for iteration in range(4):
      now[0] = next(clock)
      progress.update(iteration, {"reward/mean": 0.5, "samples_per_second": 42.0})
  lines = stream.getvalue().splitlines()
  assert lines[0] == "iteration 1/100  reward 0.5000  42.0 samples/s"
  # 96 iterations are left, at 2 s each.
  assert lines[3] == "iteration 4/100  reward 0.5000  42.0 samples/s  3 min 12 s left"


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_a_bar_on_a_terminal():
  stream = Terminal()
  with Progress(3, first_iteration=1, stream=stream) as progress:
    progress.message("resumed [bold] at 1")
    progress.update(1, {"reward/mean": 0.25, "samples_per_second": 7.0})
    progress.update(2, {"reward/mean": 0.5, "samples_per_second": 7.0})
  text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
  assert "resumed [bold] at 1" in text and "3/3" in text and "reward 0.5000  7.0 samples/s" in text


@pytest.mark.parametrize(
  "seconds, text", [(4.21, "4.2 s"), (185, "3 min 05 s"), (7800, "2 h 10 min"), (0, "0.0 s")]
)
def test_duration(seconds, text):
  assert metrics.duration(seconds) == text


def test_the_last_line_says_what_was_gained(tmp_path):
  assert metrics.last_line(tmp_path) == "no iteration was run"
  write(tmp_path, range(20))
  expected = (
    "reward/mean: 2.0000 -> 17.0000 (first and last 5 iterations); report: runs/x/report.html"
  )
  assert metrics.last_line(tmp_path, "runs/x/report.html") == expected
  write(tmp_path, range(3))
  assert "0.0000 -> 2.0000 (first and last 1" in metrics.last_line(tmp_path)

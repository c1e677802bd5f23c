"""Ctrl-C in every command: real processes that get a real SIGINT."""

import signal
import subprocess
import time

import pytest
from test_distributed import finish, free_port, start, together

from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.devices import interrupts
from dancegrpo_jax.report import metrics

QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
NOTICE = "again ends it at once"


def read_until(process: subprocess.Popen, text: str) -> str:
  """The output up to the line that contains a text."""
  said = ""
  assert process.stdout is not None
  for line in process.stdout:
    said += line
    if text in line:
      return said
  assert process.stderr is not None
  raise AssertionError(f"no {text!r} in:\n{said}{process.stderr.read()}")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  return {
    "iterations": 1000,
    "evaluation__every": 0,
    "checkpoint__every": 1000,
    "logging__compilation_cache": tmp_path_factory.mktemp("cache"),
    "environment": QUICK,
  }


def test_a_run_saves_its_last_whole_iteration_and_goes_on(tiny_models, tmp_path, settings):
  workdir = tmp_path / "run"
  run = start(tiny_models, workdir, **settings)
  read_until(run, "iteration 2/")
  run.send_signal(signal.SIGINT)
  ((code, output, errors),) = finish([run])
  done = store.latest(workdir / "checkpoints")
  assert code == 130, errors
  assert done >= 2 and f"stopped by Ctrl-C: {done} iterations are saved" in output
  assert "reward/mean: " in output.splitlines()[-1] and "Traceback" not in errors
  assert len([line for line in errors.splitlines() if NOTICE in line]) == 1
  assert [row["iteration"] for row in metrics.read(workdir)] == list(range(done))
  again = start(tiny_models, workdir, **settings | {"iterations": done + 1})
  ((code, output, errors),) = finish([again])
  assert code == 0 and f"resuming at iteration {done + 1} of {done + 1}" in output, errors


SLOW_REWARD = """
import time

def score(pixels, prompts, metadata):
  if len(prompts) > 2:  # not in the trial
    time.sleep({seconds})
  return pixels.mean((1, 2, 3))
"""


def test_a_second_one_ends_a_run_at_once(tiny_models, tmp_path, settings):
  """The run waits for a reward that takes a minute, so that the first Ctrl-C can't end it."""
  (tmp_path / "slow_reward.py").write_text(SLOW_REWARD.format(seconds=60))
  workdir = tmp_path / "run"
  environment = QUICK | {"PYTHONPATH": str(tmp_path)}
  changes = {"reward__terms": (("slow_reward:score", 1.0),), "evaluation__prompts": 1}
  run = start(tiny_models, workdir, **settings | {"environment": environment} | changes)
  read_until(run, "waiting for the rewards")
  run.send_signal(signal.SIGINT)
  assert run.stderr is not None
  while NOTICE not in run.stderr.readline():
    assert run.poll() is None
  time.sleep(0.5)
  assert run.poll() is None
  run.send_signal(signal.SIGINT)
  begin = time.monotonic()
  ((code, _, errors),) = finish([run])
  assert code == 130 and time.monotonic() - begin < 5
  assert "Traceback" not in errors and interrupts.LINE in errors
  assert store.latest(workdir / "checkpoints") is None


@pytest.mark.parametrize("text", ["a new run of", "compiling"])
def test_before_the_first_iteration_nothing_is_left(tiny_models, tmp_path, text):
  run = start(tiny_models, tmp_path / "run")  # nothing is compiled already
  read_until(run, text)
  run.send_signal(signal.SIGINT)
  begin = time.monotonic()
  ((code, _, errors),) = finish([run])
  assert code == 130 and time.monotonic() - begin < 10
  assert errors.splitlines() == [interrupts.LINE] and not (tmp_path / "run").exists()


SLOW = [pytest.param((0,), marks=pytest.mark.slow), pytest.param((1,), marks=pytest.mark.slow)]


@pytest.mark.parametrize("signaled", [(0, 1), *SLOW])
def test_of_several_processes_all_stop(tiny_models, tmp_path, settings, signaled):
  """A terminal sends it to all of them; others send it to one."""
  workdir = tmp_path / "run"
  flags = together(free_port(), 2)
  processes = [start(tiny_models, workdir, *flags[i], devices=4, **settings) for i in range(2)]
  read_until(processes[0], "iteration 2/")
  for number in signaled:
    processes[number].send_signal(signal.SIGINT)
  results = finish(processes)
  assert [code for code, _, _ in results] == [130, 130], results
  assert all("Traceback" not in errors for _, _, errors in results)
  done = store.latest(workdir / "checkpoints")
  assert done >= 2 and f"stopped by Ctrl-C: {done} iterations are saved" in results[0][1]
  assert "stopped by" not in results[1][1]


@pytest.mark.parametrize("signaled", [(0, 1), *SLOW])
def test_of_several_processes_that_compile_all_end(tiny_models, tmp_path, signaled):
  flags = together(free_port(), 2)
  processes = [start(tiny_models, tmp_path / "run", *flags[i], devices=4) for i in range(2)]
  read_until(processes[0], "compiling")
  for number in signaled:
    processes[number].send_signal(signal.SIGINT)
  begin = time.monotonic()
  results = finish(processes)
  print(results, time.monotonic() - begin)
  assert all(results[number][0] == 130 for number in signaled), results
  assert all(code != 0 for code, _, _ in results)

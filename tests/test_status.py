"""status.json says how a run was started and how it has ended."""

import json
import os
import shlex
import subprocess
import sys

import pytest

from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.report import page, status
from dancegrpo_jax.settings import config_file
from dancegrpo_jax.training.recording import recorded

TINY = "configs/emoji_clip.py:tiny"


@pytest.fixture
def begun(tmp_path):
  status.begin(tmp_path, config_file.load(TINY))
  return tmp_path


def ended(workdir, error: BaseException | None) -> dict:
  """status.json after a run that ends with this error."""

  def run():
    with recorded(workdir):
      if error is not None:
        raise error

  if error is None:
    run()
  else:
    with pytest.raises(type(error)) as raised:
      run()
    assert raised.value is error
  return status.read(workdir)


def test_a_run_that_returns_has_finished(begun):
  assert status.read(begun)["state"] == "running"
  values = ended(begun, None)
  assert values["state"] == "finished" and values["ended"] >= values["began"]
  assert not (begun / page.FILE).exists()  # the caller writes it, after the last numbers


@pytest.mark.parametrize(
  "error, state, reason, has_trace",
  [
    (ConfigError("config.x = 1: must be 2"), "failed", "config.x = 1: must be 2", False),
    (ZeroDivisionError("by <zero>"), "failed", "ZeroDivisionError: by <zero>", True),
    (KeyboardInterrupt(), "stopped", "stopped by Ctrl-C", False),
    (SystemExit(3), "failed", "SystemExit: 3", True),
  ],
)
def test_an_error_is_kept_and_goes_on(begun, error, state, reason, has_trace):
  values = ended(begun, error)
  assert values["state"] == state and values["reason"].startswith(reason)
  assert bool(values["traceback"]) == has_trace
  assert ("test_status.py" in values["traceback"]) == has_trace
  if not isinstance(error, ConfigError):  # which says it itself
    assert "no checkpoint was saved yet" in values["reason"]
  assert page.write(begun).read_text() == (begun / page.FILE).read_text()


def test_the_first_ending_counts(begun):
  status.end(begun, status.STOPPED, "stopped by SIGTERM: 2 iterations are saved")
  assert ended(begun, None)["state"] == "stopped"


def test_a_mistake_before_the_run_begins_writes_nothing(tmp_path):
  ended(tmp_path / "new", ConfigError("config.x"))
  assert not (tmp_path / "new").exists()


def test_a_refused_resume_leaves_the_ending_of_the_run(begun):
  values = json.loads((begun / status.FILE).read_text())
  other = values | {"process": "1 on another host"}  # which was killed, and left "running"
  (begun / status.FILE).write_text(json.dumps(other))
  assert ended(begun, ConfigError("config.x")) == other
  assert not (begun / page.FILE).exists()


def test_a_real_run_that_crashes(tmp_path, program_cache):
  """Pictures can't be saved, since their folder is a file: an error that no one has foreseen."""
  workdir = tmp_path / "a run"
  workdir.mkdir()
  (workdir / "samples").write_text("in the way")
  flags = [
    f"--config={TINY}",
    "--config.seed=7",
    f"--config.logging.compilation_cache={program_cache}",
    f"--workdir={workdir}",
  ]
  command = [sys.executable, "-m", "dancegrpo_jax.main", *flags]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert done.returncode == 1 and "NotADirectoryError" in done.stderr
  values = status.read(workdir)
  assert values["state"] == "failed" and "NotADirectoryError" in values["reason"]
  assert done.stderr.splitlines()[-1] in values["traceback"]
  assert values["command"] == f"python -m dancegrpo_jax.main {shlex.join(flags)}"
  assert values["directory"] == os.getcwd() and values["workdir"] == str(workdir)
  assert values["config_file"] == TINY
  cache = config_file.load(TINY).logging.compilation_cache
  assert values["changed"] == {
    "seed": [0, 7],
    "logging.compilation_cache": [cache, str(program_cache)],
  }
  report = (workdir / page.FILE).read_text()
  assert "Ended by an error after 0 of 6 iterations" in report and "NotADirectoryError" in report

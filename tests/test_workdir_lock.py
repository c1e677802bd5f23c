"""Two runs in one workdir, with real processes: which one has it, and when a dead one loses it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_distributed import finish, free_port, start, together
from test_interrupt import read_until
from tiny_checkpoint import ROOT

from dancegrpo_jax.devices import workdir_lock
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.report import metrics

# Holds a workdir as a run does. The words: the workdir, the machine's name for a process of another
# one, seconds to hold it, and seconds since 1970 at which to begin.
HOLD = """
import pathlib, sys, time
from dancegrpo_jax.devices import processes, workdir_lock
from dancegrpo_jax.settings import command_line

workdir, machine, seconds, begin = sys.argv[1:]
processes.is_first()  # imports JAX
if machine:
  me = workdir_lock._myself
  workdir_lock._myself = lambda: me() | {"machine": machine}

def command():
  time.sleep(max(0, float(begin) - time.time()))
  with workdir_lock.held(pathlib.Path(workdir)):
    print("held", flush=True)
    time.sleep(float(seconds))

sys.exit(command_line.exit_on_mistake(command))
"""


@pytest.fixture
def hold(tmp_path):
  """Starts a process that holds the workdir."""
  started = []

  def begin(machine: str = "", seconds: float = 60, at: float = 0) -> subprocess.Popen:
    words = [str(tmp_path / "run"), machine, str(seconds), str(at)]
    started.append(
      subprocess.Popen(
        [sys.executable, "-c", HOLD, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
    return started[-1]

  yield begin
  for process in started:
    process.kill()
    process.communicate()


def file_of(tmp_path: Path) -> Path:
  return tmp_path / "run" / workdir_lock.FILE


def test_a_living_owner_keeps_it_and_releases_it(hold, tmp_path):
  first = hold(seconds=4)
  read_until(first, "held")
  before = file_of(tmp_path).read_text()
  begin = time.monotonic()
  with pytest.raises(ConfigError) as error, workdir_lock.held(tmp_path / "run"):
    pass
  assert time.monotonic() - begin < 0.5
  text = str(error.value)
  assert f"--workdir={tmp_path / 'run'}: a run is going on" in text and "\n" not in text
  assert f"process {first.pid} on {json.loads(before)['host']}" in text
  assert os.listdir(tmp_path / "run") == [workdir_lock.FILE]
  assert file_of(tmp_path).read_text() == before
  assert first.wait() == 0 and not (tmp_path / "run").exists()


def test_a_killed_owner_is_followed_at_once(hold, tmp_path):
  """It is a zombie, as nobody has waited for it."""
  first = hold()
  read_until(first, "held")
  first.send_signal(signal.SIGKILL)
  time.sleep(0.2)
  begin = time.monotonic()
  with workdir_lock.held(tmp_path / "run"):
    assert json.loads(file_of(tmp_path).read_text())["process"] == str(os.getpid())
  assert time.monotonic() - begin < 0.5 and first.poll() is not None


def test_a_number_that_another_process_has_by_now(hold, tmp_path):
  (tmp_path / "run").mkdir()
  mine = workdir_lock._myself()
  file_of(tmp_path).write_text(json.dumps(mine | {"id": "1", "started": "1"}))
  begin = time.monotonic()
  with workdir_lock.held(tmp_path / "run"):
    pass
  assert time.monotonic() - begin < 0.5


@pytest.mark.parametrize("content, patience", [("", 1.0), ('{"id"', 1.0), ("reboot", 8.0)])
def test_after_a_power_cut(tmp_path, content, patience, capsys, monkeypatch):
  """The machine has another boot, or the file is spoilt: nobody gives a sign of life."""
  assert workdir_lock.PATIENCE == 8.0
  monkeypatch.setattr(workdir_lock, "PATIENCE", patience)
  (tmp_path / "run").mkdir()
  if content == "reboot":
    content = json.dumps(workdir_lock._myself() | {"id": "1", "machine": "another boot"})
  file_of(tmp_path).write_text(content)
  begin = time.monotonic()
  with workdir_lock.held(tmp_path / "run"):
    assert patience <= time.monotonic() - begin < patience + 1
    assert os.listdir(tmp_path / "run") == [workdir_lock.FILE]
  assert f"looking for a sign of life for {patience:.0f} s" in capsys.readouterr().out
  assert not os.listdir(tmp_path / "run")  # the folder was there before


def test_a_living_owner_on_another_machine_keeps_it(hold, tmp_path):
  read_until(hold("another"), "held")
  begin = time.monotonic()
  with pytest.raises(ConfigError, match="a run is going on"), workdir_lock.held(tmp_path / "run"):
    pass
  assert time.monotonic() - begin < workdir_lock.BEAT + 1


@pytest.mark.parametrize("dead", [False, True])
def test_of_several_newcomers_one_wins(hold, tmp_path, dead):
  if dead:
    first = hold()
    read_until(first, "held")
    first.send_signal(signal.SIGKILL)
  processes = [hold(seconds=3, at=time.time() + 9) for _ in range(6)]
  codes = sorted(code for code, _, _ in finish(processes))
  assert codes == [0, 2, 2, 2, 2, 2]
  assert not (tmp_path / "run").exists() or not os.listdir(tmp_path / "run")


def test_an_owner_that_was_suspended_ends(hold, tmp_path):
  first = hold("another")
  read_until(first, "held")
  first.send_signal(signal.SIGSTOP)
  with workdir_lock.held(tmp_path / "run"):
    first.send_signal(signal.SIGCONT)
    ((code, _, errors),) = finish([first])
    (line,) = errors.splitlines()
    assert code == 2 and f"process {os.getpid()} on" in line and "taken this workdir over" in line
    assert json.loads(file_of(tmp_path).read_text())["process"] == str(os.getpid())


def test_a_deleted_file_comes_back(tmp_path):
  with workdir_lock.held(tmp_path / "run"):
    before = file_of(tmp_path).read_text()
    file_of(tmp_path).unlink()
    time.sleep(workdir_lock.BEAT + 0.5)
    assert file_of(tmp_path).read_text() == before
  assert not (tmp_path / "run").exists()


def test_where_it_can_not_be_written_is_one_line(tmp_path):
  (tmp_path / "file").touch()
  with (
    pytest.raises(ConfigError, match="running.json can't be written there.*use another folder"),
    workdir_lock.held(tmp_path / "file" / "run"),
  ):
    pass


SETTINGS = {"iterations": 1000, "evaluation__every": 0, "checkpoint__every": 1000}


def content(folder: Path) -> dict[str, int]:
  """The files of a workdir that a run writes once, and when that was."""
  names = ("config.json", "environment.json", "status.json", workdir_lock.FILE)
  return {name: (folder / name).stat().st_ino for name in names}


def test_two_runs(tiny_models, tmp_path):
  """The second is refused before anything is loaded, and the first goes on; killed, it is followed
  by a run that has its workdir at once.
  """
  environment = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_ENABLE_COMPILATION_CACHE": "true"}
  settings = SETTINGS | {"environment": environment, "logging__compilation_cache": tmp_path / "c"}
  first = start(tiny_models, tmp_path / "run", **settings)
  read_until(first, "iteration 1/")
  before = content(tmp_path / "run")
  ((code, output, errors),) = finish([start(tiny_models, tmp_path / "run", **settings)])
  (line,) = errors.splitlines()
  assert code == 2 and f"a run is going on there, process {first.pid} on" in line and not output
  assert content(tmp_path / "run") == before
  seen = len(metrics.read(tmp_path / "run"))
  while len(metrics.read(tmp_path / "run")) < seen + 2:
    assert first.poll() is None
    time.sleep(0.1)
  first.kill()
  third = start(tiny_models, tmp_path / "run", **settings)
  assert "looking for a sign of life" not in read_until(third, "iteration 1/")
  third.send_signal(signal.SIGTERM)
  ((code, _, _),) = finish([third])
  first.communicate()
  assert code == 0 and not file_of(tmp_path).exists()


def test_a_refusal_reaches_all_processes(tiny_models, tmp_path, hold):
  first = hold()
  read_until(first, "held")
  flags = together(free_port(), 2)
  for code, _, errors in finish(
    [start(tiny_models, tmp_path / "run", *flags[i]) for i in range(2)]
  ):
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and f"process {first.pid} on" in line and "Traceback" not in errors
  assert os.listdir(tmp_path / "run") == [workdir_lock.FILE]

"""Several processes: the settings that JAX gets, disagreement between hosts, and SIGTERM.

Clusters are simulated by environment variables.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import textwrap

import jax
import pytest
from tiny_checkpoint import ROOT, overrides

from dancegrpo_jax import main
from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.devices import processes
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.report import metrics

CONFIG = f"--config={ROOT / 'configs' / 'emoji_clip.py'}:tiny"
SLURM = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "gpu[01-02]",
  "SLURM_NTASKS": "16",
  "SLURM_PROCID": "9",
  "SLURM_LOCALID": "1",
}
EXPLICIT = ["--coordinator=10.0.0.1:1234", "--num-processes=4", "--process-id=3"]


@pytest.fixture
def started(monkeypatch):
  """`(flags, variables) -> arguments of jax.distributed.initialize`, or None without a call."""
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
  monkeypatch.setattr(processes, "has_tpu", lambda: False)

  def run(flags=(), **variables):
    calls.clear()
    parser = argparse.ArgumentParser()
    processes.add_flags(parser)
    processes.start(parser.parse_args(list(flags)), variables)
    return calls[0] if calls else None

  return run


def test_a_single_process_does_nothing(started):
  assert started() is None
  assert started(["--coordinator=localhost:1234", "--num-processes=1", "--process-id=0"]) is None
  assert started(**SLURM | {"SLURM_NTASKS": "1"}) is None
  # As under sbatch without srun.
  assert started(**{name: value for name, value in SLURM.items() if "STEP" not in name}) is None
  assert started(TPU_WORKER_HOSTNAMES="localhost") is None


def test_flags_come_first(started):
  wanted = {
    "coordinator_address": "10.0.0.1:1234",
    "num_processes": 4,
    "process_id": 3,
    "cluster_detection_method": "deactivate",
  }
  assert started(EXPLICIT) == started(EXPLICIT, **SLURM) == wanted


def test_clusters(started, monkeypatch):
  assert started(**SLURM) == {"cluster_detection_method": "slurm"}
  assert started(TPU_WORKER_HOSTNAMES="a,b") == {}
  assert started(TPU_WORKER_HOSTNAMES="a", MEGASCALE_NUM_SLICES="2") == {}
  assert started(TPU_WORKER_HOSTNAMES="a,b", JAX_PLATFORMS="cpu") is None
  monkeypatch.setattr(processes, "has_tpu", lambda: True)
  assert started() == {}  # on a TPU VM the metadata server has the addresses
  assert started(TPU_SKIP_MDS_QUERY="1") is None and started(JAX_PLATFORMS="cpu") is None


@pytest.mark.parametrize(
  "flags, words",
  [
    (EXPLICIT[:1], ["--coordinator=10.0.0.1:1234", "without --num-processes and --process-id"]),
    (EXPLICIT[1:], ["without --coordinator"]),
    (["--coordinator=10.0.0.1", *EXPLICIT[1:]], ["--coordinator=10.0.0.1:", "host:port"]),
    ([EXPLICIT[0], "--num-processes=x", EXPLICIT[2]], ["--num-processes=x", "whole number"]),
    ([EXPLICIT[0], "--num-processes=0", EXPLICIT[2]], ["--num-processes=0", "at least 1"]),
    ([*EXPLICIT[:2], "--process-id=4"], ["--process-id=4", "0 to 3"]),
    ([EXPLICIT[0], "--num-processes=-1", EXPLICIT[2]], ["--num-processes=-1", "at least 1"]),
    (["--num-proceses=2"], ["--num-proceses", "did you mean", "--num-processes"]),
  ],
)
def test_wrong_flags_are_one_line(capsys, tmp_path, flags, words):
  assert main.main([CONFIG, *flags, f"--workdir={tmp_path / 'workdir'}"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ") and not [word for word in words if word not in line], line


def test_processes_that_cannot_join_are_one_line(started, monkeypatch):
  def refuse(**_):
    raise RuntimeError("DEADLINE_EXCEEDED:\n after 300 s")

  monkeypatch.setattr(jax.distributed, "initialize", refuse)
  with pytest.raises(ConfigError, match="DEADLINE_EXCEEDED: after 300 s.*start all"):
    started(**SLURM)


def test_a_coordinator_that_is_not_there_is_one_line(tiny_models, tmp_path):
  """A real process, because JAX itself would abort it with a stack trace."""
  flags = together(free_port(), 2)[1]
  ((code, _, errors),) = finish([start(tiny_models, tmp_path / "run", *flags, patience=2)])
  (line,) = errors.splitlines()
  assert code == 2 and line.startswith(
    f"error: {flags[0]}: process 0 does not answer there after 2 s"
  )
  assert "same coordinator" in line and not (tmp_path / "run").exists()


def test_hosts_that_do_not_share_the_workdir_stop(tiny_models, tmp_path):
  """They stop before weights are loaded; otherwise the first save would wait forever."""
  flags = together(free_port(), 2)
  processes = [start(tiny_models, tmp_path / f"run{i}", *flags[i], patience=3) for i in range(2)]
  for code, _, errors in finish(processes):
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and "Traceback" not in errors
    assert "--workdir=" in line and "isn't seen by process 1" in line and "all hosts share" in line
  assert not (tmp_path / "run0").exists()


PATIENT = """
import sys
from dancegrpo_jax import main
from dancegrpo_jax.devices import processes

processes.JOIN_SECONDS = processes.SHARE_SECONDS = int(sys.argv[1])
sys.exit(main.main(sys.argv[2:]))
"""


def start(
  folders,
  workdir,
  *flags: str,
  devices: int = 1,
  environment=None,
  patience=0,
  source="",
  **changes,
) -> subprocess.Popen:
  """Starts the command in a process of its own.

  `patience` replaces the number of seconds that it waits for other processes. `source` is Python
  code that calls the command with the arguments in sys.argv.
  """
  words = [
    CONFIG,
    *(f"--config.{word}" for word in overrides(folders, **changes)),
    f"--workdir={workdir}",
    *flags,
  ]
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices),
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    "PYTHONUNBUFFERED": "1",
    **(environment or {}),
  }
  program = ["-c", PATIENT, str(patience)] if patience else ["-m", "dancegrpo_jax.main"]
  command = [sys.executable, *(["-c", source] if source else program), *words]
  return subprocess.Popen(
    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )


def together(port: int, count: int) -> list[list[str]]:
  return [
    [f"--coordinator=127.0.0.1:{port}", f"--num-processes={count}", f"--process-id={i}"]
    for i in range(count)
  ]


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def finish(processes: list[subprocess.Popen], seconds: float = 240) -> list[tuple[int, str, str]]:
  """Exit code, stdout and stderr of each process. No process is left running."""
  try:
    texts = [process.communicate(timeout=seconds) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, *text) for process, text in zip(processes, texts)]


def test_different_configs_stop_all_processes(tiny_models, tmp_path):
  flags = together(free_port(), 2)
  processes = [start(tiny_models, tmp_path / "run", *flags[i], seed=i) for i in range(2)]
  for code, _, errors in finish(processes):
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and "Traceback" not in errors
    assert "different configs" in line and "on process 0" in line and "on process 1" in line
  assert not (tmp_path / "run").exists()


ELSEWHERE = """
import os
import sys
from dancegrpo_jax import main

sys.path[0] = os.getcwd()  # where the package is
os.chdir(os.environ["HOST"])
sys.exit(main.main(sys.argv[1:]))
"""


def test_different_prompts_stop_all_processes(tiny_models, tmp_path):
  """Each host has a prompts.txt of its own."""
  flags, texts = together(free_port(), 2), tiny_models.prompts.read_text()
  for i in range(2):
    (tmp_path / str(i)).mkdir()
    (tmp_path / str(i) / "prompts.txt").write_text(f"{texts}number {i}\n")
  hosts = [{"HOST": str(tmp_path / str(i))} for i in range(2)]
  processes = [
    start(
      tiny_models,
      tmp_path / "run",
      *flags[i],
      environment=hosts[i],
      source=ELSEWHERE,
      data__prompts="prompts.txt",
    )
    for i in range(2)
  ]
  for code, _, errors in finish(processes):
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and "Traceback" not in errors
    assert "different prompts" in line and "on process 0" in line and "on process 1" in line
  assert not (tmp_path / "run").exists()


def test_sigterm_saves_and_a_resumed_run_goes_on(tiny_models, tmp_path):
  workdir, most = tmp_path / "run", 1000
  settings = {
    "logging__compilation_cache": tmp_path / "cache",
    "evaluation__every": 0,
    "checkpoint__every": 1000,
    "environment": {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
  }
  run = start(tiny_models, workdir, iterations=most, **settings)
  said = []
  for line in run.stdout:
    said.append(line)
    if line.startswith("iteration 2/"):
      run.send_signal(signal.SIGTERM)
      break
  ((code, output, errors),) = finish([run])
  done = store.latest(workdir / "checkpoints")
  assert code == 0, "".join(said) + errors
  assert 2 <= done < most and f"stopped by SIGTERM: {done} iterations are saved" in output
  assert [row["iteration"] for row in metrics.read(workdir)] == list(range(done))
  ((code, output, errors),) = finish([start(tiny_models, workdir, iterations=done + 1, **settings)])
  assert code == 0, errors
  assert f"iteration {done + 1}/{done + 1}" in output and f"iteration {done}/" not in output
  assert [row["iteration"] for row in metrics.read(workdir)] == list(range(done + 1))


SAVING = """
  import argparse, os, signal, sys, time
  from pathlib import Path
  import jax, numpy as np
  from ml_collections import ConfigDict
  from dancegrpo_jax.checkpoints import store
  from dancegrpo_jax.devices import processes, sharding
  from dancegrpo_jax.devices.preemption import Preemption

  folder, number = Path(sys.argv[1]), int(sys.argv[-1])
  parser = argparse.ArgumentParser()
  processes.add_flags(parser)
  processes.start(parser.parse_args(sys.argv[2:-1]))
  mesh = sharding.make_mesh(ConfigDict({"data": 2, "fsdp": 1, "tensor": 1}))
  weights = jax.make_array_from_callback((8,), sharding.replicated(mesh), lambda _: np.zeros(8))
  with jax.set_mesh(mesh), store.Saver(folder, 3) as saver, Preemption(mesh) as preemption:
    for iteration in range(1, 7):
      asked = [preemption.reached(), preemption.reached(), preemption.reached(wait=True)]
      if any(asked):
        print(iteration, *asked)
        break
      saver.save(iteration, {"trainable": {"w": weights}}, {})
      saver.wait()
      if iteration == 4 and jax.process_index() == number:
        os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(2 * (iteration == 4))
"""


@pytest.mark.parametrize("number", [0, 1])
def test_a_signal_between_a_save_and_the_next_question(tmp_path, number):
  """A signal that arrives during a save is not lost.

  Orbax asks JAX's service for signals at each save, with a number of its own, and signals that came
  then used to be lost.
  """
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
  }
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", textwrap.dedent(SAVING), str(tmp_path / "saved"), *flags, str(number)],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for flags in together(free_port(), 2)
  ]
  for code, output, errors in finish(processes):
    assert code == 0, errors
    assert output.splitlines()[-1] == "5 False True True", errors  # gloo prints lines before it

"""The launch scripts, with stand-ins for gcloud, xpk, kubectl, git and Slurm.

The stand-ins only record how they were called, and no cloud is contacted. The tests cannot show
that a TPU or a cluster accepts these commands; flags are compared with the real tools' --help where
the tools are installed.
"""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dancegrpo_jax.devices import gpu_topologies
from dancegrpo_jax.plan import topologies
from dancegrpo_jax.settings import checks, config_file

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
TOOLS = (
  "gcloud",
  "xpk",
  "kubectl",
  "git",
  "mkdir",
  "sbatch",
  "squeue",
  "scancel",
  "tail",
  "python3",
)
RECORDER = f"""#!{sys.executable}
import json, os, sys
name = os.path.basename(sys.argv[0])
with open(os.environ["CALLS"], "a") as file:
  file.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
sys.exit(3 * (name == os.environ.get("FAILING")))
"""
PLACE = ["--zone=us-east5-b", "--project=my-project"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
EVERYWHERE = ["--node=all", "--worker=all"]
GKE = ["--cluster=dancegrpo", *PLACE]
MAIN = "-m dancegrpo_jax.main --config=configs/emoji_clip.py"
SETUP = (
  "mkdir -p dancegrpo_jax && tar -xzf dancegrpo_jax.tar.gz -C dancegrpo_jax && cd dancegrpo_jax"
  " && python3 -m pip install --user --quiet uv && python3 -m uv venv --quiet --allow-existing"
  " --python 3.12 .venv"
  " && python3 -m uv pip install --quiet --python .venv/bin/python -r requirements-tpu.txt"
)


@pytest.fixture
def launch(tmp_path):
  """`(script, *words, VARIABLE=value) -> (finished process, calls)`.

  Each call is a list of words.
  """
  folder = tmp_path / "bin"
  folder.mkdir()
  for tool in TOOLS:
    (folder / tool).write_text(RECORDER)
    (folder / tool).chmod(0o755)

  def run(
    script: str, *words: str, **variables: str
  ) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
    calls = tmp_path / "calls"
    calls.write_text("")
    environment = {
      "PATH": f"{folder}:{os.environ['PATH']}",
      "HOME": str(tmp_path),
      "CALLS": str(calls),
      **variables,
    }
    command = [str(ROOT / "launch" / script), *words]
    done = subprocess.run(
      command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    return done, [json.loads(line) for line in calls.read_text().splitlines()]

  return run


def sbatch(
  *more: str, main: str = f".venv/bin/python {MAIN} --workdir=runs/dancegrpo", nodes: int = 1
) -> list[str]:
  return [
    "sbatch",
    "--job-name=dancegrpo",
    f"--nodes={nodes}",
    "--ntasks-per-node=8",
    "--gpus-per-node=8",
    "--cpus-per-task=8",
    "--time=24:00:00",
    "--signal=TERM@300",
    "--output=dancegrpo.log",
    "--open-mode=append",
    *more,
    f"--wrap=srun --kill-on-bad-exit=1 --cpus-per-task=8 {main}",
  ]


def workload(main: str = MAIN, slices: int = 1) -> list[str]:
  return [
    "xpk",
    "workload",
    "create",
    *GKE,
    "--workload=dancegrpo-run",
    "--tpu-type=v6e-8",
    f"--num-slices={slices}",
    "--base-docker-image=python:3.12",
    "--script-dir=.",
    "--termination-grace-period-seconds=300",
    f"--command=pip install --quiet -r requirements-tpu.txt && exec python {main}"
    " --workdir=/runs/dancegrpo-run",
  ]


def uploads(mount: str = "") -> list[list[str]]:
  return [
    ["mkdir", "-p", "out"],
    ["git", "archive", "--format=tar.gz", "--output=out/dancegrpo_jax.tar.gz", "HEAD"],
    [
      *QUEUED,
      "scp",
      "out/dancegrpo_jax.tar.gz",
      "dancegrpo:dancegrpo_jax.tar.gz",
      *EVERYWHERE,
      *PLACE,
    ],
    [*QUEUED, "ssh", "dancegrpo", *EVERYWHERE, f"--command={SETUP}{mount}", *PLACE],
  ]


CREATE = [
  *QUEUED,
  "create",
  "dancegrpo",
  "--accelerator-type=v6e-8",
  "--runtime-version=v2-alpha-tpuv6e",
]
MOUNT = (
  " && sudo apt-get install -y -q nfs-common && mkdir -p runs && (mountpoint -q runs || sudo"
  " mount -t nfs 10.0.0.2:/share runs)"
  " && (test -w runs || sudo chmod a+rwx runs)"
)
SHARE = {"NFS": "10.0.0.2:/share"}
NODE_POOL = ["--tpu-type=v6e-8", "--num-slices=1"]
VOLUME = [
  "--type=gcpfilestore",
  "--tier=BASIC_HDD",
  "--size=1T",
  "--vol=runs",
  "--access-mode=ReadWriteMany",
]
CREDENTIALS = [
  "gcloud",
  "container",
  "clusters",
  "get-credentials",
  "dancegrpo",
  "--region=us-east5",
  "--project=my-project",
]
CASES = {
  "tpu create": ("tpu_vm.sh", ["create"], {}, [[*CREATE, "--node-id=dancegrpo", *PLACE]]),
  "tpu spot": (
    "tpu_vm.sh",
    ["create"],
    {"SPOT": "true", **SHARE},
    [[*CREATE, "--node-id=dancegrpo", "--spot", *PLACE]],
  ),
  "tpu slices": (
    "tpu_vm.sh",
    ["create"],
    {"SLICES": "4", "SPOT": "true", **SHARE},
    [[*CREATE, "--node-count=4", "--node-prefix=dancegrpo", "--spot", *PLACE]],
  ),
  "tpu status": (
    "tpu_vm.sh",
    ["status"],
    {},
    [[*QUEUED, "describe", "dancegrpo", "--format=value(state.state)", *PLACE]],
  ),
  "tpu setup": ("tpu_vm.sh", ["setup"], {}, uploads()),
  "tpu setup with a share": ("tpu_vm.sh", ["setup"], {"SLICES": "2", **SHARE}, uploads(MOUNT)),
  "tpu logs": (
    "tpu_vm.sh",
    ["logs"],
    {},
    [
      [
        *QUEUED,
        "ssh",
        "dancegrpo",
        "--node=0",
        "--worker=0",
        "--command=tail -n 100 -F dancegrpo_jax/run.log",
        *PLACE,
      ]
    ],
  ),
  "tpu stop": (
    "tpu_vm.sh",
    ["stop"],
    {},
    [
      [
        *QUEUED,
        "ssh",
        "dancegrpo",
        *EVERYWHERE,
        "--command=kill -TERM $(cat dancegrpo_jax/run.pid)",
        *PLACE,
      ]
    ],
  ),
  "tpu fetch": (
    "tpu_vm.sh",
    ["fetch"],
    {},
    [
      ["mkdir", "-p", "runs"],
      [
        *QUEUED,
        "scp",
        "--recurse",
        "dancegrpo:dancegrpo_jax/runs/dancegrpo",
        "runs/",
        "--node=0",
        "--worker=0",
        *PLACE,
      ],
    ],
  ),
  "tpu delete": (
    "tpu_vm.sh",
    ["delete"],
    {},
    [[*QUEUED, "delete", "dancegrpo", "--force", *PLACE]],
  ),
  "gke create": (
    "gke_xpk.sh",
    ["create"],
    {},
    [["xpk", "cluster", "create", *GKE, *NODE_POOL, "--spot"]],
  ),
  "gke on demand": (
    "gke_xpk.sh",
    ["create"],
    {"SPOT": "false"},
    [["xpk", "cluster", "create", *GKE, *NODE_POOL, "--on-demand"]],
  ),
  "gke storage": (
    "gke_xpk.sh",
    ["storage"],
    {},
    [
      [
        "xpk",
        "storage",
        "create",
        "dancegrpo-runs",
        *GKE,
        *VOLUME,
        "--mount-point=/runs",
        "--readonly=false",
        "--auto-mount=true",
      ]
    ],
  ),
  "gke run": ("gke_xpk.sh", ["run"], {}, [workload()]),
  "gke run with flags": (
    "gke_xpk.sh",
    ["run", "--config.iterations=3"],
    {"SLICES": "2", "CONFIG": "configs/sd_clip.py"},
    [workload("-m dancegrpo_jax.main --config=configs/sd_clip.py", 2)],
  ),
  "gke status": ("gke_xpk.sh", ["status"], {}, [["xpk", "workload", "list", *GKE]]),
  "gke logs": (
    "gke_xpk.sh",
    ["logs"],
    {},
    [
      CREDENTIALS,
      [
        "kubectl",
        "logs",
        "--follow",
        "--prefix",
        "--tail=100",
        "--max-log-requests=256",
        "--selector=jobset.sigs.k8s.io/jobset-name=dancegrpo-run",
      ],
    ],
  ),
  "gke stop": (
    "gke_xpk.sh",
    ["stop"],
    {},
    [["xpk", "workload", "delete", *GKE, "--workload=dancegrpo-run"]],
  ),
  "gke delete": ("gke_xpk.sh", ["delete"], {}, [["xpk", "cluster", "delete", *GKE]]),
  "slurm run": ("slurm.sh", ["run"], {}, [sbatch()]),
  "slurm nodes": (
    "slurm.sh",
    ["run"],
    {"NODES": "4", "PARTITION": "gpu", "ACCOUNT": "us"},
    [sbatch("--partition=gpu", "--account=us", nodes=4)],
  ),
  "slurm status": ("slurm.sh", ["status"], {}, [["squeue", "--me", "--name=dancegrpo"]]),
  "slurm logs": ("slurm.sh", ["logs"], {}, [["tail", "-n", "100", "-F", "dancegrpo.log"]]),
  "slurm stop": ("slurm.sh", ["stop"], {}, [["scancel", "--name=dancegrpo", "--signal=TERM"]]),
  "slurm delete": ("slurm.sh", ["delete"], {}, [["scancel", "--name=dancegrpo"]]),
}
CASES["gke run with flags"][3][0][-1] += " --config.iterations=3"


@pytest.mark.parametrize("name", CASES)
def test_exact_commands(launch, name):
  script, words, variables, expected = CASES[name]
  done, calls = launch(script, *words, **variables)
  assert done.returncode == 0, done.stderr
  assert calls == expected


@pytest.mark.parametrize("name", CASES)
def test_dry_run_prints_the_same_commands_and_runs_none(launch, name):
  script, words, variables, expected = CASES[name]
  done, calls = launch(script, "--dry-run", *words, **variables)
  assert done.returncode == 0 and not calls, done.stderr
  for line, command in zip(done.stdout.splitlines(), expected, strict=True):
    words = subprocess.run(
      ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    ).stdout
    assert words.split("\0")[:-1] == command  # how a shell reads the pasted line


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke_xpk.sh", "slurm.sh"])
@pytest.mark.parametrize(
  "words, said",
  [
    ([], "use "),
    (["destroy"], "'destroy': use "),
    (["run", "--dry-run"], "--dry-run comes before"),
    (["stop", "now"], "takes none: now"),
  ],
)
def test_mistakes(launch, script, words, said):
  done, calls = launch(script, *words)
  assert done.returncode == 2 and not calls
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ") and said in line


@pytest.mark.parametrize("command", ["create", "setup", "run"])
@pytest.mark.parametrize(
  "variables, said",
  [
    ({"SLICES": "2"}, "SLICES = 2, ACCELERATOR = v6e-8: several hosts"),
    ({"ACCELERATOR": "v6e-64"}, "SLICES = 1, ACCELERATOR = v6e-64: several hosts"),
    ({"SPOT": "true"}, "SPOT = true: a preempted VM takes its disk with it"),
  ],
)
def test_several_hosts_and_spot_need_a_share(launch, command, variables, said):
  done, calls = launch("tpu_vm.sh", command, **variables)
  (line,) = done.stderr.splitlines()
  assert done.returncode == 2 and not calls and said in line and "NFS=host:/share" in line
  for share in (SHARE, {"BUCKET": "gs://bucket/runs"}):
    assert launch("tpu_vm.sh", command, **variables, **share)[0].returncode == 0


def test_a_bucket_in_the_place_of_a_share(launch):
  """The workdir is in it on every host, and nothing is mounted."""
  bucket = {"BUCKET": "gs://bucket/runs"}
  done, calls = launch("tpu_vm.sh", "setup", **bucket)
  install = "-r requirements-tpu.txt"
  setup = SETUP.replace(install, f"{install} -r requirements-gcs.txt")
  expected = [*QUEUED, "ssh", "dancegrpo", *EVERYWHERE, f"--command={setup}", *PLACE]
  assert done.returncode == 0 and calls[-1] == expected and setup != SETUP
  done, calls = launch("tpu_vm.sh", "run", **bucket)
  assert done.returncode == 0 and "--workdir=gs://bucket/runs/dancegrpo" in " ".join(calls[-1])
  done, calls = launch("tpu_vm.sh", "fetch", **bucket)
  copy = ["gcloud", "storage", "cp", "--recursive", "gs://bucket/runs/dancegrpo", "runs/"]
  assert done.returncode == 0 and calls[-1] == copy


def test_an_accelerator_without_a_size(launch):
  done, calls = launch("tpu_vm.sh", "create", ACCELERATOR="v6e")
  assert (
    done.returncode == 2 and not calls and "ACCELERATOR = v6e: must be type and size" in done.stderr
  )


def examples() -> list:
  """(script, CONFIG, devices, flags of main) of all runs that docs/clusters.md starts."""
  found, page = [], (ROOT / "docs" / "clusters.md").read_text()
  for block in re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
    for script, words in re.findall(r"launch/(\w+)\.sh run *([^#\n]*)", block):
      variables = dict(re.findall(r"\b([A-Z]+)=(\S+)", block))
      chips = int(variables["ACCELERATOR"].rpartition("-")[2]) if "ACCELERATOR" in variables else 0
      devices = chips or int(variables["NODES"]) * int(variables["GPUS"])
      found.append(pytest.param(variables["CONFIG"], devices, words.split(), id=script))
  return found


def test_there_is_an_example_of_each_script():
  assert sorted(example.id for example in examples()) == ["gke_xpk", "slurm", "tpu_vm"]


@pytest.mark.parametrize("config, devices, words", examples())
def test_examples_are_sound_on_their_devices(config, devices, words):
  """The checks that main makes before it loads anything."""
  overrides = [word.removeprefix("--config.") for word in words]
  checks.validate(
    config_file.load(str(ROOT / config), overrides), num_devices=devices, num_examples=400
  )


def on_host(launch, home: Path, *words: str) -> subprocess.CompletedProcess:
  """Runs in `home` what the script asks a host to do. Ends when the shell ends, as ssh does."""
  _, calls = launch("tpu_vm.sh", *words)
  (command,) = [
    word.removeprefix("--command=") for word in calls[-1] if word.startswith("--command=")
  ]
  return subprocess.run(
    ["bash", "-c", command], cwd=home, capture_output=True, text=True, timeout=30, check=False
  )


def test_a_run_on_a_host(launch, tmp_path):
  """It starts in the background with unchanged flags, never twice, and SIGTERM stops it."""
  folder = tmp_path / "host" / "dancegrpo_jax"
  python = folder / ".venv" / "bin" / "python"
  python.parent.mkdir(parents=True)
  python.write_text(
    '#!/usr/bin/env bash\ntrap "echo saved; exit 0" TERM\nprintf "<%s>\\n" "$@"\nwhile :; do'
    " sleep 0.05; done\n"
  )
  python.chmod(0o755)
  flag = """--config.reward.terms=(("clip", 1.0),)"""
  assert on_host(launch, folder.parent, "run", flag).returncode == 0
  number, log = int((folder / "run.pid").read_text()), folder / "run.log"
  try:
    wait_for(lambda: flag in log.read_text())
    assert log.read_text().splitlines()[-1] == f"<{flag}>"
    again = on_host(launch, folder.parent, "run")
    assert again.returncode == 2 and "a run is going on" in again.stderr
    assert on_host(launch, folder.parent, "stop").returncode == 0
    wait_for(lambda: "saved" in log.read_text())
  finally:
    if "saved" not in log.read_text():
      os.kill(number, signal.SIGKILL)


def wait_for(condition, seconds: float = 20) -> None:
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.05)


def test_shellcheck():
  tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
  if tool is None:
    pytest.skip("shellcheck is not installed; pip install -r requirements-dev.txt")
  files = [str(file.relative_to(ROOT)) for file in SCRIPTS]
  done = subprocess.run(
    [tool, "--external-sources", *files], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout


def test_options_of_the_shell():
  """What a run can't show: an unset variable, and a failure inside of a pipe, end a script too."""
  scripts = [file for file in SCRIPTS if file.name != "common.sh"]
  assert len(scripts) == 3
  for file in scripts:
    assert "\nset -euo pipefail\n" in file.read_text(), file


@pytest.mark.parametrize("name", CASES)
def test_a_command_that_fails_is_the_last_one(launch, name):
  script, words, variables, expected = CASES[name]
  for i, (tool, *_) in enumerate(expected):
    if tool not in [call[0] for call in expected[:i]]:
      done, calls = launch(script, *words, **variables, FAILING=tool)
      assert done.returncode == 3 and calls == expected[: i + 1]


def asked(tool: str) -> dict[tuple[str, ...], set[str]]:
  """Subcommand -> the flags that the scripts pass to it, over all cases."""
  flags: dict[tuple[str, ...], set[str]] = {}
  for _, _, _, calls in CASES.values():
    for call in calls:
      if call[0] == tool:
        depth = {"gcloud": 4, "kubectl": 1, "xpk": 2, "sbatch": 0}[tool] + 1
        words = tuple(call[1:depth])
        flags.setdefault(words, set()).update(
          word.split("=")[0] for word in call[depth:] if word.startswith("--")
        )
  return flags


CLIENTS = ("gcloud", "kubectl", "xpk", "sbatch")


@pytest.mark.parametrize(
  "tool, words", [(tool, words) for tool in CLIENTS for words in asked(tool)]
)
def test_flags_are_the_tools_own(tool, words):
  """The flags are in the real tool's help.

  gcloud documents the flags of all its commands on a separate page.
  """
  if shutil.which(tool) is None:
    pytest.skip(f"{tool} is not installed")
  environment = os.environ | {"CLOUDSDK_CORE_DISABLE_PROMPTS": "1", "PAGER": "cat", "TERM": "dumb"}
  done = subprocess.run(
    [tool, *words, "--help"],
    env=environment,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  text = re.sub(r"\x1b\[[0-9;]*m|.\x08", "", done.stdout + done.stderr)
  if done.returncode:
    pytest.skip(f"{tool} {' '.join(words)} --help does not run here: {text.strip()[:200]}")
  shared = {"--project", "--format", "--quiet"} if tool == "gcloud" else set()
  missing = [
    flag for flag in asked(tool)[words] - shared if not re.search(rf"{flag}(?![\w-])", text)
  ]
  assert not missing, f"{tool} {' '.join(words)} has no {missing}"


@pytest.mark.parametrize("name, module", [("gpu", gpu_topologies), ("tpu", topologies)])
def test_requirements(name, module):
  """All of requirements.txt, and an extra that JAX has: the one that error messages ask for."""
  lines = (ROOT / f"requirements-{name}.txt").read_text().splitlines()
  everything, wanted = (line for line in lines if not line.startswith("#"))
  assert everything == "-r requirements.txt"
  extra = re.fullmatch(r"jax\[(\w+)\]", wanted)[1]
  assert extra in importlib.metadata.metadata("jax").get_all("Provides-Extra")
  assert f"pip install 'jax[{extra}]==" in Path(module.__file__).read_text()

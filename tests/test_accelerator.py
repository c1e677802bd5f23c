"""A GPU's memory, and GPUs without a plugin: the settings that JAX gets before it starts.

Needs no GPU.
"""

import json
import os
import subprocess
import sys

import pytest
from tiny_checkpoint import ROOT

from dancegrpo_jax.devices import accelerator

CONFIG = str(ROOT / "configs" / "emoji_clip.py")
OPTIONS = """
import json, sys
from dancegrpo_jax.devices import accelerator
accelerator.start()
assert "jax" not in sys.modules
from jaxlib import xla_client
options = xla_client.generate_pjrt_gpu_plugin_options()
names = ("memory_fraction", "preallocate", "allocator")
print(json.dumps({name: options.get(name) for name in names}))
"""


def clean(**variables: str) -> dict[str, str]:
  """This process's environment without variables that affect GPUs, and with these variables."""
  dropped = {*accelerator.DECIDES, "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"}
  return {name: value for name, value in os.environ.items() if name not in dropped} | variables


def process(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
  command = [sys.executable, *arguments]
  return subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
  )


@pytest.mark.parametrize(
  "said, expected",
  [
    ({}, {"memory_fraction": 0.92, "preallocate": None, "allocator": "default"}),
    (
      {"XLA_CLIENT_MEM_FRACTION": "0.5"},
      {"memory_fraction": 0.5, "preallocate": None, "allocator": "default"},
    ),
    (
      {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"},
      {"memory_fraction": 0.5, "preallocate": None, "allocator": "default"},
    ),
    (
      {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
      {"memory_fraction": None, "preallocate": False, "allocator": "default"},
    ),
    (
      {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},
      {"memory_fraction": None, "preallocate": None, "allocator": "platform"},
    ),
  ],
)
def test_what_xla_is_told(said, expected):
  """Asks jaxlib itself. Where a user has set one of the variables, XLA's choices stay."""
  done = process(["-c", OPTIONS], clean(**said))
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout) == expected


def test_only_a_run_on_a_gpu_with_our_share_is_told():
  said = []
  for platform in ("cpu", "tpu", "gpu"):
    accelerator.say_share(platform, {accelerator.VARIABLE: "0.92"}, said.append)
  accelerator.say_share("gpu", {accelerator.VARIABLE: "0.5"}, said.append)
  accelerator.say_share("gpu", {}, said.append)
  assert len(said) == 1 and "92 % of each GPU" in said[0]
  assert "XLA_CLIENT_MEM_FRACTION=0.5" in said[0]


@pytest.fixture
def machine(tmp_path):
  """A folder for PATH with an nvidia-smi, as on a machine with an NVIDIA driver."""
  tool = tmp_path / "nvidia-smi"
  tool.write_text("#!/bin/sh\n")
  tool.chmod(0o755)
  return str(tmp_path)


def notes(done: subprocess.CompletedProcess) -> list[str]:
  return [line for line in done.stderr.splitlines() if line.startswith("note: ")]


COMMANDS = {
  "main": [],
  "sample": ["--prompt=x", "--out=/dev/null/x"],
  "evaluate": ["--checkpoint=base", "--out=/dev/null/x.json"],
  "pretrain": ["--out=/dev/null/x"],
  "plan": ["--out=/dev/null/x.json"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_gpu_that_will_not_be_used_is_named_by_every_command(command, machine):
  """As for a user who installs requirements.txt on a machine with a driver.

  The command continues after the message.
  """
  flags = [f"--config={CONFIG}:tiny", "--config.sampler.kind=no-such", *COMMANDS[command]]
  done = process(["-m", f"dancegrpo_jax.{command}", *flags], clean(PATH=machine))
  (line,) = notes(done)
  assert "requirements-gpu.txt" in line and "CPU" in line
  assert done.returncode == 2 and "\nerror: " in done.stderr


def test_nothing_is_said_where_nothing_is_wrong(machine, tmp_path):
  """A requested CPU, a hidden GPU, no GPU at all, and an installed plugin."""
  program = ["-c", "from dancegrpo_jax.devices import accelerator; accelerator.start()"]
  plugin = tmp_path / "packages" / "jax_plugins" / "xla_cuda13"
  plugin.mkdir(parents=True)
  (plugin / "__init__.py").touch()
  path = os.pathsep.join([str(ROOT), str(plugin.parents[1])])
  assert len(notes(process(program, clean(PATH=machine)))) == 1
  for environment in (
    clean(PATH=machine, JAX_PLATFORMS="cpu"),
    clean(PATH=machine, CUDA_VISIBLE_DEVICES=""),
    clean(PATH=str(tmp_path / "empty")),
    clean(PATH=machine, PYTHONPATH=path),
  ):
    done = process(program, environment)
    assert done.returncode == 0 and not notes(done), done.stderr


def test_a_plugin_that_a_package_announces(machine, tmp_path):
  """JAX's other way to find plugins: an entry point of an installed package."""
  info = tmp_path / "site" / "jax_cuda13_pjrt-0.11.2.dist-info"
  info.mkdir(parents=True)
  (info / "METADATA").write_text("Metadata-Version: 2.1\nName: jax-cuda13-pjrt\nVersion: 0.11.2\n")
  (info / "entry_points.txt").write_text("[jax_plugins]\nxla_cuda13 = jax_plugins.xla_cuda13\n")
  program = ["-c", "from dancegrpo_jax.devices import accelerator; accelerator.start()"]
  path = os.pathsep.join([str(ROOT), str(info.parent)])
  assert not notes(process(program, clean(PATH=machine, PYTHONPATH=path)))

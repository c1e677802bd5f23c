"""A GPU's memory, and GPUs that JAX can't use: settled before JAX starts, and without it.

JAX takes 75 % of a GPU unless it is told otherwise, and the recipes for 80 GB are meant for nearly
all of it. XLA's own variables stay the way to choose something else.
"""

import importlib.metadata
import importlib.util
import os
import pkgutil
import shutil
import sys
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from dancegrpo_jax.devices import processes

SHARE = 0.92  # of a GPU's memory; of 80 GB it leaves CUDA and its libraries 6, which take up to 2
VARIABLE = "XLA_CLIENT_MEM_FRACTION"
# What jaxlib's `generate_pjrt_gpu_plugin_options` reads to size its allocators, in 0.10 and 0.11.
# VARIABLE and its old name, XLA_PYTHON_CLIENT_MEM_FRACTION, may not be set both: JAX refuses that.
DECIDES = (
  VARIABLE,
  "XLA_PYTHON_CLIENT_MEM_FRACTION",
  "XLA_PYTHON_CLIENT_PREALLOCATE",
  "XLA_PYTHON_CLIENT_ALLOCATOR",
  "XLA_PYTHON_CLIENT_COLLECTIVE_MEM_SIZE_MB",
)
# What an NVIDIA driver puts onto a machine, whether or not anything can use it.
TRACES = ("/dev/nvidia0", "/proc/driver/nvidia/version")


def start(environment: MutableMapping[str, str] = os.environ) -> None:
  """What a command calls before JAX's backend starts: `claim`, and on stderr the line of `unused`.

  Costs milliseconds.
  """
  claim(environment)
  if line := unused(environment):
    print(line, file=sys.stderr)


def claim(environment: MutableMapping[str, str]) -> bool:
  """Has JAX take `SHARE` of a GPU's memory, unless the user has set one of `DECIDES`.

  Returns:
    True if this call set the share. Without a GPU the variable has no effect.
  """
  if any(environment.get(name) for name in DECIDES):
    return False
  environment[VARIABLE] = str(SHARE)
  return True


def say_share(
  platform: str, environment: Mapping[str, str] = os.environ, say: Callable[[str], Any] = print
) -> None:
  """Tells in a line what is taken, where the run is on a GPU and the share is that of `claim`."""
  if platform == "gpu" and environment.get(VARIABLE) == str(SHARE):
    taken = f"memory: {SHARE * 100:.0f} % of each GPU is taken"
    say(f"{taken}; {VARIABLE}=0.5 before the command takes half of it")


def unused(environment: Mapping[str, str]) -> str:
  """A line where the machine has an NVIDIA GPU but JAX not its plugin for it; "" otherwise."""
  hidden = environment.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
  chosen = environment.get("JAX_PLATFORMS")  # JAX itself answers where that can't be had
  if hidden or chosen or not has_nvidia(environment) or has_plugin() or processes.has_tpu():
    return ""
  return (
    "note: this machine has an NVIDIA GPU, but JAX's CUDA plugin is not installed, so the CPU is"
    " used; pip install -r requirements-gpu.txt, or JAX_PLATFORMS=cpu if the CPU is meant"
  )


def has_nvidia(environment: Mapping[str, str]) -> bool:
  """Whether the machine has an NVIDIA GPU, as far as its driver's files tell."""
  if any(Path(trace).exists() for trace in TRACES):
    return True
  return shutil.which("nvidia-smi", path=environment.get("PATH", os.defpath)) is not None


def has_plugin() -> bool:
  """Whether JAX finds a CUDA plugin: a module of `jax_plugins`, or what a package announces."""
  found = importlib.util.find_spec("jax_plugins")
  places = found.submodule_search_locations if found else []
  if any("cuda" in module.name for module in pkgutil.iter_modules(places)):
    return True
  announced = importlib.metadata.entry_points(group="jax_plugins")
  return any("cuda" in entry.value for entry in announced)

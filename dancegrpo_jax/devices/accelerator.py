"""Sets how much of a GPU's memory JAX takes and how a CPU's memory is kept, and warns about GPUs
that JAX cannot use.

This must happen before JAX starts, so this module does not import it. JAX takes 75 % of a GPU
by default, but the recipes for 80 GB need nearly all of it. XLA's variables override this choice.
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

from dancegrpo_jax.devices import host_memory, processes

# The share of a GPU's memory that JAX takes. Of 80 GB it leaves 6 to CUDA and its libraries, which
# take up to 2.
SHARE = 0.92
VARIABLE = "XLA_CLIENT_MEM_FRACTION"
# The variables from which jaxlib's `generate_pjrt_gpu_plugin_options` sizes its allocators, in 0.10
# and 0.11. JAX refuses to start with both VARIABLE and its old name,
# XLA_PYTHON_CLIENT_MEM_FRACTION.
DECIDES = (
  VARIABLE,
  "XLA_PYTHON_CLIENT_MEM_FRACTION",
  "XLA_PYTHON_CLIENT_PREALLOCATE",
  "XLA_PYTHON_CLIENT_ALLOCATOR",
  "XLA_PYTHON_CLIENT_COLLECTIVE_MEM_SIZE_MB",
)
# Files that exist wherever an NVIDIA driver is installed, whether or not anything can use it.
TRACES = ("/dev/nvidia0", "/proc/driver/nvidia/version")


def start(environment: MutableMapping[str, str] = os.environ) -> None:
  """Does `claim`, prints the line of `unused` on stderr, and does `host_memory.keep` where programs
  run on the CPU. Takes milliseconds.

  Every command calls this before JAX's backend starts.
  """
  claim(environment)
  if is_on_cpu(environment):
    host_memory.keep(environment)
  if line := unused(environment):
    print(line, file=sys.stderr)


def claim(environment: MutableMapping[str, str]) -> bool:
  """Makes JAX take `SHARE` of a GPU's memory, unless the user has set one of `DECIDES`.

  Without a GPU this has no effect.

  Returns:
    Whether this call set the share.
  """
  if any(environment.get(name) for name in DECIDES):
    return False
  environment[VARIABLE] = str(SHARE)
  return True


def say_share(
  platform: str, environment: Mapping[str, str] = os.environ, say: Callable[[str], Any] = print
) -> None:
  """Prints how much memory is taken if the run is on a GPU and `claim` has chosen the share."""
  if platform == "gpu" and environment.get(VARIABLE) == str(SHARE):
    taken = f"memory: {SHARE * 100:.0f} % of each GPU is taken"
    say(f"{taken}; {VARIABLE}=0.5 before the command takes half of it")


def unused(environment: Mapping[str, str]) -> str:
  """A note for the user if the machine has an NVIDIA GPU and JAX lacks its plugin; else ""."""
  is_hidden = environment.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
  is_chosen = bool(environment.get("JAX_PLATFORMS"))  # JAX reports a platform that it cannot use
  if is_hidden or is_chosen or processes.has_tpu():
    return ""
  if not has_nvidia(environment) or has_plugin():
    return ""
  return (
    "note: this machine has an NVIDIA GPU, but JAX's CUDA plugin is not installed, so the CPU is"
    " used; pip install -r requirements-gpu.txt, or JAX_PLATFORMS=cpu if the CPU is meant"
  )


def is_on_cpu(environment: Mapping[str, str]) -> bool:
  """Whether JAX will use the CPU, as far as that can be told before it starts."""
  platforms = environment.get("JAX_PLATFORMS")
  if platforms:
    return platforms.split(",")[0] == "cpu"
  return not processes.has_tpu() and not has_nvidia(environment)


def has_nvidia(environment: Mapping[str, str]) -> bool:
  """Whether the machine has an NVIDIA GPU, judged by the files of its driver."""
  if any(Path(trace).exists() for trace in TRACES):
    return True
  return shutil.which("nvidia-smi", path=environment.get("PATH", os.defpath)) is not None


def has_plugin() -> bool:
  """Whether JAX finds a CUDA plugin: a module in `jax_plugins`, or an entry point of a package."""
  spec = importlib.util.find_spec("jax_plugins")
  folders = spec.submodule_search_locations if spec else []
  if any("cuda" in module.name for module in pkgutil.iter_modules(folders)):
    return True
  entries = importlib.metadata.entry_points(group="jax_plugins")
  return any("cuda" in entry.value for entry in entries)

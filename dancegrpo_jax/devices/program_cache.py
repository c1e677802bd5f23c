"""Compiled programs on disk, so that a second start of a config compiles nothing: JAX's persistent
compilation cache.
"""

import hashlib
import os
import platform
from pathlib import Path

import jax
import jaxlib
from jax.experimental.compilation_cache import compilation_cache

DEFAULT = "default"
SIZE = (
  8 * 2**30
)  # bytes of the default folder; beyond it the programs that weren't used for longest are removed


def use(setting: str) -> None:
  """Keeps compiled programs in a folder from now on. A damaged entry is compiled anew, with a
  warning.

  Args:
    setting: config.logging.compilation_cache: a folder, which all processes see; "default", which
      is `default_folder`, holds at most `SIZE` bytes and is for a single process; "" for none.
  """
  if not setting:
    jax.config.update("jax_compilation_cache_dir", None)
    return
  # Process 0 alone writes. Others that don't see its folder would compile while it waits for them
  # in a collective, for which gloo gives them 30 s, or for its part in choosing kernels. On CPUs
  # JAX does not find process 0's programs anywhere.
  is_default = setting == DEFAULT
  if jax.process_count() > 1 and (is_default or jax.default_backend() == "cpu"):
    return
  if is_default and os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # the user has said it to JAX
    return
  folder = default_folder(jax.default_backend()) if is_default else Path(setting)
  if str(folder) != jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
    # JAX looks for a folder at the first compilation of a process alone
    compilation_cache.reset_cache()
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_compilation_cache_max_size", SIZE if is_default else -1)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def default_folder(backend: str) -> Path:
  """Where "default" keeps programs: in the user's cache folder, apart for each jaxlib, platform and
  kind of CPU.

  Programs for a CPU hold its machine code, which another kind of CPU may not know, and a home
  folder may serve many machines.
  """
  base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  return (
    Path(base)
    / "dancegrpo_jax"
    / "programs"
    / f"jaxlib-{jaxlib.__version__}-{backend}-{cpu_kind()}"
  )


def cpu_kind() -> str:
  """The processor's architecture and a digest of its features, as x86_64-1f0c2a9d."""
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    features = next(line for line in lines if line.startswith(("flags", "Features")))
  except (OSError, StopIteration):
    features = platform.processor()
  words = " ".join(sorted(features.split()))
  return f"{platform.machine()}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"

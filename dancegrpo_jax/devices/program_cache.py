"""JAX's compilation cache on disk, so that a second start of a config compiles nothing."""

import hashlib
import os
import platform
from pathlib import Path

import jax
import jaxlib
from jax.experimental.compilation_cache import compilation_cache

DEFAULT = "default"
# Bytes of the default folder. Beyond it, JAX removes the programs that were not used for longest.
SIZE = 8 * 2**30


def use(setting: str) -> None:
  """Keeps compiled programs in a folder from now on.

  JAX compiles a damaged entry again, with a warning.

  Args:
    setting: config.logging.compilation_cache: a folder that all processes see, or "default", which
      is `default_folder`, with at most `SIZE` bytes and for a single process only, or "" for none.
  """
  if not setting:
    jax.config.update("jax_compilation_cache_dir", None)
    return
  # Only process 0 writes. Processes that do not see its folder would compile while it waits for
  # them in a collective, for which gloo allows 30 s, or for their part in choosing kernels. On CPUs
  # the other processes never find the programs of process 0.
  is_default = setting == DEFAULT
  if jax.process_count() > 1 and (is_default or jax.default_backend() == "cpu"):
    return
  if is_default and os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # JAX uses that folder
    return
  folder = str(default_folder(jax.default_backend())) if is_default else setting
  if folder != jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
    # Without this, JAX would read the setting at the first compilation of a process only.
    compilation_cache.reset_cache()
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_compilation_cache_max_size", SIZE if is_default else -1)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def default_folder(backend: str) -> Path:
  """The folder that "default" means: in the user's cache folder, one for each jaxlib, platform and
  kind of CPU.

  Programs for a CPU are machine code, which another kind of CPU may not be able to run, and many
  machines may share a home folder.
  """
  base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
  name = f"jaxlib-{jaxlib.__version__}-{backend}-{cpu_kind()}"
  return base / "dancegrpo_jax" / "programs" / name


def cpu_kind() -> str:
  """The processor's architecture and a digest of its features, as "x86_64-1f0c2a9d"."""
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    features = next(line for line in lines if line.startswith(("flags", "Features")))
  except (OSError, StopIteration):
    features = platform.processor()
  words = " ".join(sorted(features.split()))
  return f"{platform.machine()}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"

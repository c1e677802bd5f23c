"""Setup of all tests.

There are 8 virtual CPU devices; silent rank promotion and reuse of keys are errors; shapes are
checked.
"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Workers inherit the flags from the process that starts them.
if "PYTEST_XDIST_WORKER" not in os.environ and "full_size" not in sys.argv:
  # Small programs that run a few times take most of their time to compile. Without LLVM's
  # optimisations they need a third of it.
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests of the compilation cache turn it on with the `program_cache` fixture. Commands that tests
# start inherit this setting.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
install_import_hook("dancegrpo_jax", "beartype.beartype")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
  """Folders of a tiny random Stable Diffusion and CLIP, and a file of prompts."""
  from tiny_checkpoint import write_models

  return write_models(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def program_cache(tmp_path_factory):
  """A folder of compiled programs, with JAX's cache turned on for the tests of a module."""
  fields = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
  )
  before = {field: getattr(jax.config, field) for field in fields}
  jax.config.update("jax_enable_compilation_cache", True)
  # JAX looks for the folder only at the first compilation of a process.
  compilation_cache.reset_cache()
  yield tmp_path_factory.mktemp("programs")
  for field, value in before.items():
    jax.config.update(field, value)
  compilation_cache.reset_cache()

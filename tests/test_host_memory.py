"""Freed memory of a CPU's programs stays with the process. Each test is a process of its own."""

import json
import os
import platform
import subprocess
import sys

import pytest
from tiny_checkpoint import ROOT

from dancegrpo_jax.devices import accelerator, host_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
# Prints the page faults of three calls of a program that needs 16 MiB of temporary memory.
PROGRAM = """
import json, resource
from dancegrpo_jax.devices import accelerator
accelerator.start()
import jax, jax.numpy as jnp

x = jax.random.normal(jax.random.key(0), (2048, 2048))
program = jax.jit(lambda x: jnp.sum((x @ x) @ x))
faults = []
for _ in range(4):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  program(x).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(faults[1:]))
"""


def faults(**variables: str) -> list[int]:
  environment = {k: v for k, v in os.environ.items() if k not in host_memory.DECIDES}
  environment |= {"JAX_PLATFORMS": "cpu"} | variables
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def test_a_program_finds_the_memory_of_its_last_call():
  """A call needs 4096 pages; without `keep` it touches them all anew."""
  assert max(faults()) < 400


def test_the_user_may_decide_otherwise():
  assert min(faults(MALLOC_TRIM_THRESHOLD_="131072")) > 4000


@pytest.mark.parametrize(
  "platforms, expected", [("cpu", True), ("cpu,cuda", True), ("cuda", False), ("cuda,cpu", False)]
)
def test_where_programs_run(platforms, expected):
  assert accelerator.is_on_cpu({"JAX_PLATFORMS": platforms}) is expected

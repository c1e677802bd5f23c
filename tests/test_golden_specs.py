"""Sharding of parameters, optimizer state and averages at full size.

A change of rules, names or shapes appears as a difference here.
"""

import difflib

import pytest
from golden_specs import GOLDEN, REWARDS, RUNS, folded, specs


@pytest.mark.parametrize("name", [*RUNS, *REWARDS])
def test_specs_are_the_golden_ones(name):
  golden = (GOLDEN / f"specs_{name}.txt").read_text().splitlines()
  difference = "\n".join(
    difflib.unified_diff(golden, found := specs(name), "golden", "now", lineterm="", n=0)
  )
  assert found == golden, (
    f"{difference}\nif this is meant: python tests/golden_specs.py, and look at the difference"
    " in git"
  )


@pytest.mark.parametrize("name", RUNS)
def test_the_optimizer_lies_where_its_parameters_do(name):
  """Nor is any trained array of a megabyte or more whole on every device."""
  golden = (GOLDEN / f"specs_{name}.txt").read_text().splitlines()
  prefix = "lora" if "lora" in name else "denoiser"
  trained = {
    line.split("/", 1)[1] for line in golden if line.split(" x ")[1].startswith(f"{prefix}/")
  }
  for moment in ("mu", "nu"):
    of_optimizer = {
      line.split(f"/{moment}/{prefix}/")[1] for line in golden if f"/{moment}/{prefix}/" in line
    }
    assert of_optimizer == trained
  for line in golden:
    shape, spec = line.rsplit(" [", 1)[1].split("] (")
    size = 4
    for side in filter(None, shape.split(", ")):
      size *= int(side)
    if line.split(" x ")[1].startswith((f"{prefix}/", "optimizer/")):
      assert "fsdp" in spec or size < 2**20 or "conv_" in line, line


def test_lines_are_folded():
  lines = ["a/layers_0/k [2] ()", "a/layers_11/k [2] ()", "a/layers_1/k [3] ()"]
  assert folded(lines) == ["   2 x a/layers_#/k [2] ()", "   1 x a/layers_#/k [3] ()"]

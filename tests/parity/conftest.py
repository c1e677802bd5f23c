"""Fixtures of the parity tests: what was measured is printed and kept in the report; gigabytes of
weights do not stay behind.
"""

import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def measured(record_property):
  """`measured(name, value, bound)` asserts value <= bound, and says both (with -s) and keeps them
  (with --junitxml).
  """

  def check(name: str, value: float, bound: float) -> None:
    record_property(name, f"{value:.3g}")
    print(f"\n{name}: {value:.2e} (bound {bound:.0e})", end="")
    assert value <= bound, (name, value, bound)

  return check


@pytest.fixture
def scratch():
  """A folder that is gone after the test: pytest's own keeps the weights of three runs."""
  with tempfile.TemporaryDirectory(prefix="full-size-") as folder:
    yield Path(folder)

"""Fixtures of the parity tests.

Measured errors are printed and kept in the report. Gigabytes of weights are removed.
"""

import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def measured(record_property):
  """`measured(name, value, bound)` asserts value <= bound and reports both.

  It prints them (with -s) and keeps them (with --junitxml).
  """

  def check(name: str, value: float, bound: float) -> None:
    record_property(name, f"{value:.3g}")
    print(f"\n{name}: {value:.2e} (bound {bound:.0e})", end="")
    assert value <= bound, (name, value, bound)

  return check


@pytest.fixture
def scratch():
  """A folder that is removed after the test; pytest's folders keep the weights of three runs."""
  with tempfile.TemporaryDirectory(prefix="full-size-") as folder:
    yield Path(folder)

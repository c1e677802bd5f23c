"""The examples run as they are started by hand, and do what they say."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent


def test_a_model_of_ones_own_learns(tmp_path):
  """Seconds are those of the processor, whatever else the machine does; a minute is promised."""
  by_hand = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  command = [sys.executable, "-m", "examples.library", f"--plot={tmp_path / 'points.png'}"]
  before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
  done = subprocess.run(command, cwd=ROOT, env=by_hand, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 60
  said = re.findall(r"^(pre|post)-trained: reward ([\d.]+) \+- ([\d.]+)$", done.stdout, re.M)
  (_, base, base_error), (_, trained, error) = said
  gained = float(trained) - float(base)
  assert gained > 0.3 and gained > 3 * (float(base_error) ** 2 + float(error) ** 2) ** 0.5
  assert done.stdout.count("\niteration ") == 8
  assert Image.open(tmp_path / "points.png").size[0] > 800

"""Golden sharding specs: the placement of all published parameters under the configs' rules.

    python tests/golden_specs.py      writes tests/golden/specs_<config>.txt again

A line has the number of parameters, their path with # for the numbers of layers, their shape and
their partition spec. The mesh has as many devices as the config is planned for, and a dimension
that they cannot share equally is an error.
"""

import re
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from dancegrpo_jax.assembly import loading  # noqa: E402
from dancegrpo_jax.compilation import inventory  # noqa: E402
from dancegrpo_jax.devices import sharding  # noqa: E402
from dancegrpo_jax.settings import config_file  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
# Config: (preset, devices).
RUNS = {"flux_hps": ("", 64), "flux_hps_lora": ("v5e", 16), "sd_hps": ("v5e", 8)}
# Variants of the configs above; only their rewards are new.
REWARDS = dict.fromkeys(("sd_clip", "sd_pick", "sd_aesthetic"), ("v5e", 8))


def specs(name: str) -> list[str]:
  """The lines of a config: parameters of all networks and rewards, and the optimizer's state."""
  path, (preset, devices) = ROOT / "configs" / f"{name}.py", {**RUNS, **REWARDS}[name]
  config = inventory.without_weights(config_file.load(f"{path}:{preset}" if preset else str(path)))
  sizes = sharding.axis_sizes(config.mesh, devices)
  # Nothing is put on these devices, so any may stand in.
  mesh = jax.sharding.Mesh(np.resize(np.array(jax.devices()), sizes), sharding.AXES)
  model = inventory.outline(config, mesh)
  trees = {"rewards": model.reward_params}
  if name in RUNS:
    state = loading.abstract_state(config, model, mesh, 1)
    trees |= {**model.frozen, **model.trainable, "optimizer": state.opt_state, "average": state.ema}
  lines = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
    where = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = ", ".join("None" if axis is None else str(axis) for axis in leaf.sharding.spec)
    lines.append(f"{where} {list(leaf.shape)} ({spec})")
  return folded(lines)


def folded(lines: list[str]) -> list[str]:
  """Merges lines that differ only in the numbers of their layers, and counts them."""
  found = Counter(re.sub(r"_[0-9]+(?=/)", "_#", line) for line in lines)
  return [f"{count:4d} x {line}" for line, count in sorted(found.items())]


if __name__ == "__main__":
  GOLDEN.mkdir(exist_ok=True)
  for run in (*RUNS, *REWARDS):
    (GOLDEN / f"specs_{run}.txt").write_text("\n".join(specs(run)) + "\n")

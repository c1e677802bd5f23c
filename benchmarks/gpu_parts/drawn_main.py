"""`dancegrpo_jax.main` with `random:` checkpoints drawn on the device."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT / "benchmarks")
sys.path.insert(1, str(ROOT))

if __name__ == "__main__":
  from dancegrpo_jax import main
  from gpu_parts import drawing

  drawing.install()
  sys.exit(main.main(sys.argv[1:]))

"""Command: train.

    python -m dancegrpo_jax.main --config=configs/emoji_clip.py [--config.key=value ...] [--workdir=DIR]
"""

import sys
from pathlib import Path

from dancegrpo_jax.runtime import config as configs


def main(argv: list[str]) -> int:
  """Reads the flags and runs; returns the exit code, 2 for a mistake."""

  def command() -> None:
    line = configs.parse_argv(
      argv, "GRPO post-training of an image generator.",
      lambda parser: parser.add_argument("--workdir", help="default: runs/<config name>; running again on it resumes"),
    )  # fmt: skip
    from dancegrpo_jax import train  # after the flags: a misspelt one is answered at once

    train.run(line.config, Path(line.flags.workdir or f"runs/{line.config.name}"))

  return configs.exit_on_mistake(command)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

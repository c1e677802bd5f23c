"""Command: scores of a checkpoint next to its base model's, on prompts with noise that training
never saw.

    python -m dancegrpo_jax.evaluate --config=configs/emoji_clip.py --checkpoint=runs/emoji_clip \\
      --out=runs/emoji_clip/evaluation.json
"""

import argparse
import sys
from pathlib import Path

from dancegrpo_jax.devices import accelerator
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.settings import command_line


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  parser.add_argument(
    "--checkpoint", required=True, help="a workdir, its checkpoints/ folder, or base"
  )
  parser.add_argument(
    "--prompts", action="append", help="prompt files; default: data.prompts and data.held_out"
  )
  parser.add_argument(
    "--out", required=True, help="JSON file; a folder of its name gets the images"
  )


def main(argv: list[str]) -> int:
  """Reads the flags and evaluates; returns the exit code, 2 for a mistake."""

  def command() -> None:
    line = command_line.parse_argv(argv, "Score a checkpoint next to its base model.", add_flags)
    accelerator.start()
    if Path(line.flags.out).suffix != ".json":
      raise ConfigError(
        f"--out={line.flags.out}: must end with .json; the images go into the folder of that"
        " name without it"
      )
    command_line.require_writable(f"--out={line.flags.out}", Path(line.flags.out).parent)
    files = line.flags.prompts or [
      file for file in (line.config.data.prompts, line.config.data.held_out) if file
    ]
    from dancegrpo_jax.evaluation import (
      comparison,  # after the flags: a misspelt one is answered at once
    )

    comparison.run(line.config, line.flags.checkpoint, files, Path(line.flags.out))

  return command_line.exit_on_mistake(command)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

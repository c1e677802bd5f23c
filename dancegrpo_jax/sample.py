"""Command: images from a base model or a checkpoint.

    python -m dancegrpo_jax.sample --config=configs/emoji_clip.py --checkpoint=base \\
      --prompt="a red apple on a blue background" --out=out/
"""

import argparse
import sys
from pathlib import Path

from dancegrpo_jax.devices import accelerator
from dancegrpo_jax.settings import command_line


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of this command."""
  parser.add_argument(
    "--checkpoint", default="base", help="base, a workdir, or its checkpoints/ folder"
  )
  parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
  parser.add_argument("--out", required=True, help="folder for the PNG files and grid.png")
  parser.add_argument("--samples", type=int, default=4, help="images of each prompt")
  parser.add_argument("--seed", type=int, default=0, help="seed of the initial noise")


def main(argv: list[str]) -> int:
  """Reads the flags and samples. Returns the exit code, 2 for a mistake."""

  def command() -> None:
    description = "Sample images from a base model or a checkpoint."
    line = command_line.parse_argv(argv, description, add_flags)
    flags = line.flags
    out = Path(flags.out)
    accelerator.start()
    command_line.require_writable(f"--out={flags.out}", out)
    # Imported now: JAX takes a second, and a misspelt flag should be answered at once.
    from dancegrpo_jax.evaluation import samples

    samples.run(line.config, flags.checkpoint, flags.prompt, out, flags.samples, flags.seed)

  return command_line.exit_on_mistake(command)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

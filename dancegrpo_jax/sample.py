"""Command: images or clips from a base model or a checkpoint.

    python -m dancegrpo_jax.sample --checkpoint=runs/emoji_clip \\
      --prompt="a red apple on a blue background" --out=out/
"""

import argparse
import sys
from pathlib import Path

from dancegrpo_jax.checkpoints import flag
from dancegrpo_jax.devices import accelerator, interrupts
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.settings import command_line


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of this command."""
  flag.add(parser, default="base", base="; base (the default) is the model of --config")
  parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
  parser.add_argument(
    "--prompts", action="append", default=[], metavar="FILE", help="a prompts file; likewise"
  )
  parser.add_argument("--out", required=True, help="folder for the samples and grid.png")
  parser.add_argument("--samples", type=int, default=4, help="samples of each prompt")
  parser.add_argument("--seed", type=int, default=0, help="seed of the initial noise")


def main(argv: list[str]) -> int:
  """Reads the flags and samples. Returns the exit code, 2 for a mistake."""

  def command() -> None:
    description = "Sample images or clips from a base model or a checkpoint."
    line = command_line.parse_argv(argv, description, add_flags, flag.config_of)
    flags = line.flags
    check(flags)
    out = Path(flags.out)
    if flags.config:
      accelerator.start()
    command_line.require_writable(f"--out={flags.out}", out)
    # Imported now: JAX takes a second, and a misspelt flag should be answered at once.
    from dancegrpo_jax.evaluation import samples
    from dancegrpo_jax.report.progress import Progress

    with Progress():
      samples.run(
        line.config, flags.checkpoint, flags.prompt, flags.prompts, out, flags.samples, flags.seed
      )

  return command_line.exit_on_mistake(command)


def check(flags: argparse.Namespace) -> None:
  """Raises ConfigError where flags have values that can't be used."""
  if not flags.prompt and not flags.prompts:
    raise ConfigError("nothing to draw; give --prompt=TEXT or --prompts=FILE, as often as you like")
  if flags.samples < 1:
    raise ConfigError(f"--samples={flags.samples}: must be at least 1")
  if not -(2**31) <= flags.seed < 2**31:
    raise ConfigError(f"--seed={flags.seed}: must be a whole number of 32 bits, as 0")


if __name__ == "__main__":
  interrupts.watch()
  sys.exit(main(sys.argv[1:]))

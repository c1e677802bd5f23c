"""Command: scores of a checkpoint beside those of its base model, on prompts and noise that
training never sees.

    python -m dancegrpo_jax.evaluate --checkpoint=runs/emoji_clip \\
      --out=runs/emoji_clip/evaluation.json
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
  flag.add(parser, default=None, base="; base is the model of --config")
  parser.add_argument(
    "--prompts", action="append", help="prompt files; default: data.prompts and data.held_out"
  )
  parser.add_argument(
    "--out", required=True, help="JSON file; a folder of its name gets the images"
  )


def main(argv: list[str]) -> int:
  """Reads the flags and evaluates. Returns the exit code, 2 for a mistake."""

  def command() -> None:
    description = "Score a checkpoint beside its base model."
    line = command_line.parse_argv(argv, description, add_flags, flag.config_of)
    flags, data = line.flags, line.config.data
    out = Path(flags.out)
    if flags.config:
      accelerator.start()
    if out.suffix != ".json":
      raise ConfigError(
        f"--out={flags.out}: must end with .json; the images go into the folder of that name"
        " without it"
      )
    command_line.require_writable(f"--out={flags.out}", out.parent)
    files = flags.prompts or [file for file in (data.prompts, data.held_out) if file]
    # Imported now: JAX takes a second, and a misspelt flag should be answered at once.
    from dancegrpo_jax.evaluation import comparison
    from dancegrpo_jax.report.progress import Progress

    with Progress():
      comparison.run(line.config, flags.checkpoint, files, out)

  return command_line.exit_on_mistake(command)


if __name__ == "__main__":
  interrupts.watch()
  sys.exit(main(sys.argv[1:]))

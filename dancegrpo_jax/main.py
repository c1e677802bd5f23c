"""Command: train.

    python -m dancegrpo_jax.main --config=configs/emoji_clip.py [--config.key=value ...] \\
      [--workdir=DIR] [--dry-run]

A run of several processes needs --coordinator=HOST:PORT --num-processes=N --process-id=I for each
of them, except on a TPU pod and under Slurm.
"""

import argparse
import sys
from pathlib import Path

from dancegrpo_jax import buckets
from dancegrpo_jax.devices import accelerator, interrupts, processes, workdir_lock
from dancegrpo_jax.settings import command_line, stored_config


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of this command."""
  parser.add_argument(
    "--workdir",
    help="a folder, or gs://BUCKET/NAME; default: runs/<config name>; running again on it resumes",
  )
  parser.add_argument(
    "--init-from",
    "--init_from",
    dest="config.init_from",
    metavar="WORKDIR[@ITERATION]",
    help="start a new run from the weights of another one; sets config.init_from",
  )
  parser.add_argument(
    "--dry-run",
    "--dry_run",
    dest="dry_run",
    action="store_true",
    help="check everything that the run needs, and train nothing; exit code 0 means ready",
  )
  processes.add_flags(parser)


def main(argv: list[str]) -> int:
  """Reads the flags and trains. Returns the exit code: 2 for a mistake, 130 after Ctrl-C."""

  def command() -> int:
    line = command_line.parse_argv(argv, "GRPO post-training of an image generator.", add_flags)
    accelerator.start()
    # Imported now: JAX takes a second, and a misspelt flag should be answered at once.
    from dancegrpo_jax import train
    from dancegrpo_jax.dry_run import run as dry_run
    from dancegrpo_jax.training import bucket_workdir

    processes.start(line.flags)  # before anything touches a device
    processes.require_same(
      stored_config.digest(line.config),
      problem="the processes have different configs",
      remedy="start all of them with the same --config, --config.key and files",
    )
    name = line.flags.workdir or f"runs/{line.config.name}"
    if line.flags.dry_run:
      buckets.require_path("--workdir", name, remote=True)
      with bucket_workdir.looked_at(name) as workdir:
        return dry_run.run(line.config, workdir, line.given)
    command_line.require_writable(f"--workdir={name}", Path(name), remote=True)
    with workdir_lock.held(name), bucket_workdir.opened(name) as workdir:
      return train.run(line.config, workdir, line.given)

  return command_line.exit_on_mistake(command)


if __name__ == "__main__":
  interrupts.watch()
  sys.exit(main(sys.argv[1:]))

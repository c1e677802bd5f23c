"""Command: compile every program of a run ahead of time, without weights, for a named topology or
the local devices.

    python -m dancegrpo_jax.plan --config=configs/flux_hps.py --topology=v5p:4x4x4 [--out=FILE.json]

Says what each program takes of a device's memory, what it computes and sends, and how long the run
may last. Nothing runs: the numbers are the compiler's, and the time is an estimate (see `row_of`).
Exit code 1 where it doesn't fit, 2 for a mistake.

For NVIDIA GPUs (--topology=h100:8 where JAX's CUDA plugin is installed, or without --topology on a
machine that has them) there are no times: XLA states no cycles for them. The memory limit is the
92 % of a card that a run would take. This command has not been tried on a machine with a GPU; there
XLA times kernels on the card while it compiles, so no other program should be using it.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dancegrpo_jax.devices import accelerator
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.plan import table
from dancegrpo_jax.plan.planning import plan
from dancegrpo_jax.settings import command_line


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of this command."""
  parser.add_argument(
    "--topology", default="", help="as v5p:4x4x4, v5e:2x4 or h100:8; default: the local devices"
  )
  parser.add_argument(
    "--out",
    default="",
    help="JSON file for the numbers; one of the same config and topology is completed",
  )
  parser.add_argument("--hlo", default="", help="folder for the compiled programs' text")
  parser.add_argument("--only", default="", help="programs, as update,rollout; default: all")
  parser.add_argument(
    "--effort", default="0", help="of the compiler, -1 to 1; -1: convolutions in seconds"
  )


def run(
  config: Any, topology: str, out: str, hlo: str = "", only: str = "", effort: str = "0"
) -> int:
  """Plans, tells and writes; returns the exit code. ConfigError as `plan`."""
  try:
    level = float(effort)
  except ValueError:
    level = float("nan")
  if not -1 <= level <= 1:
    raise ConfigError(f"--effort={effort}: must be a number from -1 (compile quickly) to 1")
  if out and Path(out).suffix != ".json":
    raise ConfigError(f"--out={out}: must end with .json")
  file = Path(out)
  if out:
    command_line.require_writable(f"--out={out}", file.parent)
  if hlo:
    command_line.require_writable(f"--hlo={hlo}", Path(hlo))
  for result in plan(config, topology, folder=hlo, only=only, effort=level):
    if out and file.exists():
      result = table.merged(table.read_out(file), result)
    result = table.concluded(result)
    if (
      out and result["rows"]
    ):  # program by program: compiling takes minutes, and what is there outlasts an interruption
      file.parent.mkdir(parents=True, exist_ok=True)
      written = file.with_suffix(".tmp")
      written.write_text(json.dumps(result, indent=1) + "\n")
      written.replace(file)
  print(table.report(result))
  return 1 if result["problems"] else 0


def main(argv: list[str]) -> int:
  """Reads the flags and plans; returns the exit code: 0 it fits, 1 it doesn't, 2 for a mistake."""

  def command() -> int:
    line = command_line.parse_argv(argv, "Compile a run's programs ahead of time.", add_flags)
    accelerator.start()  # so that it counts with the memory that a run has
    flags = line.flags
    return run(line.config, flags.topology, flags.out, flags.hlo, flags.only, flags.effort)

  return command_line.exit_on_mistake(command)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

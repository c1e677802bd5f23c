"""Command: compile every program of a run ahead of time, without weights, for a named topology or
the local devices.

    python -m dancegrpo_jax.plan --config=configs/flux_hps.py --topology=v5p:4x4x4 [--out=FILE.json]

It prints how much of a device's memory each program takes, what it computes and sends, and how long
the run may last. Nothing is executed: the numbers are the compiler's, and times are estimates (see
`planning.row_of`). The exit code is 1 if the run does not fit, and 2 for a mistake.

For NVIDIA GPUs (--topology=h100:8 where JAX's CUDA plugin is installed, or without --topology on a
machine that has them) there are no times, because XLA states no cycles for them. The memory limit
is the 92 % of a card that a run takes. This command has not been tried on a machine with a GPU. XLA
times kernels on the card while it compiles, so no other program should use it meanwhile.
"""

from dancegrpo_jax.devices import interrupts

if __name__ == "__main__":
  interrupts.watch()  # before the imports below, which take seconds

import argparse
import sys
from pathlib import Path
from typing import Any

from dancegrpo_jax import strict_json
from dancegrpo_jax.devices import accelerator
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.plan import table
from dancegrpo_jax.plan.planning import plan
from dancegrpo_jax.report.progress import Progress
from dancegrpo_jax.settings import command_line


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of this command."""
  parser.add_argument(
    "--topology", default="", help="as v5p:4x4x4, v5e:2x4 or h100:8; default: the local devices"
  )
  parser.add_argument(
    "--out",
    default="",
    help="JSON file for the numbers; one of the same config and topology is completed",
  )
  parser.add_argument("--hlo", default="", help="folder for the compiled programs' text")
  parser.add_argument(
    "--only", default="", help="the programs to compile, as update,rollout; default: all"
  )
  parser.add_argument(
    "--effort",
    default="0",
    help="the compiler's effort, -1 to 1; with -1 convolutions compile in seconds",
  )


def run(
  config: Any, topology: str, out: str, hlo: str = "", only: str = "", effort: str = "0"
) -> int:
  """Compiles, prints the plan, and writes it to a file.

  Args:
    config, topology, only: as for `planning.plan`.
    out: the JSON file, "" for none.
    hlo: folder for the programs' text, "" for none.
    effort: as for `planning.compile_call`, as text.

  Returns:
    The exit code: 0 if the run fits, 1 if it does not.

  Raises:
    ConfigError: a mistake in an argument.
  """
  level = _effort(effort)
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
    # Written after every program: compiling takes minutes, and an interruption should lose little.
    if out and result["rows"]:
      file.parent.mkdir(parents=True, exist_ok=True)
      partial = file.with_suffix(".tmp")
      partial.write_text(strict_json.dumps(result, indent=1) + "\n")
      partial.replace(file)
  print(table.report(result))
  return 1 if result["problems"] else 0


def _effort(text: str) -> float:
  """The value of --effort."""
  try:
    effort = float(text)
  except ValueError:
    effort = float("nan")
  if not -1 <= effort <= 1:
    raise ConfigError(f"--effort={text}: must be a number from -1 (compile quickly) to 1")
  return effort


def main(argv: list[str]) -> int:
  """Reads the flags and plans. Returns the exit code: 0 fits, 1 does not fit, 2 for a mistake."""

  def command() -> int:
    line = command_line.parse_argv(argv, "Compile a run's programs ahead of time.", add_flags)
    accelerator.start()  # sets the memory that a run would have
    flags = line.flags
    with Progress():
      return run(line.config, flags.topology, flags.out, flags.hlo, flags.only, flags.effort)

  return command_line.exit_on_mistake(command)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

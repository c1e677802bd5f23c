"""The command `dancegrpo COMMAND ...`, which runs every command of this package.

`dancegrpo train --config=emoji_clip` does the same as `python -m dancegrpo_jax.main
--config=emoji_clip`. The module of a command is imported only when the command runs, so that --help
and --version answer at once.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from dancegrpo_jax import __version__
from dancegrpo_jax.devices import interrupts
from dancegrpo_jax.settings.suggestions import did_you_mean


class Command(NamedTuple):
  """A subcommand: the module whose `main(argv)` runs it, and one line about it."""

  module: str
  summary: str


COMMANDS = {
  "train": Command("main", "post-train a generator; running again on a workdir resumes"),
  "sample": Command("sample", "images from a base model or a checkpoint"),
  "evaluate": Command("evaluate", "scores of a checkpoint next to its base model's"),
  "convert": Command("convert.__main__", "export, import or inspect checkpoints"),
  "pretrain": Command("pretrain.__main__", "make the embedded emoji models"),
  "plan": Command("plan.__main__", "compile a run ahead of time: does it fit, how long it takes"),
}
HELP = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a subcommand.

  Args:
    argv: the subcommand and its arguments. None means the arguments of the process.

  Returns:
    The exit code of the subcommand, or 2 if it is missing or unknown.
  """
  if argv is None:
    interrupts.watch()
  name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
  if name in HELP:
    print(_help())
    return 0
  if name == "--version":
    print(f"dancegrpo {__version__}")
    return 0
  if name not in COMMANDS:
    print(f"error: {_unknown(name)}", file=sys.stderr)
    return 2
  if not sys.flags.safe_path and os.getcwd() not in sys.path:
    # `python -m` does the same. A reward `my_module:function` may be in the working folder.
    sys.path.insert(0, os.getcwd())
  sys.argv = [f"dancegrpo {name}", *rest]  # usage lines begin with argv[0]
  return importlib.import_module(f"dancegrpo_jax.{COMMANDS[name].module}").main(rest)


def _help() -> str:
  width = max(map(len, COMMANDS))
  lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
  return "\n".join(
    [
      "usage: dancegrpo COMMAND [--config=FILE[:preset]] [--config.key=value ...] [flags]",
      "       dancegrpo COMMAND --help | --help | --version",
      "",
      "GRPO post-training for image and video generators. Commands:",
      *lines,
    ]
  )


def _unknown(name: str) -> str:
  if not name:
    return f"a command is missing; give one of {', '.join(COMMANDS)}, or --help"
  near = did_you_mean(name, list(COMMANDS))
  return f"unknown command {name!r}{near or '; one of ' + ', '.join(COMMANDS)}"

"""Command: `dancegrpo COMMAND ...`, every command of this package under one name.

`dancegrpo train --config=emoji_clip` is `python -m dancegrpo_jax.main --config=emoji_clip`. A
command's module is imported when it is asked for, so that --help and --version answer at once.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from dancegrpo_jax import __version__


class Command(NamedTuple):
  """A subcommand: the module whose `main(argv)` it is, and a line on what it does."""

  module: str
  summary: str


COMMANDS = {
  "train": Command("main", "post-train a generator; running again on a workdir resumes"),
  "sample": Command("sample", "images from a base model or a checkpoint"),
  "evaluate": Command("evaluate", "scores of a checkpoint next to its base model's"),
  "convert": Command("convert.__main__", "checkpoints out (export), in (import), looked into"),
  "pretrain": Command("pretrain.__main__", "make the embedded emoji models"),
  "plan": Command("plan.__main__", "compile a run ahead of time: does it fit, how long it takes"),
}
HELP = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a subcommand.

  Args:
    argv: the subcommand and its arguments; default: the process's own.

  Returns:
    The exit code: the subcommand's own, 2 for a missing or unknown one.
  """
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
    # As `python -m` does: a reward `my_module:function` may lie in the working folder.
    sys.path.insert(0, os.getcwd())
  sys.argv = [f"dancegrpo {name}", *rest]  # the name in usage lines
  return importlib.import_module(f"dancegrpo_jax.{COMMANDS[name].module}").main(rest)


def _help() -> str:
  width = max(map(len, COMMANDS))
  lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
  return "\n".join(
    [
      "usage: dancegrpo COMMAND [--config=FILE[:preset]] [--config.key=value ...] [flags]",
      "       dancegrpo COMMAND --help | --help | --version",
      "",
      "GRPO post-training for image generators. Commands:",
      *lines,
    ]
  )


def _unknown(name: str) -> str:
  if not name:
    return f"a command is missing; give one of {', '.join(COMMANDS)}, or --help"
  from dancegrpo_jax.settings.config_file import did_you_mean

  near = did_you_mean(name, list(COMMANDS))
  return f"unknown command {name!r}{near or '; one of ' + ', '.join(COMMANDS)}"

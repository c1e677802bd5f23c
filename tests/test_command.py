"""`dancegrpo COMMAND ...`: its own answers, and that each command runs its module."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from dancegrpo_jax import __version__, command

ROOT = Path(__file__).parent.parent

FOLDERS = ["main", "sample", "evaluate", "convert", "pretrain", "plan"]  # the names for `python -m`


def test_every_command_is_there():
  modules = [entry.module.removesuffix(".__main__") for entry in command.COMMANDS.values()]
  assert modules == FOLDERS
  for entry in command.COMMANDS.values():
    assert callable(importlib.import_module(f"dancegrpo_jax.{entry.module}").main)


@pytest.mark.parametrize("name", command.COMMANDS)
def test_a_command_gets_its_arguments(name, monkeypatch):
  module = importlib.import_module(f"dancegrpo_jax.{command.COMMANDS[name].module}")
  given = []
  monkeypatch.setattr(module, "main", lambda argv: given.extend(argv) or 7)
  monkeypatch.setattr("sys.argv", ["dancegrpo"])
  monkeypatch.setattr("sys.path", list(sys.path))
  assert command.main([name, "--config=x", "--flag"]) == 7 and given == ["--config=x", "--flag"]
  assert sys.argv[0] == f"dancegrpo {name}"


@pytest.mark.parametrize(
  "argv, answer",
  [
    ([], "a command is missing; give one of train, sample, evaluate, convert, pretrain, plan"),
    (["trian"], "unknown command 'trian'; did you mean 'train'?"),
    (["--confg=x"], "unknown command '--confg=x'"),
    (["qqq"], "unknown command 'qqq'; one of train, sample"),
  ],
)
def test_a_mistake_is_one_line(argv, answer, capsys):
  assert command.main(argv) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f"error: {answer}")


def test_help_names_every_command(capsys):
  assert command.main(["--help"]) == 0
  text = capsys.readouterr().out
  assert not [name for name in command.COMMANDS if f"  {name} " not in text]


def python(*words: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False
  )


def test_as_a_process():
  """--version imports no large library, and usage lines have the name that was typed."""
  code = "import sys; from dancegrpo_jax.command import main; main(['--version']);"
  done = python(
    "-c", code + "print([m for m in ('jax', 'numpy', 'ml_collections') if m in sys.modules])"
  )
  assert done.stdout == f"dancegrpo {__version__}\n[]\n", done.stderr
  done = python("-m", "dancegrpo_jax", "train", "--help")
  assert done.stdout.startswith("usage: dancegrpo train --config="), done.stderr
  done = python("-m", "dancegrpo_jax.convert", "--help")
  assert done.stdout.startswith("usage: python -m dancegrpo_jax.convert "), done.stderr
  done = python("-m", "dancegrpo_jax", "train", "--config=emoji_clip", "--config.seed=x")
  assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "config.seed=x" in done.stderr

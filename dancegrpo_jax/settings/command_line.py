"""The command line of every command: `--config=FILE[:preset] [--config.key=value ...]`, and the
flags of that command alone.

Every mistake is a `ConfigError` with a message for the user. Commands print it and exit with 2.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from dancegrpo_jax import buckets, installation
from dancegrpo_jax.devices import out_of_memory
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.settings import config_file, field_comments, suggestions
from dancegrpo_jax.settings.config_file import load, overridden, spell
from dancegrpo_jax.settings.shortened import shortened
from dancegrpo_jax.settings.stored_config import flatten

_DASHES = "-\N{EN DASH}\N{EM DASH}\N{MINUS SIGN}"  # word processors write the last three


class CommandLine(NamedTuple):
  """The arguments of a command.

  Attributes:
    config: the config with its overrides applied.
    flags: the flags of the command alone.
    given: fields of the config that were set on the command line, as "sampler.steps".
  """

  config: ConfigDict
  flags: argparse.Namespace
  given: frozenset[str] = frozenset()


class _Parser(argparse.ArgumentParser):
  """argparse that raises ConfigError instead of printing its usage and exiting."""

  def error(self, message: str):
    raise ConfigError(f"{message}; see --help")


def parse_argv(
  argv: Sequence[str],
  description: str,
  add_flags: Callable[[argparse.ArgumentParser], object] | None = None,
  stored: Callable[[argparse.Namespace], ConfigDict | None] | None = None,
) -> CommandLine:
  """Reads a command's arguments. All commands share --config, --config.key=value and --help.

  Args:
    argv: arguments without the program's name (`sys.argv[1:]`).
    description: the first line of --help.
    add_flags: adds the flags of the command alone to the parser. A flag whose `dest` is
      "config.<field>" sets that field.
    stored: the config where --config is not given, from the other flags; None where these name
      none.

  Returns:
    The command line.

  Raises:
    SystemExit: 0 after --help, which also prints every field and its value if --config is given.
    ConfigError: an unknown flag, no --config, or an error of `config_file.load`.
  """
  parser = _Parser(
    description=description,
    add_help=False,
    allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    prog=program(),
    usage=f"%(prog)s {'[--config=FILE[:preset]]' if stored else '--config=FILE[:preset]'}"
    " [--config.key=value ...] [flags]",
  )
  parser.add_argument(
    "--config",
    metavar="FILE[:preset]",
    help="python file with get_config(preset), or the name of one in configs/",
  )
  parser.add_argument(
    "-h",
    "--help",
    action="store_true",
    help="show this; with --config also every field, its value and its meaning",
  )
  if add_flags is not None:
    add_flags(parser)
  wants_help = any(flag in argv for flag in ("-h", "--help"))
  if wants_help:  # not parsed, because a required flag may be missing
    flags, rest = argparse.Namespace(config=config_flag(argv)), list(argv)
  else:
    flags, rest = parser.parse_known_args(argv)
  overrides, unknown = _split_overrides(rest)
  if wants_help:
    parser.epilog = _help_fields(flags.config, overrides)
    parser.print_help()
    raise SystemExit(0)
  if unknown:
    known = [option for action in parser._actions for option in action.option_strings]
    fields = _fields(flags.config)
    raise ConfigError("\n".join(_unknown(word, known, fields) for word in _joined(unknown)))
  given = {override.partition("=")[0] for override in overrides}
  for name, value in vars(flags).items():
    field = name.removeprefix("config.")
    if field == name or value is None:
      continue
    if field in given:
      raise ConfigError(f"--config.{field} is set by a flag of its own too; give one of them")
    overrides.append(f"{field}={value}")
    given.add(field)
  if flags.config:
    config = load(flags.config, overrides)
  elif stored and (found := stored(flags)) is not None:
    config = overridden(found, overrides)
  else:
    workdir = ", or a run's workdir, as --checkpoint=runs/emoji_clip" if stored else ""
    raise ConfigError(
      f"--config is missing; give a file or a name, as --config=emoji_clip{workdir}"
    )
  config, lines = shortened(config)
  for line in lines:
    print(f"note: {line}", file=sys.stderr)
  return CommandLine(config=config, flags=flags, given=frozenset(given))


def program() -> str:
  """How this process was started, for the usage line: "dancegrpo train", or "python -m MODULE"."""
  spec = getattr(sys.modules["__main__"], "__spec__", None)
  module = spec.name.removesuffix(".__main__") if spec else ""
  by_module = module.startswith("dancegrpo_jax.")
  return f"python -m {module}" if by_module else os.path.basename(sys.argv[0])


def exit_on_mistake(command: Callable[[], int | None]) -> int:
  """Runs a command and returns its exit code.

  A ConfigError, which running out of memory becomes too, is printed on stderr without a traceback,
  and the exit code is 2. Other exceptions pass.
  """
  try:
    with out_of_memory.named(""):
      return command() or 0
  except ConfigError as error:
    for line in str(error).splitlines():
      print(f"error: {line}", file=sys.stderr)
    return 2


def require_writable(flag: str, folder: Path, remote: bool = False) -> None:
  """Checks that a folder can be made and written to, without making it.

  Args:
    flag: the flag that names the folder, as "--workdir=runs/x".
    folder: the folder.
    remote: whether it may be in a bucket, which is not looked at here.

  Raises:
    ConfigError: part of the path is a file, there is no permission to write, or it is a URL that
      can't be used.
  """
  label, _, name = flag.partition("=")
  buckets.require_path(label, name, remote)
  if buckets.is_url(name):
    return
  place = next(path for path in (folder, *folder.parents) if path.exists())
  if not place.is_dir():
    raise ConfigError(f"{flag}: {place} is not a folder; use another one")
  if not os.access(place, os.W_OK):
    raise ConfigError(f"{flag}: no permission to write into {place}; use another folder")


def config_flag(argv: Sequence[str]) -> str:
  """The value of --config, "" where it is not given."""
  for i, word in enumerate(argv):
    if word.startswith("--config="):
      return word.removeprefix("--config=")
    if word == "--config" and i + 1 < len(argv):
      return argv[i + 1]
  return ""


def _split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
  """Splits arguments into overrides, as "key=value", and words that are none.

  An override is written as --config.key=value or as --config.key value.
  """
  overrides, unknown = [], []
  words = list(words)
  while words:
    word = words.pop(0)
    if not word.startswith("--config."):
      unknown.append(word)
      continue
    if "=" not in word and words and not words[0].startswith("--"):
      word = f"{word}={words.pop(0)}"
    overrides.append(word.removeprefix("--config."))
  return overrides, unknown


def _joined(words: Sequence[str]) -> list[str]:
  """Words of which a flag and its value are one: ["--lr", "1"] becomes ["--lr=1"]."""
  joined: list[str] = []
  for word in words:
    is_flag = word.startswith("-") and not word[1:2].isdigit()
    if joined and joined[-1].startswith("--") and "=" not in joined[-1] and not is_flag:
      joined[-1] += f"={word}"
    else:
      joined.append(word)
  return joined


def _fields(path: str | None) -> list[str]:
  """The fields of a config, for a message about something else; [] where it can't be read."""
  try:
    return list(flatten(load(path))) if path else []
  except ConfigError:
    return []


def _unknown(word: str, known: Sequence[str], fields: Sequence[str]) -> str:
  """The line about an argument that the command doesn't have.

  Args:
    word: as it was written, with its value.
    known: the command's flags.
    fields: of the config.
  """
  written, _, value = word.lstrip(_DASHES).partition("=")
  dashes = len(word) - len(word.lstrip(_DASHES))
  name = written.removeprefix("config.")
  end = f"={value}" if value else ""
  line = f"unknown argument {word!r}"
  if dashes < 2 and (written == "config" or f"--{written}" in known):
    return f"{line}; write it with two dashes, --{written}{end}"
  if name != written and dashes < 2:
    return f"{line}; a field is set with two dashes in front, --config.{name}{end}"
  if not dashes and not end and re.search(r"\.py(:\w*)?$", written):
    return f"{line}; a config is given as --config={written}"
  meant = suggestions.fields_called(name, fields)
  near = difflib.get_close_matches(written, [flag.lstrip("-") for flag in known], n=1)
  if not meant and near:
    return f"{line}; did you mean '--{near[0]}'?"
  meant = meant or suggestions.fields_like(name, fields, cutoff=0.75)
  if meant:
    return f"{line}; did you mean {' or '.join(f'--config.{field}' for field in meant[:3])}?"
  return f"{line}; --help lists the flags, and with --config the fields"


def _help_fields(path: str, overrides: list[str]) -> str:
  """The end of --help: every field of the config and its value."""
  if not path:
    return (
      "Fields are set as --config.rollout.samples_per_prompt=8; add --config=FILE to see them all."
    )
  fields = {field: spell(value) for field, value in flatten(load(path, overrides)).items()}
  common = installation.find("configs/common.py").read_text()
  known = field_comments.meanings([common, config_file.source(path)])
  return "\n".join([f"fields of {path}:", *field_comments.listing(fields, known)])

"""The command line and the config: load, override, compare, store.

The contract is `--config=FILE[:preset] [--config.key=value ...]`: FILE is Python with `get_config(preset="")`, which returns
a ConfigDict that holds every value; a `PRESETS` in the file lists the presets it knows. An override takes the type of the value
that it replaces. Every mistake is a `ConfigError`, whose text is meant for the user: commands print it and exit with 2.
"""

import argparse
import ast
import difflib
import hashlib
import importlib.util
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

# What a resumed run may change: where and how fast it computes and what it writes, never what it computes (design, section 6).
RESUMABLE = (
  "iterations", "mesh", "rollout.chunk", "optimizer.microbatch", "logging", "checkpoint", "evaluation", "data.cache_embeddings",
  "data.cache_folder",
)  # fmt: skip

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_ABSENT = "(absent)"


class ConfigError(ValueError):
  """A mistake of the user: one line a problem, each naming the field, its value and the remedy."""


class CommandLine(NamedTuple):
  """What a command was asked: the config with overrides applied, and the command's own flags."""

  config: ConfigDict
  flags: argparse.Namespace


class Difference(NamedTuple):
  """One field in which two configs differ; str() is the line to print."""

  field: str
  old: Any
  new: Any

  def __str__(self) -> str:
    return f"config.{self.field}: {self.old!r} -> {self.new!r}"


# Command line


class _Parser(argparse.ArgumentParser):
  """argparse that raises ConfigError instead of printing its usage and exiting."""

  def error(self, message: str):
    raise ConfigError(f"{message}; see --help")


def parse_argv(
  argv: Sequence[str], description: str, add_flags: Callable[[argparse.ArgumentParser], object] | None = None
) -> CommandLine:
  """Reads a command's arguments; all commands share --config, --config.key=value and --help.

  Args:
    argv: arguments without the program's name (`sys.argv[1:]`).
    description: the first line of --help.
    add_flags: adds the command's own flags to the parser.

  Returns:
    CommandLine. --help prints (with --config also every field and its value) and exits 0.

  Raises:
    ConfigError: unknown flag (with a did-you-mean), no --config, or whatever `load` raises.
  """
  parser = _Parser(
    description=description, add_help=False, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    usage="%(prog)s --config=FILE[:preset] [--config.key=value ...] [flags]",
  )  # fmt: skip
  parser.add_argument("--config", metavar="FILE[:preset]", help="python file with get_config(preset)")
  parser.add_argument("-h", "--help", action="store_true", help="show this; with --config also every field and its value")
  if add_flags is not None:
    add_flags(parser)
  wants_help = any(flag in argv for flag in ("-h", "--help"))
  if wants_help:  # before parsing, so that a missing required flag doesn't hide the help
    flags, rest = argparse.Namespace(config=_config_flag(argv)), list(argv)
  else:
    flags, rest = parser.parse_known_args(argv)
  overrides, unknown = _split_overrides(rest)
  if wants_help:
    parser.epilog = _help_fields(flags.config, overrides)
    parser.print_help()
    raise SystemExit(0)
  if unknown:
    known = [option for action in parser._actions for option in action.option_strings]
    raise ConfigError("\n".join(f"unknown argument {word!r}{_did_you_mean(word.split('=')[0], known)}" for word in unknown))
  if not flags.config:
    raise ConfigError("--config is missing; give a file, as --config=configs/emoji_clip.py")
  return CommandLine(load(flags.config, overrides), flags)


def exit_on_mistake(command: Callable[[], int | None]) -> int:
  """Runs a command; a ConfigError, or too little memory, becomes lines on stderr and exit status 2.

  There is no traceback then; any other exception comes out.
  """
  from dancegrpo_jax.runtime import out_of_memory  # here, because it imports this module

  try:
    with out_of_memory.named(""):
      return command() or 0
  except ConfigError as error:
    for line in str(error).splitlines():
      print(f"error: {line}", file=sys.stderr)
    return 2


def require_writable(flag: str, folder: Path) -> None:
  """ConfigError where a folder can't be made or written to; makes nothing. `flag` as it was given, --workdir=runs/x."""
  place = next(path for path in (folder, *folder.parents) if path.exists())
  if not place.is_dir():
    raise ConfigError(f"{flag}: {place} is not a folder; use another one")
  if not os.access(place, os.W_OK):
    raise ConfigError(f"{flag}: no permission to write into {place}; use another folder")


def _config_flag(argv: Sequence[str]) -> str:
  for i, word in enumerate(argv):
    if word.startswith("--config="):
      return word.removeprefix("--config=")
    if word == "--config" and i + 1 < len(argv):
      return argv[i + 1]
  return ""


def _split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
  """Splits into overrides ("key=value", from --config.key=value or --config.key value) and words that nobody knows."""
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


def _help_fields(path: str, overrides: list[str]) -> str:
  if not path:
    return "Fields are set as --config.rollout.samples_per_prompt=8; add --config=FILE to see them all."
  fields = flatten(load(path, overrides))
  return "\n".join([f"fields of {path}:"] + [f"  --config.{key}={_spell(value)}" for key, value in fields.items()])


# Loading


def load(path_with_preset: str, overrides: Sequence[str] = ()) -> ConfigDict:
  """The config of FILE[:preset] with overrides ("key=value") applied, locked.

  Raises:
    ConfigError: no such file, no get_config, unknown preset, unknown key, or a value of the wrong type; every bad override
      is named.
  """
  path, preset = _split_preset(path_with_preset)
  module = _import(path)
  if not hasattr(module, "get_config"):
    raise ConfigError(f"--config={path}: the file has no get_config(preset=''); copy one of configs/")
  presets = getattr(module, "PRESETS", None)
  if preset and presets is not None and preset not in presets:
    known = ", ".join(filter(None, presets))
    raise ConfigError(f"--config={path}:{preset}: unknown preset; {path} has {known}{_did_you_mean(preset, list(presets))}")
  if not inspect.signature(module.get_config).parameters:
    if preset:
      raise ConfigError(f"--config={path}:{preset}: {path} has no presets; leave out ':{preset}'")
    config = module.get_config()
  else:
    config = module.get_config(preset)
  problems = [problem for override in overrides if (problem := _override(config, override))]
  if problems:
    raise ConfigError("\n".join(problems))
  return config.lock()


def _split_preset(path_with_preset: str) -> tuple[str, str]:
  path, _, preset = path_with_preset.rpartition(".py:")
  return (f"{path}.py", preset) if path else (path_with_preset, "")


def _import(path: str) -> ModuleType:
  """Executes a config file; its folder and the one above are importable meanwhile (`from configs import common`)."""
  file = Path(path)
  if not file.is_file():
    siblings = sorted(other.name for other in file.parent.glob("*.py")) if file.parent.is_dir() else []
    remedy = _did_you_mean(file.name, siblings) or (f"; {file.parent}/ has {', '.join(siblings)}" if siblings else "")
    raise ConfigError(f"--config={path}: no such file{remedy}")
  spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
  module = importlib.util.module_from_spec(spec)
  folders = [str(file.resolve().parent.parent), str(file.resolve().parent)]
  sys.path[:0] = folders
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    line = error.lineno if isinstance(error, SyntaxError) else _line_in(file, error)
    raise ConfigError(f"--config={path}: line {line}: {type(error).__name__}: {error}") from error
  finally:
    for folder in folders:
      sys.path.remove(folder)
  return module


def _line_in(file: Path, error: Exception) -> int:
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
  return lines[-1] if lines else 0


def _override(config: ConfigDict, override: str) -> str | None:
  """Applies "key=value" in place; returns a problem's line, or None."""
  key, equals, text = override.partition("=")
  fields = flatten(config)
  if not equals:
    return f"--config.{key}: no value; write --config.{key}=VALUE"
  if key not in fields:
    inside = [field for field in fields if field.startswith(f"{key}.")]
    if inside:
      return f"--config.{key}: this is a section; set one of its fields: {', '.join(inside)}"
    return f"--config.{key}: unknown key{_did_you_mean_key(key, list(fields))}"
  try:
    value = _parse(text, fields[key])
  except (ValueError, SyntaxError):
    kind = type(fields[key]).__name__
    return f"--config.{key}={text}: not a value of type {kind}; write it as --config.{key}={_spell(fields[key])}"
  *sections, leaf = key.split(".")
  for section in sections:
    config = config[section]
  with config.unlocked():
    config[leaf] = value
  return None


def _parse(text: str, present: Any) -> Any:
  """`text` as the type of `present`; raises ValueError or SyntaxError where it is none."""
  if isinstance(present, bool):
    if text.lower() not in _TRUE + _FALSE:
      raise ValueError(text)
    return text.lower() in _TRUE
  if isinstance(present, (int, float)):
    return type(present)(text)
  if isinstance(present, (tuple, list)):
    value = ast.literal_eval(text)
    if not isinstance(value, (tuple, list)):
      raise ValueError(text)
    return _tuples(value)
  return text


def _spell(value: Any) -> str:
  """A value as one would type it in a shell."""
  return f'"{value!r}"' if isinstance(value, (tuple, list)) else str(value)


def _did_you_mean(word: str, known: Sequence[str]) -> str:
  close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
  return f"; did you mean {close[0]!r}?" if close else ""


def _did_you_mean_key(key: str, fields: list[str]) -> str:
  """A misspelt path, or a right name in the wrong section."""
  leaf = key.split(".")[-1]
  close = [field for field in fields if field.split(".")[-1] == leaf] or difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
  if not close:
    leaves = {field.split(".")[-1]: field for field in fields}
    close = [leaves[match] for match in difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.5)]
  return f"; did you mean {' or '.join(close[:3])}?" if close else "; --help with --config lists every field"


# Values


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
  """Dotted path -> value, in the order of `config.items()` (ConfigDict sorts it)."""
  fields = {}
  for key, value in config.items():
    is_section = isinstance(value, (dict, ConfigDict))
    fields.update(flatten(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value})
  return fields


def _tuples(value: Any) -> Any:
  """Lists, at any depth, as tuples: JSON has no tuples, and configs hold nothing else."""
  if isinstance(value, dict):
    return {key: _tuples(item) for key, item in value.items()}
  return tuple(_tuples(item) for item in value) if isinstance(value, (tuple, list)) else value


def to_json(config: ConfigDict | dict) -> str:
  """JSON text with sorted keys: the same config is the same text."""
  values = config.to_dict() if isinstance(config, ConfigDict) else config
  return json.dumps(values, indent=2, sort_keys=True)


def from_json(text: str) -> ConfigDict:
  """The inverse of `to_json`: lists become tuples again."""
  return ConfigDict(_tuples(json.loads(text))).lock()


def digest(config: ConfigDict | dict) -> str:
  """16 hexadecimal digits that name the config's values."""
  return hashlib.sha256(to_json(config).encode()).hexdigest()[:16]


def differences(old: dict, new: ConfigDict) -> tuple[list[Difference], list[Difference]]:
  """Fields in which a stored config and a new one differ: those that a resumed run may change, and those it may not.

  A tuple equals a list of the same values, so `old` may come straight from JSON.
  """
  before, after = _tuples(flatten(old)), _tuples(flatten(new))
  allowed, refused = [], []
  for field in dict.fromkeys([*before, *after]):
    difference = Difference(field, before.get(field, _ABSENT), after.get(field, _ABSENT))
    if difference.old != difference.new:
      may_change = any(field == name or field.startswith(f"{name}.") for name in RESUMABLE)
      (allowed if may_change else refused).append(difference)
  return allowed, refused

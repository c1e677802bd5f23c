"""Config files: load one, and apply overrides to it.

A config file is Python with a function `get_config(preset="")` that returns a ConfigDict with every
value. A list `PRESETS` in the file names the presets that it knows. An override takes the type of
the value that it replaces.

A file is named by its path, or by its name alone where it is in the working folder, in `configs/`
there or among the configs that come with the package: `--config=emoji_clip:tiny` is
`--config=configs/emoji_clip.py:tiny`.
"""

import ast
import difflib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from dancegrpo_jax import installation
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.settings.stored_config import flatten, tuples

_FOLDER = Path("configs")  # where a name alone is looked up
_beside: list[str] = []  # in sys.path: the folders of the config file that was read last
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def load(path_with_preset: str, overrides: Sequence[str] = ()) -> ConfigDict:
  """The config of FILE[:preset] with overrides ("key=value") applied, locked.

  Args:
    path_with_preset: a path or a name, as the module's first lines say.
    overrides: applied in order.

  Raises:
    ConfigError: no such file, no get_config, unknown preset, unknown key, or a value of the wrong
      type; every bad override is named.
  """
  path, preset = _split_preset(path_with_preset)
  module = _import(path)
  if not hasattr(module, "get_config"):
    raise ConfigError(
      f"--config={path}: the file has no get_config(preset=''); copy one of"
      f" {installation.find(_FOLDER)}/"
    )
  presets = getattr(module, "PRESETS", None)
  if preset and presets is not None and preset not in presets:
    known = ", ".join(filter(None, presets))
    raise ConfigError(
      f"--config={path}:{preset}: unknown preset; {path} has"
      f" {known}{did_you_mean(preset, list(presets))}"
    )
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
  if path:
    return f"{path}.py", preset
  if path_with_preset.endswith(".py"):
    return path_with_preset, ""
  path, _, preset = path_with_preset.partition(":")
  return path, preset


def _file(path: str) -> Path:
  """The file that a path or a name means, absolute. ConfigError, with a near one: there is none."""
  asked = Path(path if path.endswith(".py") else f"{path}.py")
  candidates = [asked, _FOLDER / asked] if asked.parent == Path() else [asked]
  for file in map(installation.find, candidates):
    if file.is_file():
      return file.resolve()
  if not path.endswith(".py") and Path(path).is_file():
    raise ConfigError(f"--config={path}: must be a Python file, with a name that ends with .py")
  suffix = "" if path.endswith(".py") else ".py"  # names are told as they were asked for
  near, listed = (
    [name.removesuffix(suffix) for name in _names(file.parent)]
    for file in (candidates[0], candidates[-1])
  )
  remedy = did_you_mean(asked.name.removesuffix(suffix), near + listed) or (
    f"; {candidates[-1].parent}/ has {', '.join(listed)}" if listed else ""
  )
  raise ConfigError(f"--config={path}: no such file{remedy}")


def _names(folder: Path) -> list[str]:
  """The Python files of a folder: of the user's and of the one that comes with the package."""
  places = installation.places(folder)
  return sorted({file.name for place in places for file in place.glob("*.py")})


def _import(path: str) -> ModuleType:
  """Executes a config file. Its folder and the one above are importable: before anything else while
  it is read, after anything else until another file is, for what it names as "module:object". While
  it is read, so are the configs that come with the package where nothing else has the name: `from
  configs import common` works in a file of the user's, wherever it lies.
  """
  file = _file(path)
  spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
  assert spec is not None and spec.loader is not None, file  # None of names without .py
  module = importlib.util.module_from_spec(spec)
  folders = [str(file.parent.parent), str(file.parent)]
  sys.path[:] = [folder for folder in sys.path if folder not in _beside]
  last = [str(installation.ROOT)] if str(installation.ROOT) not in [*folders, *sys.path] else []
  sys.path[:] = [*folders, *sys.path, *last]
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    line = error.lineno if isinstance(error, SyntaxError) else _line_in(file, error)
    raise ConfigError(f"--config={path}: line {line}: {type(error).__name__}: {error}") from error
  finally:  # what the file itself added stays
    for folder in folders + last:
      sys.path.remove(folder)
  _beside[:] = [folder for folder in folders if folder not in sys.path]
  sys.path += _beside
  return module


def _line_in(file: Path, error: Exception) -> int:
  lines = [
    frame.lineno or 0
    for frame in traceback.extract_tb(error.__traceback__)
    if Path(frame.filename) == file
  ]
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
    return f"--config.{key}={text}: not a value of type {kind}; write it as --config.{key}={spell(fields[key])}"
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
    return tuples(value)
  return text


def spell(value: Any) -> str:
  """A value as one would type it in a shell."""
  return f'"{value!r}"' if isinstance(value, (tuple, list)) else str(value)


def did_you_mean(word: str, known: Sequence[str]) -> str:
  close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
  return f"; did you mean {close[0]!r}?" if close else ""


def _did_you_mean_key(key: str, fields: list[str]) -> str:
  """A misspelt path, or a right name in the wrong section."""
  leaf = key.split(".")[-1]
  close = [field for field in fields if field.split(".")[-1] == leaf] or difflib.get_close_matches(
    key, fields, n=1, cutoff=0.5
  )
  if not close:
    leaves = {field.split(".")[-1]: field for field in fields}
    close = [
      leaves[match] for match in difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.5)
    ]
  return (
    f"; did you mean {' or '.join(close[:3])}?"
    if close
    else "; --help with --config lists every field"
  )

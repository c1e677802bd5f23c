"""Loads a config file and applies overrides to it.

A config file is Python with a function `get_config(preset="")` that returns a ConfigDict with every
value. A list `PRESETS` in the file names its presets. An override must have the type of the value
that it replaces.

A file is given by its path. Its name alone is enough where it lies in the working folder, in
`configs/` there, or among the configs that come with the package: `--config=emoji_clip:tiny` means
`--config=configs/emoji_clip.py:tiny`.
"""

import ast
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
from dancegrpo_jax.settings import automatic, pairs
from dancegrpo_jax.settings.stored_config import flatten, tuples
from dancegrpo_jax.settings.suggestions import did_you_mean, did_you_mean_field

_FOLDER = Path("configs")  # where a file is looked up that is given by its name alone
_beside: list[str] = []  # in sys.path: the folders of the config file that was read last
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def load(path_with_preset: str, overrides: Sequence[str] = ()) -> ConfigDict:
  """The config of FILE[:preset] with overrides ("key=value") applied, locked.

  Args:
    path_with_preset: a path or a name, as described at the top of this module.
    overrides: "key=value" each, applied in order.

  Raises:
    ConfigError: no such file, no get_config, unknown preset, unknown key, or a value of the wrong
      type. The message has a line for every bad override.
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
  if not isinstance(config, ConfigDict):
    raise ConfigError(
      f"--config={path}: get_config returns a {type(config).__name__}; it must return the"
      " ConfigDict of configs/common.py with its own values"
    )
  return overridden(config, overrides)


def overridden(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
  """The config with overrides ("key=value") applied, locked.

  Raises:
    ConfigError: an unknown key, or a value of the wrong type; a line for each.
  """
  problems = [problem for override in overrides if (problem := _override(config, override))]
  if problems:
    raise ConfigError("\n".join(problems))
  return config.lock()


def source(path_with_preset: str) -> str:
  """The text of the file that `load` reads. ConfigError as there."""
  return _file(_split_preset(path_with_preset)[0]).read_text()


def _split_preset(path_with_preset: str) -> tuple[str, str]:
  """Path and preset. A colon may also stand in a folder's name, before the ".py" of the file."""
  path, _, preset = path_with_preset.rpartition(".py:")
  if path:
    return f"{path}.py", preset
  if path_with_preset.endswith(".py"):
    return path_with_preset, ""
  path, _, preset = path_with_preset.partition(":")
  return path, preset


def _file(path: str) -> Path:
  """The absolute path of the file that `path` names.

  Raises:
    ConfigError: there is none; the message suggests a similar name.
  """
  suffix = "" if path.endswith(".py") else ".py"
  relative = Path(f"{path}{suffix}")
  candidates = [relative, _FOLDER / relative] if relative.parent == Path() else [relative]
  for file in map(installation.find, candidates):
    if file.is_file():
      return file.resolve()
  if not path.endswith(".py") and Path(path).is_file():
    raise ConfigError(f"--config={path}: must be a Python file, with a name that ends with .py")
  # Names are suggested with or without .py, as the user wrote this one.
  names = [[name.removesuffix(suffix) for name in _names(file.parent)] for file in candidates]
  remedy = did_you_mean(relative.name.removesuffix(suffix), sum(names, []))
  if not remedy and names[-1]:
    remedy = f"; {candidates[-1].parent}/ has {', '.join(names[-1])}"
  raise ConfigError(f"--config={path}: no such file{remedy}")


def _names(folder: Path) -> list[str]:
  """Python files of a folder, and of the folder of the same name that comes with the package."""
  places = installation.places(folder)
  return sorted({file.name for place in places for file in place.glob("*.py")})


def _import(path: str) -> ModuleType:
  """Executes a config file and returns it as a module.

  The file's folder and the folder above can be imported from: before everything else while it is
  read, and after everything else until another file is read, for what it names as "module:object".
  While it is read, the configs that come with the package can be imported too: `from configs import
  common` works in any config file.
  """
  file = _file(path)
  spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
  assert spec is not None and spec.loader is not None, file  # only without .py they are None
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
  finally:  # folders that the file itself added stay, because rewards may be imported from them
    for folder in folders + last:
      sys.path.remove(folder)
  _beside[:] = [folder for folder in folders if folder not in sys.path]
  sys.path += _beside
  return module


def _line_in(file: Path, error: Exception) -> int:
  """The line of `file` in which an error came up, 0 where the traceback does not show it."""
  lines = [
    frame.lineno or 0
    for frame in traceback.extract_tb(error.__traceback__)
    if Path(frame.filename) == file
  ]
  return lines[-1] if lines else 0


def _override(config: ConfigDict, override: str) -> str | None:
  """Applies "key=value" in place. Returns a message where that is not possible, else None."""
  key, equals, text = override.partition("=")
  fields = flatten(config)
  if not equals:
    return f"--config.{key}: no value; write --config.{key}=VALUE"
  if key not in fields:
    inside = [field for field in fields if field.startswith(f"{key}.")]
    if inside:
      return f"--config.{key}: this is a section; set one of its fields: {', '.join(inside)}"
    return f"--config.{key}: unknown key{did_you_mean_field(key, list(fields))}"
  is_pairs = pairs.has_short_form(key)
  try:
    value: Any = None
    if key in automatic.FIELDS:
      value = automatic.parse(text)
    elif is_pairs and pairs.is_short(text):
      value = pairs.parse(key, text)
    else:
      value = _parse(text, fields[key])
  except ConfigError as error:
    return str(error)
  except (ValueError, SyntaxError):
    if key in automatic.FIELDS:
      return f"--config.{key}={text}: {automatic.FORM}"
    mistake = f"--config.{key}={text}: not a value of type {type(fields[key]).__name__}"
    remedy = f"write it as --config.{key}={spell(fields[key])}"
    return f"{mistake}; {pairs.remedy(key) if is_pairs else remedy}"
  _set(config, key, value)
  return None


def _set(config: ConfigDict, key: str, value: Any) -> None:
  """Sets the field of this full name."""
  *sections, leaf = key.split(".")
  for section in sections:
    config = config[section]
  with config.unlocked(), config.ignore_type():  # a number may take the place of "auto"
    config[leaf] = value


def _parse(text: str, present: Any) -> Any:
  """`text` as a value of the type of `present`.

  Raises:
    ValueError, SyntaxError: it is not one.
  """
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
  """A value as one types it in a shell."""
  return f'"{value!r}"' if isinstance(value, (tuple, list)) else str(value)

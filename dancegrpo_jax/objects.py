"""Python objects that a config names as "module:object"."""

import importlib
from typing import Any


def is_named(name: str) -> bool:
  """Whether a name has the form "module:object"."""
  return ":" in name


def load(field: str, name: str) -> Any:
  """The object that `name` names, for example "my_package.my_module:my_object".

  Args:
    field: the field of the config, for messages.
    name: a module and an object in it. The module must be importable: from the working folder, from
      the config file's folder or the one above it (settings/config_file.py), or through PYTHONPATH.

  Raises:
    ValueError: the module can't be imported, or has no such object; one line.
  """
  module, _, path = name.partition(":")
  try:
    value = importlib.import_module(module)
    for part in path.split("."):
      value = getattr(value, part)
  except ImportError as error:
    raise ValueError(
      f"config.{field}: {name!r}: {error}; the module must be importable from here, from the"
      " config file's folder or the one above it, or through PYTHONPATH"
    ) from error
  except AttributeError as error:
    raise ValueError(f"config.{field}: {name!r}: {error}; write module:object") from error
  except Exception as error:  # a mistake in the user's module can raise anything
    raise ValueError(
      f"config.{field}: {name!r}: {type(error).__name__} in {module}: {error}"
    ) from error
  return value

"""Reads the JSON files of published checkpoints so that no key is ignored without a word.

Whoever reads such a file states, for every key that it knows, one of three things: its value is
used, its value must be one of some that change nothing, or the key does not matter here and why.
Any other key is refused, because nobody knows what it does.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dancegrpo_jax.errors import listed

# In the place of a default: the file must have the key.
REQUIRED = object()


class Keys(NamedTuple):
  """What is done with the keys of a file.

  Attributes:
    used: the keys whose values are used, each with the value that it has where the file leaves it
      out: that of the library which wrote the file, or `REQUIRED`. A value in the file must be of
      the same type, unless this one is None.
    neutral: keys that are not implemented, each with the values that change nothing.
    harmless: keys that do not matter here, each with the reason.
    types: the types that the values of some used keys may have, where these are not those of their
      defaults.
  """

  used: Mapping[str, Any]
  neutral: Mapping[str, tuple[Any, ...]] = {}
  harmless: Mapping[str, str] = {}
  types: Mapping[str, tuple[type, ...]] = {}


def read(file: str, given: Mapping[str, Any], keys: Keys) -> dict[str, Any]:
  """The values of all keys that are used.

  Args:
    file: its name, for the message.
    given: its contents.
    keys: what is done with them. Of the keys that are not among them, those that begin with "_" are
      notes of the library that wrote the file, and null means that a feature is off.

  Raises:
    ValueError: one line that names every key that is missing, is unknown, or has a value that is
      not implemented or of the wrong type.
  """
  missing = [key for key, default in keys.used.items() if default is REQUIRED and key not in given]
  if missing:
    raise ValueError(f"{file} lacks {', '.join(missing)}")
  problems = []
  for key, value in given.items():
    if key in keys.neutral:
      if value not in keys.neutral[key]:
        problems.append(f"{key} = {value!r} (implemented: {_listed(keys.neutral[key])})")
    elif key in keys.used:
      types = keys.types.get(key, _types_like(keys.used[key]))
      if types and not _is_one_of(value, types):
        problems.append(f"{key} = {value!r} (implemented: {' or '.join(map(_spelt, types))})")
    elif key not in keys.harmless and not key.startswith("_") and value is not None:
      problems.append(f"{key} = {value!r} (an unknown key)")
  if problems:
    raise ValueError(f"{file} has what is not implemented: {listed(problems, 6, '; ')}")
  return {key: given.get(key, default) for key, default in keys.used.items()}


def _types_like(default: Any) -> tuple[type, ...]:
  """The types that a value may have in the place of a default; () for any."""
  if default is None or default is REQUIRED:
    return ()
  if isinstance(default, float):
    return (int, float)
  return (list, tuple) if isinstance(default, list | tuple) else (type(default),)


def _is_one_of(value: Any, types: tuple[type, ...]) -> bool:
  """Whether a value has one of the types. To Python, a bool is an int too; here it is none."""
  return isinstance(value, types) and (not isinstance(value, bool) or bool in types)


def _spelt(kind: type) -> str:
  """A type in JSON's words."""
  names = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
  names |= {list: "a list", tuple: "a list", dict: "an object", type(None): "null"}
  return names.get(kind, kind.__name__)


def _listed(values: tuple[Any, ...]) -> str:
  return " or ".join(repr(value) for value in values)

"""Reads the JSON files of published checkpoints so that no key is ignored without a word.

Whoever reads such a file states, for every key that it knows, one of three things: its value is
used, its value must be one of some that change nothing, or the key does not matter here and why.
Any other key is refused, because nobody knows what it does.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Keys(NamedTuple):
  """What is done with the keys of a file.

  Attributes:
    used: the keys whose values are used, each with the value that it has where the file leaves it
      out: that of the library which wrote the file.
    neutral: keys that are not implemented, each with the values that change nothing.
    harmless: keys that do not matter here, each with the reason.
  """

  used: Mapping[str, Any]
  neutral: Mapping[str, tuple[Any, ...]] = {}
  harmless: Mapping[str, str] = {}


def read(file: str, given: Mapping[str, Any], keys: Keys) -> dict[str, Any]:
  """The values of all keys that are used.

  Args:
    file: its name, for the message.
    given: its contents.
    keys: what is done with them. A key that begins with "_" and is not among them is a note of the
      library that wrote the file.

  Raises:
    ValueError: one line that names every key that is unknown or has a value that is not
      implemented.
  """
  problems = []
  for key, value in given.items():
    if key in keys.neutral:
      if value not in keys.neutral[key]:
        problems.append(f"{key} = {value!r} (implemented: {_listed(keys.neutral[key])})")
    elif key not in keys.used and key not in keys.harmless and not key.startswith("_"):
      problems.append(f"{key} = {value!r} (an unknown key)")
  if problems:
    raise ValueError(f"{file} has what is not implemented: {'; '.join(problems)}")
  return {key: given.get(key, default) for key, default in keys.used.items()}


def _listed(values: tuple[Any, ...]) -> str:
  return " or ".join(repr(value) for value in values)

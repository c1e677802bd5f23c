"""The two kinds of mistakes that users make, in settings and in checkpoints.

Commands print their messages without a traceback. `listed` keeps lists in messages short.
"""

from collections.abc import Iterable


class ConversionError(ValueError):
  """A checkpoint can't be read or doesn't fit its network. The message names every problem."""


class ConfigError(ValueError):
  """A mistake in the config. The message has one line a problem, with field, value and remedy."""


def listed(names: Iterable[object], most: int = 2, between: str = ", ") -> str:
  """The first of some names or values, and how many more there are; "nothing" where there is none.

  Args:
    names: in the order in which they are shown.
    most: how many are shown.
    between: what separates them.
  """
  texts = [str(name) for name in names]
  more = f" and {len(texts) - most} more" if len(texts) > most else ""
  return (between.join(texts[:most]) or "nothing") + more

"""The two kinds of mistakes that users make, in settings and in checkpoints.

Commands print their messages without a traceback.
"""


class ConversionError(ValueError):
  """A checkpoint can't be read or doesn't fit its network. The message names every problem."""


class ConfigError(ValueError):
  """A mistake in the config. The message has one line a problem, with field, value and remedy."""

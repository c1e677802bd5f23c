"""The two mistakes that are the user's: of a setting, and of a checkpoint. Their messages are meant
to be read.
"""


class ConversionError(ValueError):
  """A checkpoint that cannot be read, or that does not fit its network. The message names every
  problem.
  """


class ConfigError(ValueError):
  """A mistake of the user: one line a problem, each naming the field, its value and the remedy."""

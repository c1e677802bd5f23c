"""The short form of a field that holds (term, number) pairs: `hps:0.7,clip:1.4`.

    pairs  = pair *("," pair)
    pair   = term [":" number]
    term   = name | module ":" object, either with "/part" behind it

A number never is the name of an object, so `my_module:redness` is a term without a number and
`my_module:redness:0.5` is one with it.
"""

import math
import re

from dancegrpo_jax.errors import ConfigError

# The fields that have this form, and the number of a term that is written without one. None means
# that every term needs a number.
DEFAULTS = {"reward.terms": 1.0, "reward.thresholds": None}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NOT_FINITE = ("nan", "inf", "-inf", "infinity", "-infinity")
_TERM = re.compile(r"[^\W\d][\w.-]*(:[^\W\d][\w.]*)?(/[\w.-]+)?")


def is_short(text: str) -> bool:
  """Whether a text is meant as the short form, and not as a tuple or a list of Python."""
  return bool(text.strip()) and text.lstrip()[0] not in "([{\"'"


def parse(field: str, text: str) -> tuple[tuple[str, float], ...]:
  """The pairs of a text in the short form.

  Args:
    field: one of `DEFAULTS`.
    text: as "hps:0.7,clip:1.4".

  Raises:
    ConfigError: a part of the text can't be read; one line that names it and the form.
  """
  pairs = [_pair(part.strip(), DEFAULTS[field]) for part in text.split(",")]
  for part, pair in zip(text.split(","), pairs):
    if pair is None:
      raise ConfigError(f"--config.{field}={text}: {part.strip()!r} can't be read; {remedy(field)}")
  return tuple(pair for pair in pairs if pair)


def _pair(part: str, default: float | None) -> tuple[str, float] | None:
  """Term and number, None where the text is neither form of a pair."""
  term, colon, last = (piece.strip() for piece in part.rpartition(":"))
  if colon and (_NUMBER.fullmatch(last) or last.lower() in _NOT_FINITE):
    number = float(last)
  elif default is not None:
    term, number = part, default
  else:
    return None
  return (term, number) if _TERM.fullmatch(term) and math.isfinite(number) else None


def remedy(field: str) -> str:
  """How such a field is written, for a message."""
  if DEFAULTS[field] is None:
    return f"write TERM:NUMBER with commas between them, as --config.{field}=hps:0.28,clip:0.39"
  return (
    "write TERM or TERM:WEIGHT with commas between them, as"
    f" --config.{field}=hps:0.7,clip:1.4 or --config.{field}=my_module:function:0.5"
  )

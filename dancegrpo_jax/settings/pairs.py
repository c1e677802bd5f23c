"""The short form of a field that holds terms of rewards: `hps:0.7,clip:1.4`.

    names  = term *("," term)
    pairs  = pair *("," pair)
    pair   = term [":" number]
    term   = name | module ":" object, either with "/part" behind it

A number never is the name of an object, so `my_module:redness` is a term without a number and
`my_module:redness:0.5` is one with it.
"""

import math
import re
from typing import Any

from dancegrpo_jax.errors import ConfigError

NAMES = ("reward.watch",)  # the fields that hold terms alone
# The fields that hold pairs, and the number of a term that is written without one. None means
# that every term needs a number.
DEFAULTS = {"reward.terms": 1.0, "reward.thresholds": None}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NOT_FINITE = ("nan", "inf", "-inf", "infinity", "-infinity")
_TERM = re.compile(r"[^\W\d][\w.-]*(:[^\W\d][\w.]*)?(/[\w.-]+)?")


def has_short_form(field: str) -> bool:
  """Whether a field of this full name has a short form."""
  return field in NAMES or field in DEFAULTS


def is_short(text: str) -> bool:
  """Whether a text is meant as the short form, and not as a tuple or a list of Python."""
  return bool(text.strip()) and text.lstrip()[0] not in "([{\"'"


def parse(field: str, text: str) -> tuple[Any, ...]:
  """The terms, or the pairs, of a text in the short form.

  Args:
    field: one of `NAMES` or `DEFAULTS`.
    text: as "hps:0.7,clip:1.4".

  Raises:
    ConfigError: a part of the text can't be read; one line that names it and the form.
  """
  parts = [part.strip() for part in text.split(",")]
  if field in NAMES:
    items: list[Any] = [part if _TERM.fullmatch(part) else None for part in parts]
  else:
    items = [_pair(part, DEFAULTS[field]) for part in parts]
  for part, item in zip(parts, items):
    if item is None:
      raise ConfigError(f"--config.{field}={text}: {part!r} can't be read; {remedy(field)}")
  return tuple(items)


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
  if field in NAMES:
    return f"write TERM with commas between them, as --config.{field}=aesthetic,clip"
  if DEFAULTS[field] is None:
    return f"write TERM:NUMBER with commas between them, as --config.{field}=hps:0.28,clip:0.39"
  return (
    "write TERM or TERM:WEIGHT with commas between them, as"
    f" --config.{field}=hps:0.7,clip:1.4 or --config.{field}=my_module:function:0.5"
  )

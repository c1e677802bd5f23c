"""JSON as its standard has it: without NaN and infinity, which many readers refuse."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any


def finite(value: Any, instead: Callable[[float], Any] = lambda number: None) -> Any:
  """Replaces the numbers that are not finite, at any depth of mappings, lists and tuples.

  Args:
    value: what JSON can hold, and numbers that are not finite.
    instead: what stands for such a number; None, which JSON writes as null.
  """
  if isinstance(value, float) and not math.isfinite(value):
    return instead(value)
  if isinstance(value, Mapping):
    return {key: finite(item, instead) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [finite(item, instead) for item in value]
  return value


def dumps(value: Any, **options: Any) -> str:
  """`json.dumps` with null for every number that is not finite.

  Args:
    value: what JSON can hold, and numbers that are not finite.
    options: of `json.dumps`.
  """
  return json.dumps(finite(value), allow_nan=False, **options)

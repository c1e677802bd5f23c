"""What a reward function may return for n samples, and how it becomes scores.

n numbers: a list, a tuple, an iterator, or an array of NumPy, JAX, PyTorch or TensorFlow of shape
  [n] or [n, 1]. None and NaN are samples that could not be scored.
{name: n numbers}: several terms.
(one of the two, dict): the dict is extra information, which is not used. The reward functions of
  DDPO and Flow-GRPO return this.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from dancegrpo_jax.rewards.base import Reward

# The entry of {name: numbers} that the function's own name stands for: Flow-GRPO's weighted sum.
TOTAL = "avg"


class ReturnedError(ValueError):
  """A reward function returned what can't be scores. The message says what, and what is wanted."""


def by_term(name: str, value: Any, count: int) -> dict[str, Float[np.ndarray, "n"]]:
  """The scores that a function has returned.

  Args:
    name: of the reward.
    value: what the function returned.
    count: of the samples.

  Returns:
    By term: `name`, or "name/entry" for each entry of a mapping. `name` is there too if the mapping
    has one entry alone, or an entry `TOTAL`.

  Raises:
    ReturnedError: these are no scores.
  """
  value = _without_information(value)
  if not isinstance(value, Mapping):
    return {name: numbers(value, count, "")}
  wrong = [key for key in value if not isinstance(key, str) or not key]
  if wrong or not value:
    keys = f"the key {wrong[0]!r}" if wrong else "no entry"
    raise ReturnedError(f"returned a dict with {keys}; {wanted(count)}")
  scores = {key: numbers(entry, count, f"the entry {key!r}, ") for key, entry in value.items()}
  terms = {f"{name}/{key}": row for key, row in scores.items()}
  whole = TOTAL if TOTAL in scores else next(iter(scores))
  return terms | ({name: scores[whole]} if len(scores) == 1 or TOTAL in scores else {})


def asked(reward: Reward, scores: Any, count: int) -> dict[str, Float[np.ndarray, "n"]]:
  """The terms of a host reward among those that it has returned.

  Args:
    reward: whose `score` returned them.
    scores: what it returned.
    count: of the samples.

  Raises:
    ReturnedError: a term is not there, or has not one number a sample.
  """
  if not isinstance(scores, Mapping):
    raise ReturnedError(f"returned {described(scores)}; return {{term: {count} numbers}}")
  missing = [term for term in reward.terms if term not in scores]
  if missing:
    raise ReturnedError(
      f"returned the terms {', '.join(map(str, scores))}, and not {', '.join(missing)}; name"
      " in reward.terms those that it returns"
    )
  return {term: numbers(scores[term], count, f"the term {term!r}, ") for term in reward.terms}


def numbers(value: Any, count: int, where: str) -> Float[np.ndarray, "n"]:
  """One number a sample, as a new array.

  Args:
    value: n numbers in any of the forms above.
    count: of the samples.
    where: the part of what was returned, for messages.

  Raises:
    ReturnedError: these are not n numbers.
  """
  plain = _plain(value, count)
  try:
    array = np.asarray(plain)
    scores = np.array(array, np.float32) if array.dtype.kind != "c" else None
  except (TypeError, ValueError):
    scores = None
  one_of_one = scores is not None and scores.shape == () and count == 1 and value is not None
  fits = scores is not None and scores.shape[:1] == (count,) and scores.size == count
  if scores is None or isinstance(plain, (str, bytes)) or not (fits or one_of_one):
    said = f"{where}{described(plain if isinstance(value, Iterator) else value)}"
    raise ReturnedError(f"returned {said} for {count} samples; {wanted(count)}{_hint(plain)}")
  return scores.reshape(count)


def described(value: Any) -> str:
  """A value in a few words, as "a list of 2 (dict)" or "an array of shape (2, 3)"."""
  if value is None:
    return "None"
  if isinstance(value, (bool, int, float, np.generic)) or getattr(value, "shape", None) == ():
    return "one number"
  if isinstance(value, (list, tuple)):
    kinds = ", ".join(sorted({type(item).__name__ for item in value}))
    return f"a {type(value).__name__} of {len(value)}{f' ({kinds})' if kinds else ''}"
  if getattr(value, "shape", None) is not None:
    return f"an array of shape {tuple(value.shape)} and type {value.dtype}"
  return f"an object of type {type(value).__name__}"


def wanted(count: int) -> str:
  """What a function should return, for messages."""
  return f"return {count} numbers, {{name: {count} numbers}}, or one of these and a dict"


def _hint(value: Any) -> str:
  """How what was returned is often mended; "" where that is not known."""
  if isinstance(value, (list, tuple)) and value and all(isinstance(x, Mapping) for x in value):
    key = next(iter(value[0]), "score")
    return f"; take the number out of each dict, as [x[{key!r}] for x in ...]"
  return ""


def _without_information(value: Any) -> Any:
  """The scores of (scores, dict), and any other value itself.

  A tuple of numbers is the scores of its samples, also where the last of them is None.
  """
  if not isinstance(value, (tuple, list)) or len(value) != 2:
    return value
  scores, information = value
  if isinstance(information, Mapping):
    both = isinstance(scores, Mapping)
    return value if both and isinstance(value, list) else scores
  is_pair = isinstance(value, tuple) and information is None
  return scores if is_pair and (isinstance(scores, Mapping) or _has_length(scores)) else value


def _has_length(value: Any) -> bool:
  """Whether a value holds several, as a list, and an array that is not a number."""
  shape = getattr(value, "shape", None)
  return isinstance(value, (list, tuple)) if shape is None else len(shape) > 0


def _plain(value: Any, count: int) -> Any:
  """A value of which NumPy can make an array: tensors of PyTorch leave their graph and device."""
  if isinstance(value, Iterator):
    value = list(itertools.islice(value, count + 1))
  if isinstance(value, (list, tuple)):
    # A sample's own score may be an array of one number.
    items = (_plain(item, count) for item in value)
    return [item.reshape(()) if getattr(item, "size", 0) == 1 else item for item in items]
  if hasattr(value, "detach") and hasattr(value, "cpu"):
    # NumPy has no bfloat16, and float32 is what scores are kept in.
    return value.detach().float().cpu().numpy()
  return value

"""The rewards that `reward.terms` may name."""

import difflib

from dancegrpo_jax import objects
from dancegrpo_jax.rewards import (
  aesthetic,
  clip,
  compressibility,
  hps,
  pickscore,
  python_function,
  remote,
)
from dancegrpo_jax.rewards.base import RewardKind

KINDS = {
  "clip": clip.KIND,
  "hps": hps.KIND,
  "pickscore": pickscore.KIND,
  "aesthetic": aesthetic.KIND,
  "compressibility": compressibility.KIND,
  "remote": remote.KIND,
}


def reward_of(term: str) -> str:
  """The reward that a term of config.reward.terms belongs to: of "videoalign/vq" the first part."""
  return term.split("/")[0]


def kind_of(name: str) -> RewardKind:
  """The kind of a reward: one of `KINDS`, or what "module:object" names.

  An object's type decides: a `RewardKind` is itself, and a function is a reward on the host (see
  rewards/python_function.py).

  Raises:
    ValueError: one line: no such reward or object, or an object of another type.
  """
  if name in KINDS:
    return KINDS[name]
  if not objects.is_named(name):
    close = difflib.get_close_matches(name, list(KINDS), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(
      f"config.reward.terms = {name!r}: unknown reward; one of {', '.join(KINDS)}, or"
      f" module:object{hint}"
    )
  found = objects.load("reward.terms", name)
  if isinstance(found, RewardKind):
    return found
  if callable(found) and not isinstance(found, type):
    return python_function.kind_of(found)
  raise ValueError(
    f"config.reward.terms: {name!r} is a {type(found).__name__}; it must be a function of (pixels,"
    " prompts, metadata), or a dancegrpo_jax.rewards.base.RewardKind"
  )

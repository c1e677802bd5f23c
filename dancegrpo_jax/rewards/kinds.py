"""The rewards of this package, by the name that `reward.terms` has for them."""

import difflib

from ml_collections import ConfigDict

from dancegrpo_jax import objects
from dancegrpo_jax.rewards import (
  aesthetic,
  clip,
  compressibility,
  hps,
  moving_emoji,
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
  "moving_emoji": moving_emoji.KIND,
  "remote": remote.KIND,
}


def reward_of(term: str) -> str:
  """The reward that a term of a config belongs to: "videoalign" of "videoalign/vq"."""
  return term.split("/")[0]


def scored(config: ConfigDict) -> tuple[str, ...]:
  """All terms that a config asks for: those that are trained on, and those that are watched."""
  return (*(term for term, _ in config.reward.terms), *config.reward.watch)


def kind_of(name: str, field: str = "reward.terms") -> RewardKind:
  """The kind of a reward: one of `KINDS`, or the object that "module:object" names.

  The object is a `RewardKind`, or a function, which is a reward on the host (see
  rewards/python_function.py).

  Args:
    name: of the reward.
    field: of the config that names it, for messages.

  Raises:
    ValueError: there is no such reward or object, or the object has another type; one line.
  """
  if name in KINDS:
    return KINDS[name]
  if not objects.is_named(name):
    close = difflib.get_close_matches(name, list(KINDS), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(
      f"config.{field} = {name!r}: unknown reward; one of {', '.join(KINDS)}, or"
      f" module:object{hint}"
    )
  value = objects.load(field, name)
  if isinstance(value, RewardKind):
    return value
  if callable(value) and not isinstance(value, type):
    return python_function.kind_of(value)
  raise ValueError(
    f"config.{field}: {name!r} is a {type(value).__name__}; it must be a function of (pixels,"
    " prompts, metadata), or a dancegrpo_jax.rewards.base.RewardKind"
  )

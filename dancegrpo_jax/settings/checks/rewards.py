"""The rewards: which terms there are, and their sections of the config."""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from dancegrpo_jax.rewards import frames, kinds
from dancegrpo_jax.settings.checks.values import problem


def rewards(config: ConfigDict) -> Iterator[str]:
  """Whether the terms name rewards, each once, and the thresholds name terms."""
  terms = config.reward.terms
  if not terms or not all(map(_is_term_and_number, terms)):
    remedy = 'must hold (term, weight) pairs, at least one, as (("clip", 1.0),)'
    yield problem("reward.terms", terms, remedy)
    return
  watch = config.reward.watch
  if not isinstance(watch, (tuple, list)) or not all(isinstance(name, str) for name in watch):
    yield problem("reward.watch", watch, 'must hold names of terms, as ("aesthetic",)')
    return
  names = [name for name, _ in terms]
  fields = dict.fromkeys(map(kinds.reward_of, watch), "reward.watch")
  fields |= dict.fromkeys(map(kinds.reward_of, names), "reward.terms")
  for name, field in fields.items():
    yield from _section(config, name, field)
  for name in sorted({name for name in watch if (*names, *watch).count(name) > 1}):
    yield problem("reward.watch", name, "named twice; a term is trained on or watched")
  for name in sorted({name for name in names if names.count(name) > 1}):
    yield problem("reward.terms", name, "named twice; give it one weight")
  for threshold in config.reward.thresholds:
    if not _is_term_and_number(threshold) or threshold[0] not in names:
      remedy = f"must be (term, value) with a term of reward.terms: {', '.join(names)}"
      yield problem("reward.thresholds", threshold, remedy)
  for name in (name for name, kind in kinds.KINDS.items() if kind.of_images):
    choice = config.reward.get(name, {}).get(frames.FIELD, frames.NAMED[0])
    if not isinstance(choice, str) or not frames.is_valid(choice):
      remedy = f"must be one of {', '.join(frames.NAMED)}, or a number of frames, at least 1"
      yield problem(f"reward.{name}.{frames.FIELD}", choice, remedy)
  compressibility = config.reward.get("compressibility")
  if compressibility is not None and not 1 <= compressibility.quality <= 100:
    remedy = "must lie in [1, 100]; 95 is usual"
    yield problem("reward.compressibility.quality", compressibility.quality, remedy)


def _section(config: ConfigDict, name: str, field: str) -> Iterator[str]:
  """Whether there is a reward of this name, and whether the config has its section."""
  try:
    section = kinds.kind_of(name, field).section
  except ValueError as error:
    yield str(error)
    return
  if section and section not in config.reward:
    remedy = f"its section config.reward.{section} is missing"
    if name in kinds.KINDS:
      remedy += "; configs/common.py has it"
    yield problem(field, name, remedy)


def _is_term_and_number(value: Any) -> bool:
  return (
    isinstance(value, (tuple, list))
    and len(value) == 2
    and isinstance(value[0], str)
    and isinstance(value[1], (int, float))
  )

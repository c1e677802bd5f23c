"""A Python function as a reward: `reward.terms = (("my_module:my_function", 1.0),)`."""

import inspect
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax.rewards import coroutines, returned
from dancegrpo_jax.rewards.base import Files, Networks, Reward, RewardKind
from dancegrpo_jax.types import Example, Media


def kind_of(function: Callable) -> RewardKind:
  """The reward that calls `function(pixels, prompts, metadata) -> scores`.

  `pixels` is float32 `[b, (f,) h, w, 3]` in [0, 1], `prompts` is a list of b texts, and `metadata`
  is a list of b dicts or None. The scores are b numbers, with NaN or None for a sample that could
  not be scored; rewards/returned.py has all forms. The function may be asynchronous. The pixels are
  read-only.
  """

  def build(name: str, section: ConfigDict, files: Files, networks: Networks) -> Reward:
    """Builds the reward.

    Raises:
      ValueError: the function does not take three arguments.
    """
    del section, files, networks
    try:
      inspect.signature(function).bind(None, None, None)
    except (TypeError, ValueError) as error:
      raise ValueError(
        f"config.reward.terms: {name!r} must take (pixels, prompts, metadata): {error}"
      ) from error

    def score(media: Media, examples: list[Example]) -> dict[str, np.ndarray]:
      prompts = [example.prompt for example in examples]
      metadata = [example.metadata for example in examples]
      value = coroutines.awaited(function(np.asarray(media.pixels), prompts, metadata))
      return returned.by_term(name, value, len(examples))

    return Reward(name=name, kind="host", terms=(name,), score=score, any_part=True)

  return RewardKind(build=build)

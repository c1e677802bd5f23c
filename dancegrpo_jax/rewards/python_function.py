"""A Python function as a reward: `reward.terms = (("my_module:my_function", 1.0),)`."""

import inspect
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax.rewards.base import Files, Networks, Reward, RewardKind
from dancegrpo_jax.types import Example, Media


def kind_of(function: Callable) -> RewardKind:
  """The reward that calls `function(pixels, prompts, metadata) -> scores`.

  `pixels` is float32 `[b, (f,) h, w, 3]` in [0, 1], `prompts` is a list of b texts, and `metadata`
  is a list of b dicts or None. The scores are b numbers, with NaN for a sample that could not be
  scored.
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
      scores = np.asarray(function(np.asarray(media.pixels), prompts, metadata), np.float32)
      if scores.shape != (len(examples),):
        raise ValueError(
          f"reward {name}: returned shape {scores.shape} for {len(examples)} samples"
        )
      return {name: scores}

    return Reward(name=name, kind="host", terms=(name,), score=score)

  return RewardKind(build=build)

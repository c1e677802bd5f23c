"""Any Python function as a reward: `reward.terms = (("my_module:my_function", 1.0),)`."""

import importlib
import inspect

import numpy as np

from dancegrpo_jax.rewards.base import Reward
from dancegrpo_jax.types import Example, Media


def build(name: str) -> Reward:
  """The reward "module:function", called as `function(pixels, prompts, metadata) -> scores`.

  pixels is float32 `[b, (f,) h, w, 3]` in [0, 1], prompts a list of b texts, metadata a list of b
  dicts or None; the result is b numbers, NaN for a sample that could not be scored.

  Raises:
    ValueError: the module or function can't be found, or does not take three arguments.
  """
  module_name, _, path = name.partition(":")
  try:
    function = importlib.import_module(module_name)
    for part in path.split("."):
      function = getattr(function, part)
    inspect.signature(function).bind(None, None, None)
  except ImportError as error:
    raise ValueError(
      f"config.reward.terms: {name!r}: {error}; the module must be importable from here"
      " (PYTHONPATH)"
    ) from error
  except AttributeError as error:
    raise ValueError(f"config.reward.terms: {name!r}: {error}; write module:function") from error
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"config.reward.terms: {name!r} must take (pixels, prompts, metadata): {error}"
    ) from error
  except Exception as error:  # the user's own module: whatever it raises is a mistake there
    raise ValueError(
      f"config.reward.terms: {name!r}: {type(error).__name__} in {module_name}: {error}"
    ) from error

  def score(media: Media, examples: list[Example]) -> dict[str, np.ndarray]:
    prompts, metadata = [e.prompt for e in examples], [e.metadata for e in examples]
    scores = np.asarray(function(np.asarray(media.pixels), prompts, metadata), np.float32)
    if scores.shape != (len(examples),):
      raise ValueError(f"reward {name}: returned shape {scores.shape} for {len(examples)} samples")
    return {name: scores}

  return Reward(name, "host", None, None, score)

"""Host rewards are tried on two blank pictures before anything is loaded or computed, so that a
mistake in one is a line at the start and not the end of the first iteration.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.pipelines.base import Pipeline
from dancegrpo_jax.rewards import failures, host
from dancegrpo_jax.rewards.base import Reward
from dancegrpo_jax.rewards.returned import ReturnedError
from dancegrpo_jax.types import Example, Media

PICTURES = 2
_GREY = 0.5  # of every pixel; black would be a division by zero where a picture is normalised


def require_usable(
  rewards: dict[str, Reward],
  pipeline: Pipeline,
  examples: Sequence[Example],
  warn: Callable[[str], None] = print,
) -> None:
  """Calls each host reward once, in a thread, as in training.

  Args:
    rewards: by name.
    pipeline: whose samples are scored.
    examples: the prompts; the first two go with the pictures.
    warn: gets a line about a reward that isn't ready yet, as one whose server is not up.

  Raises:
    ConfigError: rewards that raise, write into their pixels, or return no scores; a line each.
  """
  tried = [reward for reward in rewards.values() if reward.kind == "host"]
  if not tried:
    return
  media = blank_media(pipeline)
  pair = [examples[number % len(examples)] for number in range(PICTURES)]
  problems = []
  with ThreadPoolExecutor(1) as thread:
    for reward in tried:
      try:
        thread.submit(host.trial, reward, media, pair).result()
      except failures.NotReadyError as error:
        warn(f"reward {reward.name} isn't ready yet: {failures.described(error)}")
      except host.ERRORS as error:
        problems.append(problem(reward, error))
  if problems:
    raise ConfigError("\n".join(problems))


def blank_media(pipeline: Pipeline) -> Media:
  """Grey samples in the shape of a pipeline's own."""
  pixels = np.full((PICTURES, *pipeline.sample_shape), _GREY, np.float32)
  if len(pipeline.sample_shape) == 3:
    return Media(pixels)
  params = {name: component.abstract for name, component in pipeline.components.items()}
  latents = jax.ShapeDtypeStruct((PICTURES, *pipeline.latent_shape), np.float32)
  return Media(pixels, jax.eval_shape(pipeline.decode, params, latents).fps)


def problem(reward: Reward, error: BaseException) -> str:
  """The line for the user about a reward that can't be used."""
  where = f"config.reward: {reward.name!r}, tried on two blank samples,"
  if isinstance(error, ReturnedError):
    return f"{where} {error}"
  if isinstance(error, host.InPlaceError):
    place = f" ({at})" if (at := failures.place(error)) else ""
    text = f"{where} wrote into its pixels, which are read-only{place}: {error}"
    return f"{text}; copy them first, as pixels = pixels.copy()"
  return (
    f"{where} raised {failures.described(error)}; it must score any picture, with NaN or None"
    " where it can't"
  )

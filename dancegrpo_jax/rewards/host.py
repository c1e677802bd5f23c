"""Calls of host rewards: what they get can't be spoilt, and what fails is NaN for a slice alone."""

import copy

import numpy as np

from dancegrpo_jax.rewards import returned
from dancegrpo_jax.rewards.base import Reward
from dancegrpo_jax.rewards.failures import Failure, NotReadyError
from dancegrpo_jax.types import Example, Media

# What a reward may raise. A function of the user that calls sys.exit must not end a run either.
ERRORS = (Exception, SystemExit)


class InPlaceError(ValueError):
  """A reward wrote into the pixels that it got."""


def call(reward: Reward, media: Media, examples: list[Example]) -> dict[str, np.ndarray]:
  """The scores of a host reward by term, `f32[n]`.

  The reward gets copies of pixels and examples, and the pixels are read-only. A tensor of PyTorch
  may share an array's memory and write into it all the same; then it has spoilt its own copy.

  Args:
    reward: on the host.
    media: n samples, on the host.
    examples: one for each sample.

  Raises:
    ReturnedError: the reward returned no scores.
    Exception: whatever the reward raises.
  """
  pixels = np.array(media.pixels)
  pixels.flags.writeable = False
  scores = reward.score(Media(pixels, media.fps), copy.deepcopy(examples))
  return returned.asked(reward, scores, len(examples))


def failed(reward: Reward, count: int) -> dict[str, np.ndarray]:
  """NaN for every term of a reward and every sample."""
  return {term: np.full(count, np.nan, np.float32) for term in reward.terms}


def sliced(
  reward: Reward, media: Media, examples: list[Example], size: int = 0
) -> tuple[dict[str, np.ndarray], list[Failure]]:
  """Scores of samples, a slice at a time. A slice that fails is tried once more, and then is NaN.

  Args:
    reward: on the host.
    media: n samples, on the host.
    examples: one for each sample.
    size: samples of a slice; 0 is all of them.

  Returns:
    Scores by term, `f32[n]`, and the slices that failed. A reward that is not ready is not asked
    for the samples that are left.
  """
  count, pixels = len(examples), np.asarray(media.pixels)
  parts: list[dict[str, np.ndarray]] = []
  failures: list[Failure] = []
  for start in range(0, count, size or count):
    rows = slice(start, start + (size or count))
    some = examples[rows]
    scores = _attempts(reward, Media(pixels[rows], media.fps), some)
    if isinstance(scores, NotReadyError):
      failures.append(Failure(scores, count - start))
      parts.append(failed(reward, count - start))
      break
    if isinstance(scores, BaseException):
      failures.append(Failure(scores, len(some)))
      scores = failed(reward, len(some))
    parts.append(scores)
  joined = {term: np.concatenate([part[term] for part in parts]) for term in reward.terms}
  return joined, failures


def _attempts(
  reward: Reward, media: Media, examples: list[Example]
) -> dict[str, np.ndarray] | BaseException:
  """The scores of a slice, or the error of its second attempt."""
  try:
    return call(reward, media, examples)
  except NotReadyError as error:
    return error
  except ERRORS:
    pass
  try:
    return call(reward, media, examples)
  except ERRORS as error:
    return error


def trial(reward: Reward, media: Media, examples: list[Example]) -> dict[str, np.ndarray]:
  """As `call`, and notices a reward that writes into its pixels past the array.

  Raises:
    InPlaceError: the reward wrote into the pixels.
    ReturnedError: the reward returned no scores.
    Exception: whatever the reward raises.
  """
  seen: list[np.ndarray] = []

  def watched(given: Media, texts: list[Example]) -> dict[str, np.ndarray]:
    seen.append(given.pixels)
    return reward.score(given, texts)

  try:
    scores = call(reward._replace(score=watched), media, examples)
  except ERRORS as error:
    text = str(error).lower().replace("-", "")
    if "readonly" in text and not isinstance(error, OSError | AttributeError):
      raise InPlaceError(str(error)).with_traceback(error.__traceback__) from error
    raise
  if not np.array_equal(seen[0], media.pixels):
    raise InPlaceError("through a tensor that shares their memory")
  return scores

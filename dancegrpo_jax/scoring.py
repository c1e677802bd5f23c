"""Scores of decoded samples: by device rewards, by host rewards in threads, and from all processes
together.
"""

from collections.abc import Callable
from concurrent.futures import Future

import jax
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from dancegrpo_jax.devices import sharding
from dancegrpo_jax.rewards.base import Reward
from dancegrpo_jax.rewards.kinds import reward_of
from dancegrpo_jax.types import Example, Media, PyTree


def reward_features(
  rewards: dict[str, Reward],
  params: dict[str, PyTree],
  compute: dict[str, Callable],
  examples: list[Example],
  rows: int,
) -> dict[str, PyTree]:
  """Every device reward's features of all prompts, computed once, `rows` prompts a call.

  Args:
    rewards: by name.
    params: by reward.
    compute: compiled, `Programs.features`.
    examples: the data set.
    rows: prompts of one call.

  Returns:
    By reward, a pytree of host arrays with one row an example.
  """
  padded = examples + [examples[-1]] * (-len(examples) % rows)
  result = {}
  for name, features in compute.items():
    prepare = rewards[name].prepare
    assert prepare is not None, name  # every reward that is a network has it
    prepared = prepare(padded)
    parts = [
      jax.device_get(features(params[name], jax.tree.map(lambda x, i=i: x[i : i + rows], prepared)))
      for i in range(0, len(padded), rows)
    ]
    result[name] = jax.tree.map(lambda *x: np.concatenate(x)[: len(examples)], *parts)
  return result


def host_scores(
  reward: Reward, media: Media, examples: list[Example], say: Callable[[str], None]
) -> dict[str, np.ndarray]:
  """A host reward of some samples. A failure is NaN in all of its terms, and a line."""
  try:
    return reward.score(media, examples)
  # The user's own function: whatever it raises must not end the run.
  except Exception as error:
    say(f"reward {reward.name} failed for {len(examples)} samples: {type(error).__name__}: {error}")
    return failed_scores(reward, len(examples))


def failed_scores(reward: Reward, count: int) -> dict[str, np.ndarray]:
  """NaN for every term of a reward and every sample."""
  return {term: np.full(count, np.nan, np.float32) for term in reward.terms}


def own_scores(
  reward: Reward,
  shards: sharding.Shards,
  fps: float | None,
  examples: list[Example],
  say: Callable[[str], None],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """A host reward of this process's rows of one chunk, in a thread: it may look at devices' data,
  and not compute on them.

  Args:
    reward: on the host.
    shards: this process's rows of the chunk's pixels.
    fps: of the media.
    examples: one a row of the chunk.
    say: where a failure is told.

  Returns:
    (numbers of the rows, {term: scores of these rows}).
  """
  if not len(shards.numbers):
    return shards.numbers, {}
  rows = Media(np.concatenate([np.asarray(part) for part in shards.parts]), fps)
  own = [examples[number] for number in shards.numbers]
  return shards.numbers, host_scores(reward, rows, own, say)


def from_host(
  config: ConfigDict, waiting: list[tuple[str, np.ndarray, Future]], chunks: np.ndarray
) -> dict[str, list]:
  """The host rewards of an iteration, from all processes; waits for them.

  Args:
    config: of the run.
    waiting: reward, sample numbers of its chunk, and the future of `own_scores`.
    chunks: sample numbers `[chunks, chunk]`.

  Returns:
    `{term: [f32[samples]]}` in the order of `chunks`, NaN where failed.
  """
  place = np.argsort(chunks.reshape(-1))  # of a sample among all chunks
  terms = {
    name: [term for term, _ in config.reward.terms if reward_of(term) == name]
    for name, *_ in waiting
  }
  values = {
    term: np.full(chunks.size, np.nan, np.float32) for named in terms.values() for term in named
  }
  own = np.zeros(chunks.size, bool)
  for name, chunk, future in waiting:
    numbers, scores = future.result()
    places = place[chunk[numbers]]
    own[places] = True
    for term in terms[name]:
      if term in scores:
        values[term][places] = scores[term]
  return {term: [row] for term, row in sharding.join_processes(values, own).items()}


def chunks(count: int, size: int, lanes: int) -> np.ndarray:
  """Numbers 0 .. count - 1 in rows of one length: `size`, or fewer where all fit in one; the last
  number fills up.
  """
  size = min(size, -(-count // lanes) * lanes)
  return np.minimum(np.arange(-(-count // size) * size, dtype=np.int32), count - 1).reshape(
    -1, size
  )


def score_all(
  rewards: dict[str, Reward],
  params: dict[str, PyTree],
  compute: dict[str, Callable],
  media: Media,
  features: dict[str, PyTree],
  owners: Int[np.ndarray, "n"],
  examples: list[Example],
  rows: Int[np.ndarray, "calls size"],
  say: Callable[[str], None] = print,
) -> dict[str, np.ndarray]:
  """Every reward of samples that are there already: for evaluation; training scores chunk by chunk,
  as they come.

  Args:
    rewards: by name.
    params: by name.
    compute: compiled, `Programs.score`.
    media: n samples, on the host.
    features: of the device rewards, one row an example.
    owners: each sample's row of `features` and `examples`.
    examples: prompts.
    rows: `chunks(n, ..)`, what device rewards score at once.
    say: where failures are told.

  Returns:
    `{term: f32[n]}`, NaN where failed. Host rewards are process 0's alone, as all have the same
    samples: NaN elsewhere.
  """
  result, count = {}, len(media.pixels)
  for name, reward in rewards.items():
    if reward.kind == "host":
      is_first = jax.process_index() == 0
      own = [examples[owner] for owner in owners]
      result |= host_scores(reward, media, own, say) if is_first else failed_scores(reward, count)
      continue
    parts = [
      compute[name](params[name], Media(media.pixels[row], media.fps), features[name], owners[row])
      for row in rows
    ]
    for term in parts[0]:
      result[term] = np.concatenate([np.asarray(part[term]) for part in parts])[:count]
  return result

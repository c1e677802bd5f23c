"""Scores of decoded samples. Device rewards are compiled programs; host rewards are Python, run in
threads during training, and every process scores the samples on its own devices.
"""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from dancegrpo_jax.devices import sharding
from dancegrpo_jax.rewards import failures as host_failures
from dancegrpo_jax.rewards import host
from dancegrpo_jax.rewards.base import Reward
from dancegrpo_jax.rewards.kinds import reward_of, scored
from dancegrpo_jax.types import Example, Media, PyTree

Warn = Callable[[str], None]  # gets a line about a reward that failed


class Scorers(NamedTuple):
  """Rewards, and what device rewards score samples with.

  Attributes:
    rewards: by name.
    params: parameters by reward, {} for a reward without a network.
    compute: compiled functions by device reward, `Programs.score`.
    features: by device reward, one row for each prompt.
  """

  rewards: dict[str, Reward]
  params: dict[str, PyTree]
  compute: dict[str, Callable]
  features: dict[str, PyTree]


class HostScores(NamedTuple):
  """Scores of a chunk that a thread is computing.

  Attributes:
    reward: its name.
    chunk: numbers of all samples of the chunk.
    result: of `local_scores`.
  """

  reward: str
  chunk: np.ndarray
  result: Future


def reward_features(
  rewards: dict[str, Reward],
  params: dict[str, PyTree],
  compute: dict[str, Callable],
  examples: list[Example],
  rows: int,
) -> dict[str, PyTree]:
  """The features that device rewards make of the prompts. They are computed once for a run.

  Args:
    rewards: by name.
    params: parameters by reward.
    compute: compiled functions by device reward, `Programs.features`.
    examples: the prompts.
    rows: prompts of one call.

  Returns:
    By device reward, a pytree of host arrays with one row for each prompt.
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
  reward: Reward,
  media: Media,
  examples: list[Example],
  warn: Warn,
  size: int = 0,
  errors: Path | None = None,
) -> dict[str, np.ndarray]:
  """Scores of samples by a host reward, which is called for a slice of them at a time.

  Args:
    reward: on the host.
    media: n samples, on the host.
    examples: one for each sample.
    warn: gets a line for each different error of the slices that failed twice.
    size: samples of a slice; 0 is all of them.
    errors: the file to which tracebacks are appended; None for no file.

  Returns:
    `{term: f32[n]}`, NaN for the samples of a slice that failed.
  """
  scores, failures = host.sliced(reward, media, examples, size)
  for line in host_failures.report(reward.name, failures, errors):
    warn(line)
  return scores


def local_scores(
  reward: Reward,
  shards: sharding.Shards,
  fps: float | None,
  examples: list[Example],
  warn: Warn,
  size: int = 0,
  errors: Path | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Scores, by a host reward, of the rows of a chunk that lie on this process's devices.

  It runs in a thread, so it may read arrays of the devices but not compute on them.

  Args:
    reward: on the host.
    shards: this process's rows of the chunk's pixels.
    fps: frames per second of the samples, None for images.
    examples: one for each row of the chunk.
    warn, size, errors: as for `host_scores`.

  Returns:
    (which rows of the chunk these are, their scores by term).
  """
  if not len(shards.numbers):
    return shards.numbers, {}
  rows = Media(np.concatenate([np.asarray(part) for part in shards.parts]), fps)
  local = [examples[number] for number in shards.numbers]
  return shards.numbers, host_scores(reward, rows, local, warn, size, errors)


def gather_host_scores(
  config: ConfigDict, started: list[HostScores], chunks: np.ndarray
) -> dict[str, list]:
  """Waits for the host rewards of an iteration and joins those of all processes.

  Args:
    config: of the run.
    started: every host reward of every chunk.
    chunks: sample numbers `[chunks, samples of a chunk]`.

  Returns:
    `{term: [f32[samples]]}` in the order of `chunks`, NaN where a reward failed. A list, because
    `Programs.join` takes one array for each chunk of a device reward.
  """
  place = np.argsort(chunks.reshape(-1))  # of a sample among all chunks
  rewards = {scores.reward for scores in started}
  terms = [term for term in scored(config) if reward_of(term) in rewards]
  values = {term: np.full(chunks.size, np.nan, np.float32) for term in terms}
  is_local = np.zeros(chunks.size, bool)
  for reward, chunk, result in started:
    rows, scores = result.result()
    places = place[chunk[rows]]
    is_local[places] = True
    for term in terms:
      if reward_of(term) == reward and term in scores:
        values[term][places] = scores[term]
  return {term: [row] for term, row in sharding.join_processes(values, is_local).items()}


def chunks(count: int, size: int, lanes: int) -> Int[np.ndarray, "calls size"]:
  """Cuts samples into calls of equal length.

  Args:
    count: number of samples.
    size: most samples of a call; a multiple of `lanes`.
    lanes: a call has a multiple of so many samples.

  Returns:
    The numbers 0, ..., count - 1 in rows; the last number fills up the last row.
  """
  size = min(size, -(-count // lanes) * lanes)
  numbers = np.arange(-(-count // size) * size, dtype=np.int32)
  return np.minimum(numbers, count - 1).reshape(-1, size)


def score_all(
  scorers: Scorers,
  media: Media,
  owners: Int[np.ndarray, "n"],
  examples: list[Example],
  rows: Int[np.ndarray, "calls size"],
  warn: Warn = print,
  size: int = 0,
  errors: Path | None = None,
) -> dict[str, np.ndarray]:
  """Scores of samples that are all there already, by every reward.

  Evaluations call it. Training scores each chunk as soon as it is decoded.

  Args:
    scorers: the rewards.
    media: n samples, on the host.
    owners: for each sample, the row of its prompt in `scorers.features` and `examples`.
    examples: the prompts.
    rows: `chunks(n, ...)`, the samples of each call of a device reward.
    warn, size, errors: as for `host_scores`.

  Returns:
    `{term: f32[n]}`, NaN where a reward failed. All processes have the same samples, so process 0
    alone computes host rewards: on other processes they are NaN.
  """
  result, count = {}, len(media.pixels)
  for name, reward in scorers.rewards.items():
    if reward.kind == "host" and jax.process_index() > 0:
      result |= host.failed(reward, count)
    elif reward.kind == "host":
      shown = [examples[owner] for owner in owners]
      result |= host_scores(reward, media, shown, warn, size, errors)
    else:
      params, features = scorers.params[name], scorers.features[name]
      score = scorers.compute[name]
      parts = [
        score(params, Media(media.pixels[row], media.fps), features, owners[row]) for row in rows
      ]
      for term in parts[0]:
        result[term] = np.concatenate([np.asarray(part[term]) for part in parts])[:count]
  return result


def mean_of_finite(values: np.ndarray) -> float:
  """The mean of the scores that did not fail; NaN where all did."""
  finite = values[np.isfinite(values)]
  return float(np.mean(finite)) if len(finite) else float("nan")

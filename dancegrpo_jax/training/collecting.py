"""One iteration's samples and their scores, chunk by chunk."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from dancegrpo_jax import scoring
from dancegrpo_jax.assembly import encoding
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.report.clock import Clock
from dancegrpo_jax.rl import lanes
from dancegrpo_jax.rl.rollout import Rollout
from dancegrpo_jax.training.session import Session
from dancegrpo_jax.types import Conditioning, PyTree


class Experience(NamedTuple):
  """An iteration's trajectories and scores.

  Attributes:
    ids: of the P prompts.
    conditioning: one row a prompt.
    rollouts: one a chunk; the update empties this list.
    scores: `{term: f32[P, G]}`, NaN where failed.
    pixels: of the first group, on the host, where asked for.
  """

  ids: np.ndarray
  conditioning: Conditioning
  rollouts: list[Rollout]
  scores: dict[str, jax.Array]
  pixels: np.ndarray | None


def collect(
  session: Session,
  trainable: PyTree,
  iteration: int,
  clock: Clock,
  threads: ThreadPoolExecutor,
  say: Callable,
  keep_pixels: bool = False,
  stop: Callable[[], bool] = lambda: False,
) -> Experience | None:
  """Prompts -> conditioning -> rollout -> samples -> scores.

  Chunks reuse one program each and bound the memory: a chunk's samples are freed when they are
  scored. Host rewards run in threads and overlap with the next chunk.

  Args:
    session: of the run.
    trainable: parameters that sample.
    iteration: number of the iteration.
    clock: of the iteration.
    threads: in which host rewards run.
    say: where failed rewards are told.
    keep_pixels: whether the first group's samples are returned.
    stop: asked before each chunk; True gives the iteration up.

  Returns:
    The samples and scores; None where the iteration was given up.
  """
  config, model, run = session.config, session.model, session.programs
  batch, group = session.batches[iteration], config.rollout.samples_per_prompt
  ids = np.array([example.id for example in batch], np.int32)
  conditioning = encoding.conditioning(config, session.encode, batch)
  clock.phase("encode", conditioning)
  rows = {
    name: jax.tree.map(lambda x: x[ids], features) for name, features in session.features.items()
  }

  rollouts, scores, waiting, kept = [], {}, [], {}
  chunks = lanes.deal(len(batch) * group, config.rollout.chunk, config.mesh.lanes)
  for chunk in chunks:
    if len(rollouts) > 1:  # bounds what is queued on the devices, and the pixels that it holds
      jax.block_until_ready(rollouts[-2])
    if stop():
      return None
    rollout = run.rollout(trainable, model.frozen, conditioning, ids, chunk, np.int32(iteration))
    clock.phase("rollout", rollout)
    media = run.decode(model.frozen, rollout.sample)
    shards = sharding.own_shards(media.pixels)
    clock.phase("decode", media)
    owners = chunk // group
    for name, reward in model.rewards.items():
      if reward.kind == "device":
        result = run.score[name](model.reward_params[name], media, rows[name], owners)
        clock.phase("reward", result)
        for term, value in result.items():
          scores.setdefault(term, []).append(value)
      else:
        own = [batch[owner] for owner in owners]
        future = threads.submit(scoring.own_scores, reward, shards, media.fps, own, say)
        waiting.append((name, chunk, future))
    rollouts.append(rollout)
    if keep_pixels and chunk.min() < group:
      pixels = sharding.to_host(media.pixels)
      kept |= {number: pixels[i] for i, number in enumerate(chunk.tolist()) if number < group}
  first_group = np.stack([kept[number] for number in range(group)]) if kept else None
  order = np.argsort(chunks.reshape(-1)).astype(np.int32)
  scores |= scoring.from_host(config, waiting, chunks)
  return Experience(
    ids=ids,
    conditioning=conditioning,
    rollouts=rollouts,
    scores=run.join(scores, order),
    pixels=first_group,
  )

"""The samples of one iteration and their scores, chunk by chunk."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from dancegrpo_jax import scoring
from dancegrpo_jax.assembly import encoding
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.report import progress
from dancegrpo_jax.report.clock import Clock
from dancegrpo_jax.rewards import failures
from dancegrpo_jax.rl import lanes
from dancegrpo_jax.rl.rollout import Rollout
from dancegrpo_jax.training import diversity
from dancegrpo_jax.training.session import Session
from dancegrpo_jax.types import Conditioning, Media, PyTree


class Experience(NamedTuple):
  """The trajectories and scores of an iteration: P prompts with G samples each.

  Attributes:
    ids: `[P]`, positions of the prompts in the data set.
    conditioning: one row for each prompt.
    rollouts: one for each chunk; the update empties this list.
    scores: `{term: f32[P, G]}`, NaN where a reward failed.
    media: samples of the first prompt, on the host; None where they were not asked for.
    metrics: of the samples; {} where they were not asked for.
  """

  ids: np.ndarray
  conditioning: Conditioning
  rollouts: list[Rollout]
  scores: dict[str, jax.Array]
  media: Media | None
  metrics: dict[str, float]


def collect(
  session: Session,
  trainable: PyTree,
  iteration: int,
  clock: Clock,
  threads: ThreadPoolExecutor,
  warn: scoring.Warn,
  keep_pixels: bool = False,
  stop: Callable[[], bool] = lambda: False,
) -> Experience | None:
  """Prompts -> conditioning -> rollout -> decoded samples -> scores.

  Chunks bound the memory: the pixels of a chunk are freed when they are scored. All chunks call the
  same compiled programs. Host rewards run in threads while the devices draw the next chunk.

  Args:
    session: of the run.
    trainable: parameters to sample with.
    iteration: its number.
    clock: of the iteration.
    threads: in which host rewards run.
    warn: gets a line where a reward fails.
    keep_pixels: whether the samples of the first prompt are returned, and the diversity of those
      that are read with them.
    stop: asked before each chunk; True gives the iteration up.

  Returns:
    The samples and scores; None where the iteration was given up.
  """
  config, model, compiled = session.config, session.model, session.programs
  batch, group = session.batches[iteration], config.rollout.samples_per_prompt
  ids = np.array([example.id for example in batch], np.int32)
  conditioning = encoding.conditioning(config, session.encode, batch)
  clock.phase("encode", conditioning)
  features = {name: jax.tree.map(lambda x: x[ids], rows) for name, rows in session.features.items()}

  rollouts, scores, started, pixels, small = [], {}, [], {}, {}
  chunks = lanes.deal(len(batch) * group, config.rollout.chunk, config.mesh.lanes)
  for chunk in chunks:
    # At most two chunks are queued on the devices, so that the pixels of no more are in memory.
    if len(rollouts) > 1:
      jax.block_until_ready(rollouts[-2])
    if stop():
      return None
    rollout = compiled.rollout(
      trainable, model.frozen, conditioning, ids, chunk, np.int32(iteration)
    )
    clock.phase("rollout", rollout)
    media = compiled.decode(model.frozen, rollout.sample)
    shards = sharding.own_shards(media.pixels)
    clock.phase("decode", media)
    owners = chunk // group
    for name, reward in model.rewards.items():
      if reward.kind == "device":
        parts = compiled.score[name](model.reward_params[name], media, features[name], owners)
        clock.phase("reward", parts)
        for term, part in parts.items():
          scores.setdefault(term, []).append(part)
      else:
        examples = [batch[owner] for owner in owners]
        size, errors = config.reward.slice, session.workdir / failures.FILE
        result = threads.submit(
          scoring.local_scores, reward, shards, media.fps, examples, warn, size, errors
        )
        started.append(scoring.HostScores(reward=name, chunk=chunk, result=result))
    rollouts.append(rollout)
    if keep_pixels and chunk.min() < group:
      rows = sharding.to_host(media.pixels)
      pixels |= {number: rows[i] for i, number in enumerate(chunk.tolist()) if number < group}
      small |= dict(zip(chunk.tolist(), diversity.reduced(rows)))

  with progress.phase("waiting for the rewards on the host"):
    scores |= scoring.gather_host_scores(config, started, chunks)
  order = np.argsort(chunks.reshape(-1)).astype(np.int32)
  return Experience(
    ids=ids,
    conditioning=conditioning,
    rollouts=rollouts,
    scores=compiled.join(scores, order),
    media=Media(np.stack([pixels[i] for i in range(group)]), media.fps) if pixels else None,
    metrics={diversity.METRIC: diversity.within_groups(small, group)} if small else {},
  )

"""Programs that lead from decoded samples to advantages."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from dancegrpo_jax.rewards.base import Reward
from dancegrpo_jax.rl import advantages
from dancegrpo_jax.types import Media, PyTree


def score_program(reward: Reward) -> Callable:
  """Scores of one chunk by a device reward, see `Programs.score`."""

  def run(params: PyTree, media: Media, features: PyTree, prompt: Int[Array, "chunk"]) -> dict:
    return reward.score(params, media, jax.tree.map(lambda rows: rows[prompt], features))

  return run


def join_program(config: ConfigDict) -> Callable:
  """Puts the scores of all chunks into the order of the samples, see `Programs.join`."""

  def run(chunks: dict[str, list], order: Int[Array, "samples"]) -> dict:
    return {
      term: jnp.concatenate(parts)[order].reshape(-1, config.rollout.samples_per_prompt)
      for term, parts in chunks.items()
    }

  return run


def advantages_program(config: ConfigDict) -> Callable:
  """From scores to advantages and the samples that are trained, see `Programs.advantages`."""
  c = config.advantage
  terms = tuple((name, weight) for name, weight in config.reward.terms)

  def run(scores: dict, prompt_ids: Int[Array, "prompts"], stats: dict) -> tuple:
    used = advantages.apply_thresholds(scores, config.reward.thresholds)
    statistics = None
    if c.history.size:
      named, valid = advantages.signals(used, terms, config.reward.combine)
      stats = {
        name: advantages.update_stats(stats[name], prompt_ids, rewards, valid)
        for name, rewards in named.items()
      }
      statistics = {
        name: advantages.prompt_statistics(
          stats[name], prompt_ids, rewards, valid, min_count=c.history.min_count, ddof=c.ddof
        )
        for name, rewards in named.items()
      }
    result = advantages.combine(
      scores=used,
      terms=terms,
      mode=config.reward.combine,
      ddof=c.ddof,
      eps=c.eps,
      clamp=c.clamp,
      min_spread=c.min_spread,
      statistics=statistics,
    )
    metrics = _reward_metrics(scores, terms, config.reward.watch, result)
    prompts, group = result.advantage.shape
    position = jnp.broadcast_to(jnp.arange(group)[None], (prompts, group))
    if c.best_of:
      position, result = advantages.best_of(result, c.best_of)
    chosen = (jnp.arange(prompts)[:, None] * group + position).reshape(-1).astype(jnp.int32)
    return result.advantage.reshape(-1), result.weight.reshape(-1), chosen, stats, metrics

  return run


def _reward_metrics(
  scores: dict, terms: tuple, watched: tuple, result: advantages.Advantages
) -> dict[str, Array]:
  """Metrics of an iteration's rewards.

  "reward/..." is of the weighted sum of the scores, before thresholds. Where there are several
  terms, each has metrics of its own, and so has each watched one. ".../failed" is the share of
  failed scores.
  """
  total = sum(weight * scores[name] for name, weight in terms)
  metrics, rows = {}, {"reward": total}
  if len(terms) > 1:
    rows |= {f"reward/{name}": scores[name] for name, _ in terms}
  rows |= {f"reward/{name}": scores[name] for name in watched}
  for prefix, values in rows.items():
    ok = jnp.isfinite(values)
    count = jnp.maximum(ok.sum(), 1)
    mean = jnp.where(ok.any(), jnp.where(ok, values, 0.0).sum() / count, jnp.nan)
    spread = jnp.where(ok, jnp.square(values - mean), 0.0).sum() / jnp.maximum(count - 1, 1)
    metrics |= {
      f"{prefix}/mean": mean,
      f"{prefix}/std": jnp.sqrt(spread),
      f"{prefix}/min": jnp.min(jnp.where(ok, values, jnp.inf)),
      f"{prefix}/max": jnp.max(jnp.where(ok, values, -jnp.inf)),
      f"{prefix}/failed": jnp.mean(~ok),
    }
  group = advantages.group_statistics(total, jnp.isfinite(total), 1)
  return metrics | {
    "reward/failed": result.failed,  # the share of samples that were masked
    "group/std_mean": group.std.mean(),
    "group/zero_variance": result.flat_groups,
    "advantage/abs_mean": jnp.abs(result.advantage).mean(),
  }

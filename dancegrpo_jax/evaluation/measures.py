"""What is measured of a checkpoint's samples: scores, retrieval, diversity, and differences."""

from typing import Any

import numpy as np

from dancegrpo_jax import programs, scoring
from dancegrpo_jax.assembly import sampling
from dancegrpo_jax.devices import out_of_memory
from dancegrpo_jax.types import Example, Media, PyTree


def bootstrap(values: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
  """95 % interval of the mean by resampling prompts (rows), which are what varies independently.

  Args:
    values: `[prompts, samples]`; NaN is left out.
    draws: resamples.
    seed: of the resampling.
  """
  rows = np.nanmean(values, axis=1)
  picks = np.random.default_rng(seed).integers(len(rows), size=(draws, len(rows)))
  low, high = np.nanpercentile(rows[picks].mean(1), [2.5, 97.5])
  return float(low), float(high)


def diversity(embeddings: np.ndarray) -> float:
  """Mean pairwise cosine distance within groups of two samples or more, `[prompts, samples, d]` of
  length 1.
  """
  samples = embeddings.shape[1]
  products = np.einsum("psd,ptd->pst", embeddings, embeddings)
  return float(1 - (products.sum((1, 2)) - samples).mean() / (samples * (samples - 1)))


def top1(embeddings: np.ndarray, candidates: np.ndarray) -> np.ndarray:
  """Whether each image is nearest to its own caption, `[prompts, samples]`; row p of `candidates`
  is prompt p's.
  """
  return (embeddings @ candidates.T).argmax(-1) == np.arange(len(embeddings))[:, None]


def candidate_prompts(prompts: list, pool: list, count: int) -> list:
  """The prompts themselves, then others from the pool (evenly spread, so that they are not all
  alike), `count` in all.
  """
  own = {example.prompt for example in prompts}
  others = [example for example in pool if example.prompt not in own]
  wanted = max(0, min(count - len(prompts), len(others)))
  spread = [others[i * len(others) // wanted] for i in range(wanted)]
  return list(prompts) + spread


def measure(
  opened: sampling.Opened, weights: PyTree, examples: list[Example], pool: list[Example]
) -> tuple[dict, np.ndarray]:
  """Scores of all samples of one set of weights on one prompt list.

  Args:
    opened: the model.
    weights: trainable tree.
    examples: prompts.
    pool: captions that a sample's own is told from.

  Returns:
    ({term: `[prompts, samples]`}, pixels); "<reward>/retrieval" and "<reward>/diversity" too where
    it has an embedding of samples.
  """
  config, model, run = opened.config, opened.model, opened.programs
  samples = config.evaluation.samples
  drawn = sampling.draw(opened, weights, examples, samples, config.evaluation.seed)
  flat = Media(drawn.pixels.reshape(-1, *drawn.pixels.shape[2:]), drawn.fps)
  count = len(flat.pixels)
  texts = candidate_prompts(examples, pool, config.evaluation.candidates)
  rewards, params = model.rewards, model.reward_params
  features = scoring.reward_features(rewards, params, run.features, texts, len(texts))
  rows = scoring.chunks(count, config.rollout.chunk, config.mesh.lanes)
  scores = scoring.score_all(
    scorers=scoring.Scorers(rewards, params, compute=run.score, features=features),
    media=flat,
    owners=np.arange(count, dtype=np.int32) // samples,
    examples=examples,
    rows=rows,
  )
  result: dict[str, Any] = {}
  result |= {term: values.reshape(len(examples), samples) for term, values in scores.items()}
  for name, reward in rewards.items():
    if reward.embed is None:
      continue
    embed = out_of_memory.Guarded(f"embed {name}", programs.embed(config, reward))
    parts = [embed(params[name], Media(flat.pixels[row], flat.fps)) for row in rows]
    embeddings = np.concatenate([np.asarray(part) for part in parts])[:count]
    embeddings = embeddings.reshape(len(examples), samples, -1)
    result[f"{name}/retrieval"] = top1(embeddings, np.asarray(features[name])).astype(np.float32)
    if samples > 1:
      result[f"{name}/diversity"] = diversity(embeddings)
  return result, np.asarray(drawn.pixels)


def compare(base: dict, tuned: dict) -> dict:
  """Means, and the difference with its bootstrap interval, by term."""
  rows = {}
  for term, before in base.items():
    after = tuned[term]
    if np.ndim(before) == 0:
      rows[term] = {"base": before, "checkpoint": after, "difference": after - before}
      continue
    low, high = bootstrap(after - before)
    rows[term] = {
      "base": float(np.nanmean(before)),
      "checkpoint": float(np.nanmean(after)),
      "difference": float(np.nanmean(after - before)),
      "low": low,
      "high": high,
    }
  return rows

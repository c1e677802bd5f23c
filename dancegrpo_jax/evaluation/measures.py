"""Measures samples of a model: scores, retrieval, diversity, and the difference of two models."""

from pathlib import Path
from typing import Any

import numpy as np

from dancegrpo_jax import programs, scoring
from dancegrpo_jax.assembly import sampling
from dancegrpo_jax.devices import out_of_memory
from dancegrpo_jax.report import progress
from dancegrpo_jax.report.progress import phase
from dancegrpo_jax.types import Example, Media, PyTree


def bootstrap(values: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
  """The 95 % interval of a mean, by the bootstrap.

  Prompts are resampled, because samples of one prompt are not independent.

  Args:
    values: `[prompts, samples]`; NaN is left out, and with it a prompt that has nothing else.
    draws: number of resamples.
    seed: of the resampling.

  Returns:
    The ends of the interval; NaN where every value is.
  """
  values = values[np.isfinite(values).any(axis=1)]
  if not len(values):
    return float("nan"), float("nan")
  rows = np.nanmean(values, axis=1)
  picks = np.random.default_rng(seed).integers(len(rows), size=(draws, len(rows)))
  low, high = np.nanpercentile(rows[picks].mean(1), [2.5, 97.5])
  return float(low), float(high)


def diversity(embeddings: np.ndarray) -> float:
  """The mean cosine distance between two samples of a prompt.

  Args:
    embeddings: `[prompts, samples, d]` of length 1, with two samples or more.
  """
  samples = embeddings.shape[1]
  products = np.einsum("psd,ptd->pst", embeddings, embeddings)
  return float(1 - (products.sum((1, 2)) - samples).mean() / (samples * (samples - 1)))


def top1(embeddings: np.ndarray, candidates: np.ndarray) -> np.ndarray:
  """Whether each sample is nearer to its own prompt than to any other candidate.

  Args:
    embeddings: of samples, `[prompts, samples, d]`.
    candidates: of texts, `[texts, d]`; row p is prompt p.

  Returns:
    bool `[prompts, samples]`.
  """
  return (embeddings @ candidates.T).argmax(-1) == np.arange(len(embeddings))[:, None]


def candidate_prompts(prompts: list[Example], pool: list[Example], count: int) -> list[Example]:
  """The prompts, followed by others of the pool, `count` in all if the pool is large enough.

  The others are evenly spread over the pool, because neighbours in a file may be alike.
  """
  texts = {example.prompt for example in prompts}
  others = [example for example in pool if example.prompt not in texts]
  missing = max(0, min(count - len(prompts), len(others)))
  return prompts + [others[i * len(others) // missing] for i in range(missing)]


def measure(
  opened: sampling.Opened,
  weights: PyTree,
  examples: list[Example],
  pool: list[Example],
  errors: Path | None = None,
) -> tuple[dict, Media]:
  """Draws samples with one set of weights, and scores them.

  Args:
    opened: the model.
    weights: the trainable tree.
    examples: prompts.
    pool: prompts among which retrieval looks for a sample's own.
    errors: the file to which tracebacks of rewards are appended; None for no file.

  Returns:
    Scores by term, `[prompts, samples]`, and the samples. For a reward that embeds samples there
    are also "<reward>/retrieval", of the same shape, and "<reward>/diversity", a number.
  """
  config, model, run = opened.config, opened.model, opened.programs
  samples = config.evaluation.samples
  drawn = sampling.draw(opened, weights, examples, samples, config.evaluation.seed)
  flat = Media(drawn.pixels.reshape(-1, *drawn.pixels.shape[2:]), drawn.fps)
  count = len(flat.pixels)
  texts = candidate_prompts(examples, pool, config.evaluation.candidates)
  rewards, params = model.rewards, model.reward_params
  with phase("encoding the prompts for the rewards"):
    features = scoring.reward_features(rewards, params, run.features, texts, len(texts))
  rows = scoring.chunks(count, config.rollout.chunk, config.mesh.lanes)
  with phase("scoring"):
    scores = scoring.score_all(
      scorers=scoring.Scorers(rewards, params, compute=run.score, features=features),
      media=flat,
      owners=np.arange(count, dtype=np.int32) // samples,
      examples=examples,
      rows=rows,
      size=config.reward.slice,
      errors=errors,
    )
  result: dict[str, Any] = {
    term: values.reshape(len(examples), samples) for term, values in scores.items()
  }
  for name, reward in rewards.items():
    if reward.embed is None:
      continue
    embed = out_of_memory.Guarded(f"embed {name}", programs.embed(config, reward))
    parts = [
      embed(params[name], Media(flat.pixels[row], flat.fps))
      for row in progress.steps(f"embedding the samples by {name}", rows)
    ]
    embeddings = np.concatenate([np.asarray(part) for part in parts])[:count]
    embeddings = embeddings.reshape(len(examples), samples, -1)
    result[f"{name}/retrieval"] = top1(embeddings, np.asarray(features[name])).astype(np.float32)
    if samples > 1:
      result[f"{name}/diversity"] = diversity(embeddings)
  return result, drawn


def compare(base: dict, tuned: dict) -> dict:
  """Compares what `measure` returns for the base model and for a checkpoint.

  A sample whose score failed on one side is left out on both, so that the difference of the means
  is the mean of the differences.

  Returns:
    By term, the means "base", "checkpoint" and "difference", and for values of samples the ends
    "low" and "high" of the difference's interval, and the number "failed" of those left out. What
    can't be computed, because all failed, is NaN.
  """
  rows: dict[str, dict[str, float]] = {}
  for term, before in base.items():
    after = tuned[term]
    if np.ndim(before) == 0:
      rows[term] = {"base": before, "checkpoint": after, "difference": after - before}
      continue
    both = np.isfinite(before) & np.isfinite(after)
    difference = np.where(both, after, np.nan) - np.where(both, before, np.nan)
    low, high = bootstrap(difference)
    rows[term] = {
      "base": scoring.mean_of_finite(before[both]),
      "checkpoint": scoring.mean_of_finite(after[both]),
      "difference": scoring.mean_of_finite(difference),
      "low": low,
      "high": high,
      "failed": int((~both).sum()),
    }
  return rows

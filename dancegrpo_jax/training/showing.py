"""Evaluation inside training, and pictures for the report."""

from typing import NamedTuple

import jax
import numpy as np

from dancegrpo_jax import scoring
from dancegrpo_jax.assembly import encoding
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.report import page
from dancegrpo_jax.rewards import failures
from dancegrpo_jax.rl.state import TrainState
from dancegrpo_jax.training.collecting import Experience
from dancegrpo_jax.training.session import Session
from dancegrpo_jax.types import Media


class Shown(NamedTuple):
  """What an evaluation inside training has found.

  Attributes:
    values: metrics.
    pixels: `[n, (frames,) height, width, 3]`, one sample of each fixed training prompt.
    prompts: their texts.
    scores: f32 `[n]`, NaN for a failed one.
  """

  values: dict[str, float]
  pixels: np.ndarray
  prompts: list[str]
  scores: np.ndarray


def show(session: Session, iteration: int, state: TrainState, warn: scoring.Warn) -> Shown:
  """Samples the fixed prompts with fixed noise and the deterministic sampler, and adds a column to
  the report's grid.

  Args:
    session: of the run.
    iteration: number of finished iterations.
    state: whose averaged parameters are used where it has an average.
    warn: gets a line where a reward fails.

  Returns:
    The samples of the training prompts, and metrics: their mean score, and the share of samples
    that a reward failed, which no mean counts. Where there are held-out prompts, also their mean
    score and the gap, by which the training prompts are ahead.
  """
  config, model, compiled = session.config, session.model, session.shown_programs
  examples = [*session.shown[0], *session.shown[1]]
  # One call, as small as it can be.
  rows = scoring.chunks(len(examples), len(examples) + config.mesh.lanes, config.mesh.lanes)
  weights = state.trainable if state.ema is None else state.ema
  padded = [examples[i] for i in rows[0]]
  conditioning = encoding.conditioning(config, session.encode_shown, padded)
  numbers = np.arange(len(padded), dtype=np.int32)
  seed = np.int32(config.evaluation.seed)
  latents = compiled.sample(weights, model.frozen, conditioning, numbers, numbers, seed)
  media = compiled.decode(model.frozen, latents)
  pixels = sharding.to_host(media.pixels)[: len(examples)]
  scores = scoring.score_all(
    scorers=scoring.Scorers(
      rewards=model.rewards,
      params=model.reward_params,
      compute=compiled.score,
      features=session.shown_features,
    ),
    media=Media(pixels, media.fps),
    owners=np.arange(len(examples), dtype=np.int32),
    examples=examples,
    rows=rows,
    warn=warn,
    size=config.reward.slice,
    errors=session.workdir / failures.FILE,
  )
  total = sum(weight * scores[term] for term, weight in config.reward.terms)
  trained, held_out = np.split(total, [len(session.shown[0])])
  texts = [example.prompt for example in session.shown[0]]
  samples = Media(pixels[: len(trained)], media.fps)
  if jax.process_index() == 0:
    page.save_samples(session.workdir, iteration, samples, texts, trained, held_out)
    page.write(session.workdir)
  result = {
    "evaluation/score": scoring.mean_of_finite(trained),
    "evaluation/failed": float(np.mean(~np.isfinite(total))),
  }
  for term in config.reward.watch:
    result[f"evaluation/{term}"] = scoring.mean_of_finite(scores[term][: len(trained)])
  if len(held_out):
    result["evaluation/held_out"] = scoring.mean_of_finite(held_out)
    result["evaluation/gap"] = result["evaluation/score"] - result["evaluation/held_out"]
  return Shown(values=result, pixels=pixels[: len(trained)], prompts=texts, scores=trained)


def described(iteration: int, shown: Shown) -> str:
  """The line for the user about an evaluation after so many iterations; 0 is the base model."""
  what = f"after iteration {iteration}" if iteration else "of the base model"
  line = f"evaluation {what}: score {shown.values['evaluation/score']:.4f}"
  if "evaluation/held_out" in shown.values:
    line += f", held out {shown.values['evaluation/held_out']:.4f}"
  if shown.values["evaluation/failed"]:
    line += f"; {shown.values['evaluation/failed']:.0%} of the rewards failed"
  return line


def save_extremes(session: Session, iteration: int, seen: Experience) -> None:
  """Saves the best and the worst sample of the first prompt, and all rewards, for the report.

  Args:
    session: of the run.
    iteration: number of finished iterations.
    seen: what the last one collected; nothing is saved where it has no samples, or no score.
  """
  terms = session.config.reward.terms
  rewards = sum(weight * np.asarray(seen.scores[term]) for term, weight in terms)
  total = rewards[0]
  if jax.process_index() == 0 and seen.media is not None and np.isfinite(total).any():
    best, worst = int(np.nanargmax(total)), int(np.nanargmin(total))
    page.save_extremes(
      workdir=session.workdir,
      iteration=iteration,
      best=seen.media.pixels[best],
      worst=seen.media.pixels[worst],
      fps=seen.media.fps,
      prompt=session.examples[int(seen.ids[0])].prompt,
      best_score=float(total[best]),
      worst_score=float(total[worst]),
      rewards=rewards.reshape(-1),
    )

"""Evaluation inside training, and pictures for the report."""

from collections.abc import Callable

import jax
import numpy as np

from dancegrpo_jax import scoring
from dancegrpo_jax.assembly import encoding
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.report import page
from dancegrpo_jax.rl.state import TrainState
from dancegrpo_jax.training.collecting import Experience
from dancegrpo_jax.training.session import Session
from dancegrpo_jax.types import Media


def show(
  session: Session, iteration: int, state: TrainState, say: Callable[[str], None]
) -> dict[str, float]:
  """A column of the report's grid: the first prompts, and held-out ones, with fixed noise and the
  deterministic sampler.

  Returns:
    Mean scores as metrics, and the gap: what training prompts are ahead of held-out ones.
  """
  config, model, run = session.config, session.model, session.shown_programs
  examples = sum(session.shown, [])
  (row,) = scoring.chunks(len(examples), len(examples) + config.mesh.lanes, config.mesh.lanes)
  weights = state.trainable if state.ema is None else state.ema
  conditioning = encoding.conditioning(config, session.encode_shown, [examples[i] for i in row])
  numbers = np.arange(len(row), dtype=np.int32)
  latents = run.sample(
    weights, model.frozen, conditioning, numbers, numbers, np.int32(config.evaluation.seed)
  )
  media = run.decode(model.frozen, latents)
  pixels = sharding.to_host(media.pixels)[: len(examples)]
  scores = scoring.score_all(
    model.rewards,
    model.reward_params,
    compute=run.score,
    media=Media(pixels, media.fps),
    features=session.shown_features,
    owners=np.arange(len(examples), dtype=np.int32),
    examples=examples,
    rows=row[None],
    say=say,
  )
  total = sum(weight * scores[term] for term, weight in config.reward.terms)
  trained, held_out = np.split(total, [len(session.shown[0])])
  if jax.process_index() == 0:
    texts = [example.prompt for example in session.shown[0]]
    page.save_samples(session.workdir, iteration, pixels[: len(trained)], texts, trained, held_out)
    page.write(session.workdir)
  found = {"evaluation/score": float(np.mean(trained))}
  if len(held_out):
    found["evaluation/held_out"] = float(np.mean(held_out))
    found["evaluation/gap"] = found["evaluation/score"] - found["evaluation/held_out"]
  return found


def save_extremes(session: Session, iteration: int, seen: Experience) -> None:
  """The best and the worst sample of the first group."""
  total = sum(
    weight * np.asarray(seen.scores[term])[0] for term, weight in session.config.reward.terms
  )
  if jax.process_index() == 0 and seen.pixels is not None and np.isfinite(total).any():
    best, worst = int(np.nanargmax(total)), int(np.nanargmin(total))
    page.save_extremes(
      session.workdir,
      iteration,
      seen.pixels[best],
      seen.pixels[worst],
      session.examples[int(seen.ids[0])].prompt,
      float(total[best]),
      float(total[worst]),
    )

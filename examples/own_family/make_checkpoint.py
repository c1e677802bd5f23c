"""Command: trains the base model on pictures that it draws itself, and writes its checkpoint.

    python -m examples.own_family.make_checkpoint --out=examples/own_family/checkpoint

The same command on the same machine writes the same bytes.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dancegrpo_jax import programs
from dancegrpo_jax.checkpoints import weights
from dancegrpo_jax.types import PyTree

from . import family, model, pictures, table

LENGTH = 4  # words that are read of a text
VOCABULARY = ("<pad>", "<other>", *pictures.COLOURS, *pictures.SHAPES)
WORDS = {"_class_name": "Words", "vocabulary": len(VOCABULARY), "width": 32}
MIXER = {
  "_class_name": "Mixer",
  "size": pictures.SIZE,
  "patch": 4,
  "width": 48,
  "hidden": 80,
  "blocks": 3,
  "text_width": WORDS["width"],
}
MODEL = {"mean": 0.25, "std": 0.35, "shift": 1.0}
BATCH, RATE = 128, 4e-3
EMA = 0.99


def write_json(file: Path, content: dict[str, Any]) -> None:
  """Writes a JSON file and the folders above it."""
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(content, indent=2) + "\n")


def pretrained(folder: Path, steps: int, seed: int = 0) -> dict[str, PyTree]:
  """Both networks after that many steps of rectified flow (arXiv 2209.03003).

  Args:
    folder: whose vocabulary is written already.
    steps: of AdamW.
    seed: of the parameters, the pictures and the noise.

  Returns:
    Averaged parameters, by "denoiser" and "words".
  """
  denoiser, words = model.mixer_from_json(MIXER), model.words_from_json(WORDS)
  tokenize = family.load_words(str(folder / "words"))
  captions = list(pictures.CAPTIONS)
  tokens = tokenize(captions)
  bank = pictures.batch(captions * 64, [seed])  # drawn once: drawing takes longer than training
  bank = (bank - MODEL["mean"]) / MODEL["std"]

  def loss(params: PyTree, batch: dict, key: jax.Array) -> tuple[jax.Array, dict]:
    x0, count = batch["pixels"], len(batch["pixels"])
    time_key, noise_key = jax.random.split(key)
    part = (jnp.arange(count) + jax.random.uniform(time_key, (count,))) / count  # stratified
    noise = jax.random.normal(noise_key, x0.shape)
    at = part.reshape(-1, 1, 1, 1)
    text = words.apply({"params": params["words"]}, batch["tokens"])
    found = denoiser.apply(
      {"params": params["denoiser"]}, (1 - at) * x0 + at * noise, model.TIME_SCALE * part, text
    )
    return jnp.square(found - (noise - x0)).mean(), {}

  keys = jax.random.split(jax.random.key(seed))
  start = {
    "words": words.init(keys[0], tokens[:1])["params"],
    "denoiser": denoiser.init(
      keys[1], jnp.zeros((1, *bank.shape[1:])), jnp.zeros(1), jnp.zeros((1, WORDS["width"]))
    )["params"],
  }
  schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, max(1, steps // 20), steps, RATE / 100)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99))
  step = programs.fit_step(loss, optimizer)
  state = (start, optimizer.init(start), jax.tree.map(jnp.copy, start))
  for number in range(steps):
    rows = np.random.default_rng([seed, number]).integers(len(bank), size=BATCH)
    batch = {"pixels": bank[rows], "tokens": tokens[rows % len(captions)]}
    key = jax.random.fold_in(jax.random.key(seed + 1), number)
    decay = min(EMA, (number + 1) / (number + 10))
    state, metrics = step(state, batch, key, np.float32(decay))
    if number % 200 == 0 or number == steps - 1:
      print(f"step {number}: loss {float(metrics['loss']):.4f}", flush=True)
  return state[2]


def write(folder: Path, steps: int) -> None:
  """Writes a checkpoint: JSON files, the vocabulary, and both networks' weights."""
  write_json(folder / "model.json", MODEL)
  write_json(folder / "words" / family.VOCABULARY, {"words": VOCABULARY, "length": LENGTH})
  params = pretrained(folder, steps)
  weights.save(folder / "mixer", table.MIXER, params["denoiser"], MIXER, dtype="float32")
  weights.save(folder / "words", table.WORDS, params["words"], WORDS, dtype="float32")


def main() -> None:
  """Reads the flags and makes the checkpoint."""
  parser = argparse.ArgumentParser(description="Make the base model of the example.")
  parser.add_argument("--out", required=True, help="folder to write")
  parser.add_argument("--steps", type=int, default=2000, help="of training")
  flags = parser.parse_args()
  start = time.monotonic()
  write(Path(flags.out), flags.steps)
  print(f"{flags.out}: made in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
  main()

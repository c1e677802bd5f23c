"""Command: trains the network on pictures that it draws itself, and writes its weight file.

    python -m examples.own_reward.make_weights --out=examples/own_reward

A picture is one colour with a few patches of other colours on it, all with noise.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dancegrpo_jax import programs
from dancegrpo_jax.checkpoints import weights
from dancegrpo_jax.data.emoji import COLOURS as RGB
from dancegrpo_jax.types import PyTree

from .model import COLOURS, SIDE, BackgroundJudge
from .reward import TABLE

BATCH, RATE = 256, 3e-3


def draw(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
  """(pixels `[count, SIDE, SIDE, 3]` in [0, 1], number of the background colour `[count]`)."""
  table = np.array([RGB[name] for name in COLOURS]) / 255
  labels = rng.integers(len(COLOURS), size=count)
  pixels = np.broadcast_to(table[labels][:, None, None], (count, SIDE, SIDE, 3)).copy()
  for picture in pixels:
    for _ in range(rng.integers(1, 6)):
      y, x = rng.integers(1, SIDE - 2, 2)
      height, width = rng.integers(1, 6, 2)
      picture[y : min(y + height, SIDE - 1), x : min(x + width, SIDE - 1)] = rng.uniform(size=3)
  noise = rng.uniform(0, 0.15, (count, 1, 1, 1)) * rng.standard_normal(pixels.shape)
  return np.clip(pixels + noise, 0, 1).astype(np.float32), labels.astype(np.int32)


def trained(steps: int, seed: int = 0) -> PyTree:
  """The averaged parameters after that many steps; prints the accuracy on new pictures."""
  network = BackgroundJudge()

  def loss(params: PyTree, batch: tuple, key: jax.Array) -> tuple[jax.Array, dict]:
    del key
    logits = network.apply({"params": params}, batch[0])
    right = (logits.argmax(-1) == batch[1]).mean()
    value = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
    return value, {"accuracy": right}

  params = network.init(jax.random.key(seed), jnp.zeros((1, SIDE, SIDE, 3)))["params"]
  optimizer = optax.adamw(optax.cosine_decay_schedule(RATE, steps))
  step = programs.fit_step(loss, optimizer)
  state = (params, optimizer.init(params), jax.tree.map(jnp.copy, params))
  for number in range(steps):
    batch = draw(np.random.default_rng([seed, number]), BATCH)
    decay = np.float32(min(0.98, (number + 1) / (number + 10)))
    state, _ = step(state, batch, jax.random.key(0), decay)
  _, metrics = loss(state[2], draw(np.random.default_rng([seed, steps]), 4096), None)
  print(f"{steps} steps: {float(metrics['accuracy']):.1%} of new pictures right")
  return state[2]


def main() -> None:
  """Reads the flags and makes the weight file."""
  parser = argparse.ArgumentParser(description="Make the weights of the example's reward.")
  parser.add_argument("--out", required=True, help="folder to write weights.safetensors into")
  parser.add_argument("--steps", type=int, default=600, help="of training")
  flags = parser.parse_args()
  print(weights.save(Path(flags.out), TABLE, trained(flags.steps)))


if __name__ == "__main__":
  main()

"""What training changes, and the one place where trained and frozen weights meet."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from dancegrpo_jax.rl.advantages import PromptStats
from dancegrpo_jax.types import PyTree


class TrainState(NamedTuple):
  """Everything that a checkpoint holds.

  Attributes:
    step: optimizer steps taken; skipped ones don't count.
    skipped: optimizer steps whose loss or gradient was not finite.
    trainable: `{component: params}`, float32; `{"lora": adapters}` where those alone are trained.
    opt_state: of optax.
    ema: running average of `trainable`, or None.
    prompt_stats: per-prompt reward statistics by signal, {} where they are off.
  """

  step: Int[Array, ""]
  skipped: Int[Array, ""]
  trainable: PyTree
  opt_state: Any
  ema: PyTree | None
  prompt_stats: dict[str, PromptStats]


def variables(frozen: PyTree, trainable: PyTree) -> PyTree:
  """All parameters of a pipeline, by component; adapters are one more."""
  return {**frozen, **trainable}


def create(trainable: PyTree, optimizer: optax.GradientTransformation, ema_decay: float, prompt_stats: dict) -> TrainState:
  """The state before the first iteration."""
  zero = jnp.zeros((), jnp.int32)
  ema = jax.tree.map(jnp.copy, trainable) if ema_decay else None
  return TrainState(zero, jnp.copy(zero), trainable, optimizer.init(trainable), ema, prompt_stats)

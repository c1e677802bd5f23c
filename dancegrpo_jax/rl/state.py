"""What training changes, and the one place where trained and frozen weights meet."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from dancegrpo_jax.rl import advantages
from dancegrpo_jax.rl.advantages import PromptStats
from dancegrpo_jax.types import PyTree


class TrainState(NamedTuple):
  """Everything that a checkpoint holds.

  Attributes:
    step: optimizer steps taken; skipped ones don't count.
    skipped: optimizer steps whose loss or gradient was not finite.
    trainable: any pytree of float32 arrays. Of a run it is `{component: params}`, or `{"lora":
      adapters}` where those alone are trained.
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


def create(
  trainable: PyTree,
  optimizer: optax.GradientTransformation,
  ema_decay: float = 0.0,
  prompt_stats: dict[str, PromptStats] | None = None,
) -> TrainState:
  """The state before the first iteration.

  Args:
    trainable: parameters, float32.
    optimizer: gradient clipping included.
    ema_decay: of the running average of the parameters; 0 keeps none.
    prompt_stats: `advantages.empty_stats` by signal, or None: no statistics over iterations.
  """
  zero = jnp.zeros((), jnp.int32)
  ema = jax.tree.map(jnp.copy, trainable) if ema_decay else None
  return TrainState(
    step=zero,
    skipped=jnp.copy(zero),
    trainable=trainable,
    opt_state=optimizer.init(trainable),
    ema=ema,
    prompt_stats=prompt_stats or {},
  )


def learning_rate(config: ConfigDict) -> Callable:
  """Optimizer step -> rate: linear warm-up from 0, then constant; a function of the absolute step
  alone.
  """
  o = config.optimizer
  if not o.warmup_steps:
    return optax.constant_schedule(o.learning_rate)
  return lambda step: o.learning_rate * jnp.minimum(1.0, (step + 1) / o.warmup_steps)


def optimizer_of(config: ConfigDict) -> optax.GradientTransformation:
  """AdamW behind a clip of the global gradient norm."""
  o = config.optimizer
  adam = optax.adamw(
    learning_rate(config), b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay
  )
  return optax.chain(optax.clip_by_global_norm(o.max_grad_norm), adam)


def init_state(config: ConfigDict, num_prompts: int, shardings: PyTree) -> Callable:
  """`trainable -> TrainState`, sharded: `create` with the config's optimizer and statistics.

  Args:
    config: validated.
    num_prompts: of the data set.
    shardings: of the TrainState, or None: on one device, not compiled.
  """
  size = config.advantage.history.size
  terms = config.reward.terms
  names = (
    (advantages.WEIGHTED_SUM,)
    if config.reward.combine == "rewards"
    else tuple(name for name, _ in terms)
  )

  def run(trainable: PyTree) -> TrainState:
    stats = {name: advantages.empty_stats(num_prompts, size) for name in names} if size else {}
    return create(trainable, optimizer_of(config), config.ema.decay, stats)

  return run if shardings is None else jax.jit(run, out_shardings=shardings, donate_argnums=0)

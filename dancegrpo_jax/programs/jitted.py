"""The only file that calls jax.jit.

Each function is compiled once: its shapes are static, and what changes from call to call (the
iteration, sample numbers, the bounds of a loop) is an argument.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array
from ml_collections import ConfigDict

from dancegrpo_jax.models import attention, lora
from dancegrpo_jax.rewards.base import Reward
from dancegrpo_jax.rl import rng
from dancegrpo_jax.types import PyTree

# libtpu may multiply with a kernel piece by piece while the pieces come around a ring of chips. Of
# a kernel of 3072 rows over 32 chips a piece is 96 rows. A matrix unit takes 128, and the sum is
# read and written once a piece, so that HunyuanVideo's rollout takes twice as long by plan. With
# this threshold in MiB, which is beyond every kernel, libtpu gathers kernels whole (0.0.42.1).
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 2**20}


def program(config: ConfigDict, name: str, function: Callable, **options: Any) -> Callable:
  """Jits a function of a run.

  Args:
    config: of the run. Its model.matmul_precision is that of all products in the function, and in
      its gradients.
    name: of the program, in profiles and in messages of XLA.
    function: what to compile.
    options: of `jax.jit`.

  The caller has entered the mesh with `jax.set_mesh`, by which the compiler's options are chosen.
  """

  @functools.wraps(function)
  def traced(*arguments):
    # "default" leaves the precision to JAX, whose own setting the user may have changed.
    if config.model.matmul_precision == "default":
      return function(*arguments)
    with jax.default_matmul_precision(config.model.matmul_precision):
      return function(*arguments)

  traced.__name__ = traced.__qualname__ = name.replace(" ", "_")
  compiler = TPU_OPTIONS if attention.place().platform == "tpu" else None
  return jax.jit(traced, compiler_options=compiler, **options)


def init_adapters(config: ConfigDict, adapters: PyTree, shardings: PyTree) -> PyTree:
  """LoRA's adapters before the first iteration, sharded and drawn from the config's seed."""
  key = rng.stream(config.seed, "lora")
  return jax.jit(lambda: lora.init(key, adapters), out_shardings=shardings)()


def embed(config: ConfigDict, reward: Reward) -> Callable:
  """`(reward params, Media) -> embeddings` of samples, for evaluate.py.

  Raises:
    ValueError: the reward has no embedding.
  """
  if reward.embed is None:
    raise ValueError(f"reward {reward.name} has no embedding")
  return program(config, f"embed {reward.name}", reward.embed)


def fit_step(loss: Callable, optimizer: optax.GradientTransformation) -> Callable:
  """One step of supervised training, for pretrain.py.

  Args:
    loss: `(params, batch, key) -> (loss, metrics)`.
    optimizer: applied to the whole parameter tree.

  Returns:
    `(state, batch, key, ema_decay) -> (state, metrics)` with state = (params, opt_state, ema). The
    state is donated.
  """

  def step(carry: tuple, batch: Any, key: Array, ema_decay: Array) -> tuple:
    params, opt_state, ema = carry
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    params = optax.apply_updates(params, updates)
    ema = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, ema, params)
    return (params, opt_state, ema), {"loss": value, **metrics}

  return jax.jit(step, donate_argnums=0)


def compiled(function: Callable) -> Callable:
  """Jits a function that a command calls once, outside of a run."""
  return jax.jit(function)

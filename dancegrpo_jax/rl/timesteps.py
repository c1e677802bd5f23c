"""Which policy steps of a sample are trained (DanceGRPO, arXiv 2505.07818, section 4.4)."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

MODES = ("first", "random", "last", "all")


def count(mode: str, fraction: float | int, policy_steps: int) -> int:
  """T, the number of trained steps a sample: fraction * policy_steps rounded down, at least 1;
  "all" ignores the fraction.

  Raises:
    ValueError: an unknown mode, a fraction outside (0, 1], or no policy step.
  """
  if mode not in MODES:
    raise ValueError(f"timesteps is {mode!r}, must be one of {', '.join(MODES)}")
  if policy_steps < 1:
    raise ValueError(f"there are {policy_steps} policy steps, training needs at least 1")
  if mode == "all":
    return policy_steps
  if not 0 < fraction <= 1:
    raise ValueError(f"timestep_fraction is {fraction}, must lie in (0, 1]")
  return max(1, math.floor(fraction * policy_steps + 1e-6))  # 0.29 * 100 is 28.999999999999996


def select(
  mode: str, fraction: float | int, policy_steps: int, batch_keys: Key[Array, "batch"]
) -> Int[Array, "batch trained"]:
  """The trained steps of each sample, `int32[B, T]`, ascending indices into the policy steps.

  Args:
    mode: "first" and "last" (the noisiest, the cleanest T steps), "random" (T of all, without
      replacement, for each sample on its own) or "all".
    fraction: share of the policy steps.
    policy_steps: number of steps to choose from.
    batch_keys: one key a sample, used by the random mode alone.

  Raises:
    ValueError: see `count`.
  """
  trained = count(mode, fraction, policy_steps)
  if mode == "random":
    return jax.vmap(
      lambda key: jnp.sort(jax.random.permutation(key, policy_steps)[:trained]).astype(jnp.int32)
    )(batch_keys)
  start = policy_steps - trained if mode == "last" else 0
  return jnp.broadcast_to(
    start + jnp.arange(trained, dtype=jnp.int32)[None], (batch_keys.shape[0], trained)
  )

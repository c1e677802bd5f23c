"""The SDE window (MixGRPO, arXiv 2507.21802): which steps of an iteration are stochastic and
trained.

The width is static, the start is a traced scalar, so one compiled program serves every position.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

MODES = ("fixed", "sliding", "random")


def size(config_window: Any, policy_steps: int) -> int:
  """K, the window's static width in steps; a configured size of 0 means every policy step, whatever
  its start.

  Raises:
    ValueError: a window that is wider than the policy or starts where it doesn't fit.
  """
  width = config_window.size or policy_steps
  if not 1 <= width <= policy_steps:
    raise ValueError(
      f"window.size is {config_window.size}, must lie between 0 and the {policy_steps} policy steps"
    )
  has_start = config_window.size and config_window.mode != "random"
  if has_start and not 0 <= config_window.start <= policy_steps - width:
    raise ValueError(
      f"window.start is {config_window.start}, must lie between 0 and {policy_steps - width} for"
      f" {width} of {policy_steps} steps"
    )
  return width


def window(
  config_window: Any, policy_steps: int, iteration: Int[Array, ""] | int, key: PRNGKeyArray
) -> Int[Array, ""]:
  """First step of the window in this iteration, 0 <= start <= policy_steps - K.

  Modes:
    fixed: the window stays at `start`.
    random: it is drawn anew in each iteration, uniformly over all positions.
    sliding: it begins at `start` and moves by `stride` every `interval` iterations. A move that
      would leave the grid stops at the last position, so that the last steps are trained too, and
      the move after that goes back to 0.

  Args:
    config_window: has size, mode, start, stride and interval (the config's sampler.window).
    policy_steps: number of steps that may be stochastic.
    iteration: may be traced.
    key: used by the random mode alone; derive it from (seed, iteration).

  Raises:
    ValueError: an unknown mode, or values out of range.
  """
  last = policy_steps - size(config_window, policy_steps)
  if config_window.mode == "fixed":
    return jnp.asarray(min(config_window.start, last), jnp.int32)
  if config_window.mode == "random":
    return jax.random.randint(key, (), 0, last + 1, jnp.int32)
  if config_window.mode == "sliding":
    return _sliding(
      min(config_window.start, last), config_window.stride, config_window.interval, last, iteration
    )
  raise ValueError(f"window.mode is {config_window.mode!r}, must be one of {', '.join(MODES)}")


def _sliding(
  start: int, stride: int, interval: int, last: int, iteration: Int[Array, ""] | int
) -> Int[Array, ""]:
  if stride < 1 or interval < 1:
    raise ValueError(
      f"window.stride and window.interval must be at least 1, got {stride} and {interval}"
    )
  moves = jnp.asarray(iteration, jnp.int32) // interval
  first_round = -(-(last - start) // stride) + 1  # positions from `start` to `last`
  full_round = -(-last // stride) + 1  # positions from 0 to `last`
  position = jnp.where(
    moves < first_round, start + stride * moves, stride * ((moves - first_round) % full_round)
  )
  return jnp.minimum(position, last)

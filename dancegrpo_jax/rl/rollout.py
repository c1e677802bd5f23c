"""Sampling as a policy: one `lax.scan` over the grid, stochastic inside the window and
deterministic outside.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dancegrpo_jax.diffusion import predictions, transitions
from dancegrpo_jax.diffusion.schedules import Schedule, point
from dancegrpo_jax.diffusion.transitions import Transition

LAST_STEPS = ("ode", "x0hat", "sde")


class Policy(NamedTuple):
  """The static choices of a sampler; the field names are those of the config's `sampler` section.

  Attributes:
    kind: of a stochastic step: ddim | dance | flow | cps.
    noise_level: of a stochastic step, without a unit; see `transitions.transition`. At 0 nothing is
      random, and nothing is learned.
    prediction: what the network's output means: epsilon | v | velocity.
    steps: N, of the grid.
    window: K, stochastic steps; None makes every step stochastic that may be, 0 samples
      deterministically.
    outside: kind of a step outside the window: ode | dpm++.
    last_step: kind of the last step where it is not in the window: ode | x0hat; "sde" is the
      policy's own.
    log_prob: how a step's log-density is reduced over the sample's dimensions: mean | sum.
  """

  kind: str
  noise_level: float
  prediction: str
  steps: int
  window: int | None = None
  outside: str = "ode"
  last_step: str = "ode"
  log_prob: str = "mean"

  @property
  def policy_steps(self) -> int:
    """Steps that may be stochastic: all but a deterministic last one."""
    return self.steps if self.last_step == "sde" else self.steps - 1

  @property
  def width(self) -> int:
    """K, the number of stochastic steps."""
    return self.policy_steps if self.window is None else self.window


def check_policy(policy: Policy, schedule: Schedule) -> None:
  """Compares a policy with a grid. JAX itself would clamp an index out of range and go on.

  Raises:
    ValueError: a choice that is unknown or does not fit the grid.
  """
  transitions.check_kind(policy.kind, policy.prediction)
  transitions.check_kind(policy.outside, policy.prediction)
  if policy.last_step not in LAST_STEPS:
    raise ValueError(f"last_step is {policy.last_step!r}, must be one of {', '.join(LAST_STEPS)}")
  if not 0 <= policy.width <= policy.policy_steps:
    raise ValueError(
      f"window is {policy.window}, must lie between 0 and the {policy.policy_steps} policy steps"
    )
  grid = len(schedule.model_time) - 1
  if policy.steps != grid:
    raise ValueError(f"the policy has {policy.steps} steps and the schedule {grid}")


class Rollout(NamedTuple):
  """A batch of trajectories; only the K stochastic steps are kept. `latents[k + 1]` is the action
  taken at `latents[k]`.

  Attributes:
    step_index: `[K]`, places of the stochastic steps in the grid.
    latents: `[K + 1, batch, ...]`, float32.
    log_probs: `[K, batch]`, of each action, as the rollout computed it.
    sample: `[batch, ...]`, the final latents.
  """

  step_index: Int[Array, "steps"]
  latents: Float[Array, "states batch *shape"]
  log_probs: Float[Array, "steps batch"]
  sample: Float[Array, "batch *shape"]


def distribution(
  policy: Policy,
  schedule: Schedule,
  i: Int[Array, "batch"],
  x: Float[Array, "batch *shape"],
  output: Array,
) -> Transition:
  """p(x_next | x) at grid steps `i`, one a sample: what rollout draws from and the update scores.

  The equations and their sources are in diffusion/transitions.py.

  Args:
    policy: the sampler.
    schedule: its grid.
    i: index of each sample's step.
    x: latents before the step.
    output: the network's (guided) output there.

  Returns:
    Transition with a mean `[batch, *shape]` and a std `[batch]`.

  Raises:
    ValueError: as `transitions.transition`.
  """

  def one(i, x, output):
    here = point(schedule, i)
    prediction = predictions.from_output(policy.prediction, x, output, here.alpha, here.sigma)
    return transitions.transition(
      policy.kind, policy.prediction, policy.noise_level, here, x, prediction
    )

  return jax.vmap(one)(i, x, output)


def log_prob(
  transition: Transition, x_next: Float[Array, "batch *shape"], reduce: str = "mean"
) -> Float[Array, "batch"]:
  """log p(x_next | x) of a batch, in nats: `transitions.log_prob` of each sample.

  Args:
    transition: of `distribution`.
    x_next: where each sample went.
    reduce: "mean" over a sample's dimensions (DanceGRPO) or "sum" (the true density).

  Raises:
    ValueError: an unknown `reduce`.
  """
  return jax.vmap(lambda t, x: transitions.log_prob(t, x, reduce))(transition, x_next)


def rollout(
  network_output: Callable[[Array, Array], Array],
  schedule: Schedule,
  policy: Policy,
  initial: Float[Array, "batch *shape"],
  step_noise: Callable[[Int[Array, ""]], Float[Array, "batch *shape"]],
  start: Int[Array, ""] | int = 0,
) -> Rollout:
  """Samples a batch with N calls of `network_output`.

  Args:
    network_output: `(x [batch, ...], model_time [batch]) -> output`, conditioning and guidance
      included.
    schedule: N steps.
    policy: the sampler.
    initial: x_T, standard normal.
    step_noise: `(i) -> noise [batch, ...]`, standard normal, of grid step i, which is traced. It is
      not called where the window is 0.
    start: first step of the window, traced or not; 0 <= start <= policy_steps - window. 0 where
      the policy has no window.

  Raises:
    ValueError: as `check_policy`.
  """
  check_policy(policy, schedule)
  batch = initial.shape[0]

  def stochastic(i, x, output, history):
    steps = jnp.broadcast_to(i, (batch,))
    transition = distribution(policy, schedule, steps, x, output)
    spread = transition.std.reshape(-1, *(1,) * (x.ndim - 1))
    x_next = transition.mean + spread * step_noise(i)
    return (
      x_next,
      log_prob(transition, x_next, policy.log_prob),
      jax.vmap(transitions.empty_history)(x),
    )

  def deterministic(i, x, output, history):
    here = point(schedule, i)

    def go(kind):
      def one(x, output, history):
        prediction = predictions.from_output(policy.prediction, x, output, here.alpha, here.sigma)
        transition, new = transitions.step(
          kind, policy.prediction, 0.0, here, x, prediction, history
        )
        return transition.mean, new

      return jax.vmap(one)(x, output, history)

    if policy.last_step == "x0hat":
      x_next, history = jax.lax.cond(
        i == policy.steps - 1, lambda: go("x0hat"), lambda: go(policy.outside)
      )
    else:
      x_next, history = go(policy.outside)
    return x_next, jnp.zeros((batch,), jnp.float32), history

  def step(carry, i):
    x, history = carry
    output = network_output(x, jnp.broadcast_to(schedule.model_time[i], (batch,)))
    if policy.width:
      inside = (i >= start) & (i < start + policy.width)
      x_next, score, history = jax.lax.cond(
        inside, stochastic, deterministic, i, x, output, history
      )
    else:
      x_next, score, history = deterministic(i, x, output, history)
    return (x_next, history), (x, score)

  first = (initial.astype(jnp.float32), jax.vmap(transitions.empty_history)(initial))
  (sample, _), (before, scores) = jax.lax.scan(
    step, first, jnp.arange(policy.steps, dtype=jnp.int32)
  )
  states = jnp.concatenate([before, sample[None]])
  return Rollout(
    step_index=start + jnp.arange(policy.width, dtype=jnp.int32),
    latents=jax.lax.dynamic_slice_in_dim(states, start, policy.width + 1),
    log_probs=jax.lax.dynamic_slice_in_dim(scores, start, policy.width),
    sample=sample,
  )

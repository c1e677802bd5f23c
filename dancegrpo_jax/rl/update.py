"""The GRPO update: optimizer steps over shuffled (sample, step) transitions, in microbatches, as
one traced function.

Samples lie in `lanes`: the batch axis of every array here is `[lanes, samples of a lane]`. A
permutation acts within a lane and each microbatch takes equally from every lane, so that a device
that owns whole lanes never fetches a trajectory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, Float, Int, Key

from dancegrpo_jax.diffusion import transitions
from dancegrpo_jax.diffusion.schedules import Point, Schedule
from dancegrpo_jax.rl import objective, timesteps
from dancegrpo_jax.rl.rollout import Policy, distribution, log_prob
from dancegrpo_jax.rl.state import TrainState
from dancegrpo_jax.types import PyTree


class Objective(NamedTuple):
  """Static choices of the update; the names are those of the config's objective and optimizer
  sections.
  """

  clip_range: float
  old_log_prob: str
  timesteps: str
  timestep_fraction: float
  guard: bool
  kl_weight: float
  kl_mode: str
  updates: int
  microbatch: int
  ema_decay: float


class Batch(NamedTuple):
  """The trajectories of an iteration, in lanes.

  Attributes:
    step_index: grid index of the K policy steps.
    latents: float32.
    log_probs: the rollout's.
    prompt: row of the conditioning.
    advantage: 0 where the weight is 0.
    weight: 1, or 0 for samples that are left out.
  """

  step_index: Int[Array, "steps"]
  latents: Float[Array, "states lanes samples *shape"]
  log_probs: Float[Array, "steps lanes samples"]
  prompt: Int[Array, "lanes samples"]
  advantage: Float[Array, "lanes samples"]
  weight: Float[Array, "lanes samples"]


class Transitions(NamedTuple):
  """A microbatch of m transitions."""

  step: Int[Array, "m"]
  x: Float[Array, "m *shape"]
  x_next: Float[Array, "m *shape"]
  rollout_log_prob: Float[Array, "m"]
  prompt: Int[Array, "m"]
  advantage: Float[Array, "m"]
  weight: Float[Array, "m"]


class Scored(NamedTuple):
  """The policy at a microbatch: log-prob of the actions, mean, std and network output."""

  log_prob: Float[Array, "m"]
  mean: Float[Array, "m *shape"]
  std: Float[Array, "m"]
  output: Float[Array, "m *shape"]


Denoise = Callable[
  [PyTree, Array, Array, Int[Array, "m"]], Array
]  # (trainable, x, model_time, prompt) -> guided output


def partition(
  key: Key[Array, ""], selected: Int[Array, "lanes samples trained"], updates: int, microbatch: int
) -> tuple:
  """Shuffles each lane's (sample, step) pairs and deals them out.

  Returns:
    (sample, step), both int32 `[updates, microbatches, lanes, microbatch / lanes]`: positions in
    the lane and in the K steps.
  """
  lanes, samples, trained = selected.shape
  keys = jax.vmap(lambda lane: jax.random.fold_in(key, lane))(jnp.arange(lanes))
  order = jax.vmap(lambda k: jax.random.permutation(k, samples * trained))(keys)
  pairs = (order // trained, jnp.take_along_axis(selected.reshape(lanes, -1), order, axis=1))

  def deal(x: Array) -> Array:
    return rearrange(x, "l (u m s) -> u m l s", u=updates, s=microbatch // lanes).astype(jnp.int32)

  return tuple(map(deal, pairs))


def gather(batch: Batch, sample: Int[Array, "lanes m"], step: Int[Array, "lanes m"]) -> Transitions:
  """The transitions of one microbatch; each lane indexes itself."""

  def lane(latents, log_probs, prompt, advantage, weight, sample, step):
    return (
      batch.step_index[step],
      latents[step, sample],
      latents[step + 1, sample],
      log_probs[step, sample],
      prompt[sample],
      advantage[sample],
      weight[sample],
    )

  axes = (1, 1, 0, 0, 0, 0, 0)
  rows = jax.vmap(lane, axes)(
    batch.latents, batch.log_probs, batch.prompt, batch.advantage, batch.weight, sample, step
  )
  t = Transitions(*(rearrange(row, "l m ... -> (l m) ...") for row in rows))

  def sound(x: Array) -> Array:
    """A sample that is left out may hold NaN, and 0 * NaN is NaN: it must not enter the arithmetic
    at all.
    """
    return jnp.where(t.weight.reshape(-1, *(1,) * (x.ndim - 1)) > 0, x, 0.0)

  return t._replace(
    x=sound(t.x), x_next=sound(t.x_next), rollout_log_prob=sound(t.rollout_log_prob)
  )


def score(
  denoise: Denoise, schedule: Schedule, policy: Policy, trainable: PyTree, t: Transitions
) -> Scored:
  """The policy's density at the transitions' actions: the update's own forward, for old and new
  parameters alike.
  """
  output = denoise(trainable, t.x, schedule.model_time[t.step], t.prompt)
  transition = distribution(policy, schedule, t.step, t.x, output)
  return Scored(
    log_prob(transition, t.x_next, policy.log_prob), transition.mean, transition.std, output
  )


def transition_losses(
  settings: Objective,
  policy: Policy,
  schedule: Schedule,
  t: Transitions,
  new: Scored,
  old: Scored,
  reference: Scored | None,
) -> tuple[Float[Array, "m"], dict[str, Float[Array, "m"]]]:
  """Loss and statistics of every transition.

  Args:
    settings, policy, schedule: static choices and grid.
    t: the transitions.
    new: the policy that is trained.
    old: the policy that the ratio is taken to; its mean is used by GRPO-Guard alone.
    reference: the policy that a KL penalty holds to, or None.
  """
  log_ratio = objective.log_ratio(new.log_prob, old.log_prob)
  guard_weight = 1.0
  if settings.guard:
    log_ratio = jax.vmap(objective.guard_log_ratio)(new.mean, old.mean, new.std, t.x_next)
    guard_weight = objective.guard_weight(schedule.sigma[t.step], schedule.sigma[t.step + 1])
  ratio = jnp.exp(log_ratio)
  losses = guard_weight * objective.surrogate(ratio, t.advantage, settings.clip_range)
  stats = {
    "ratio": ratio,
    "clipped": objective.is_clipped(ratio, t.advantage, settings.clip_range).astype(jnp.float32),
    "approx_kl": jnp.expm1(log_ratio)
    - log_ratio,  # ratio - 1 has no digits left at a ratio of 1 + 1e-4
    "kl": jnp.zeros_like(losses),
  }
  if reference is not None:

    def distance(step, new, reference):
      here = Point(
        *(
          value[step]
          for value in (schedule.alpha, schedule.sigma, schedule.alpha[1:], schedule.sigma[1:])
        )
      )
      return transitions.kl(
        settings.kl_mode,
        kind=policy.kind,
        prediction_type=policy.prediction,
        reduce=policy.log_prob,
        point=here,
        transition=transitions.Transition(new.mean, new.std),
        reference=transitions.Transition(reference.mean, reference.std),
        output=new.output,
        reference_output=reference.output,
      )

    stats["kl"] = jax.vmap(distance)(t.step, new, reference)
    losses = losses + settings.kl_weight * stats["kl"]
  return losses, stats


def _keep(scored: Scored, settings: Objective) -> Scored:
  """What has to be stored of the old policy: means only where GRPO-Guard wants them."""
  empty = jnp.zeros((), jnp.float32)
  return scored._replace(mean=scored.mean if settings.guard else empty, std=empty, output=empty)


def update(
  denoise: Denoise,
  schedule: Schedule,
  policy: Policy,
  settings: Objective,
  optimizer: optax.GradientTransformation,
  state: TrainState,
  reference: PyTree | None,
  batch: Batch,
  keys: tuple[Key[Array, "samples"], Key[Array, ""]],
) -> tuple[TrainState, dict[str, Array]]:
  """One iteration's optimizer steps.

  Args:
    denoise: `(trainable, x, model_time, prompt) -> guided output`.
    schedule: the grid.
    policy: the sampler.
    settings: static choices.
    optimizer: gradient clipping included.
    state: before; its fields `step, skipped, trainable, opt_state, ema` change.
    reference: trainable parameters of the KL's reference, or None.
    batch: in lanes.
    keys: one a sample for the choice of steps (lane by lane), and one for the shuffling.

  Returns:
    The state after, and metrics: ratio, clipped share and approximate KL over all transitions,
    loss, gradient norm, and the drift of the two sources of old log-probs before the first
    optimizer step.
  """
  lanes, samples = batch.prompt.shape
  window = batch.step_index.shape[0]
  selected = timesteps.select(settings.timesteps, settings.timestep_fraction, window, keys[0])
  dealt = partition(
    keys[1], selected.reshape(lanes, samples, -1), settings.updates, settings.microbatch
  )

  def forward(parameters: PyTree, t: Transitions) -> Scored:
    return score(denoise, schedule, policy, parameters, t)

  def old_policy(_, indices):
    return None, _keep(forward(state.trainable, gather(batch, *indices)), settings)

  # The first optimizer step's old policy is the policy itself, so only the later steps need a pass
  # of their own.
  later = jax.tree.map(lambda x: x[1:].reshape(-1, *x.shape[2:]), dealt)
  old = None
  if settings.old_log_prob == "recompute" and settings.updates > 1:
    old = jax.lax.scan(old_policy, None, later)[1]
    count = settings.updates - 1
    old = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), old)
    old = jax.tree.map(
      lambda x: jnp.concatenate([jnp.zeros_like(x[:1]), x]), old
    )  # row 0 is never used

  def loss(trainable, t: Transitions, old: Scored | None, first, total):
    new = forward(trainable, t)
    frozen = _keep(jax.lax.stop_gradient(new), settings)
    if settings.old_log_prob == "rollout":
      behind = frozen._replace(log_prob=t.rollout_log_prob)
    else:
      behind = (
        frozen if old is None else jax.tree.map(lambda a, b: jnp.where(first, a, b), frozen, old)
      )
    held = None if reference is None else jax.lax.stop_gradient(forward(reference, t))
    losses, stats = transition_losses(settings, policy, schedule, t, new, behind, held)
    stats["rollout_drift"] = jnp.abs(jnp.expm1(new.log_prob - t.rollout_log_prob))
    return jnp.sum(t.weight * losses) / total, jax.lax.stop_gradient(stats | {"weight": t.weight})

  def optimizer_step(carry, row):
    step, skipped, trainable, opt_state, ema = carry
    indices, old, number = row
    # The sum of weights over the whole optimizer step, before its microbatches are scanned.
    weight = jax.vmap(lambda w, s: w[s], (0, 1), 1)(batch.weight, indices[0])
    total = jnp.maximum(weight.sum(), 1.0)

    def microbatch(carry, row):
      gradient, value = carry
      indices, old = row
      t = gather(batch, *indices)
      (part, stats), g = jax.value_and_grad(loss, has_aux=True)(
        trainable, t, old, number == 0, total
      )
      return (jax.tree.map(jnp.add, gradient, g), value + part), stats

    zero = (jax.tree.map(jnp.zeros_like, trainable), jnp.zeros((), jnp.float32))
    (gradient, value), stats = jax.lax.scan(microbatch, zero, (indices, old))
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    changes, new_opt_state = optimizer.update(gradient, opt_state, trainable)
    new = (optax.apply_updates(trainable, changes), new_opt_state)
    trainable, opt_state = jax.tree.map(
      lambda a, b: jnp.where(finite, a, b), new, (trainable, opt_state)
    )
    if ema is not None:
      decay = jnp.where(finite, settings.ema_decay, 1.0)
      ema = jax.tree.map(
        lambda e, p: decay * e + (1.0 - decay) * p.astype(jnp.float32), ema, trainable
      )
    carry = (
      step + finite.astype(jnp.int32),
      skipped + (~finite).astype(jnp.int32),
      trainable,
      opt_state,
      ema,
    )
    return carry, (stats, value, norm, finite)

  first = (state.step, state.skipped, state.trainable, state.opt_state, state.ema)
  rows = (dealt, old, jnp.arange(settings.updates))
  (step, skipped, trainable, opt_state, ema), (stats, values, norms, finite) = jax.lax.scan(
    optimizer_step, first, rows
  )
  new_state = TrainState(step, skipped, trainable, opt_state, ema, state.prompt_stats)
  return new_state, _metrics(stats, values, norms, finite)


def _metrics(stats: dict[str, Any], values: Array, norms: Array, finite: Array) -> dict[str, Array]:
  """Scalars out of the statistics `[updates, microbatches, m]`; samples of weight 0 stay out."""
  weight = stats["weight"]
  total = jnp.maximum(weight.sum(), 1.0)

  def mean(name: str) -> Array:
    return jnp.where(weight > 0, stats[name], 0.0).sum() / total

  ratio, used = stats["ratio"], weight > 0
  return {
    "ratio/mean": mean("ratio"),
    "ratio/min": jnp.min(jnp.where(used, ratio, 1.0)),
    "ratio/max": jnp.max(jnp.where(used, ratio, 1.0)),
    "ratio/drift_max": jnp.max(jnp.where(used, jnp.abs(ratio - 1.0), 0.0)[0]),
    "ratio/rollout_drift_max": jnp.max(jnp.where(used, stats["rollout_drift"], 0.0)[0]),
    "clip_fraction": mean("clipped"),
    "approx_kl": mean("approx_kl"),
    "kl": mean("kl"),
    "loss": values.mean(),
    "grad_norm": norms.mean(),
    "optimizer/skipped": jnp.sum(~finite),
  }

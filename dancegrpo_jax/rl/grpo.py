"""GRPO over denoising trajectories: the items are (sample, step) pairs, the loss is a surrogate of
the importance ratio (DanceGRPO, arXiv 2505.07818, eq. (8); Flow-GRPO, arXiv 2505.05470).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dancegrpo_jax.diffusion import transitions
from dancegrpo_jax.diffusion.schedules import Schedule, point
from dancegrpo_jax.rl import objective, timesteps
from dancegrpo_jax.rl.optimize import Algorithm
from dancegrpo_jax.rl.rollout import Policy, distribution, log_prob
from dancegrpo_jax.rl.trajectories import Batch, Keys, Transitions, gather, partition
from dancegrpo_jax.types import PyTree


class Objective(NamedTuple):
  """Static choices that GRPO and its relatives share; the names are those of the config's objective
  and optimizer sections.

  Attributes:
    old_log_prob: recompute | rollout: where the old policy's log-probs come from.
    timesteps: first | random | last | all, see `timesteps.select`.
    timestep_fraction: share of the policy steps that is trained, in (0, 1].
    kl_weight: of the penalty that holds the policy to a reference; 0 for none.
    kl_mode: exact | no_dt | mean_mse | velocity_mse, see `transitions.kl`.
    updates: optimizer steps an iteration.
    microbatch: transitions in one forward and backward pass; `updates * microbatch` must divide
      the number of transitions.
  """

  old_log_prob: str = "recompute"
  timesteps: str = "random"
  timestep_fraction: float = 0.6
  kl_weight: float = 0.0
  kl_mode: str = "exact"
  updates: int = 1
  microbatch: int = 256


OLD_LOG_PROBS = ("recompute", "rollout")


class Scored(NamedTuple):
  """The policy at a microbatch: log-prob of the actions, mean, std and network output."""

  log_prob: Float[Array, "m"]
  mean: Float[Array, "m *shape"]
  std: Float[Array, "m"]
  output: Float[Array, "m *shape"]


class Remembered(NamedTuple):
  """The old policy at a microbatch, as far as it has to be stored.

  Attributes:
    log_prob: of the actions.
    mean: None where the surrogate does not read it.
  """

  log_prob: Float[Array, "m"]
  mean: Float[Array, "m *shape"] | None


class Surrogate(NamedTuple):
  """What a transition's loss is.

  Attributes:
    loss: `(transitions, new policy, old policy, schedule) -> (loss f32[m], {name: f32[m]})`. The
      statistics hold "ratio" and "approx_kl", and those of `reports`.
    reports: names of further statistics; their means become metrics.
    needs_means: whether it reads the old policy's means, which then have to be stored.
  """

  loss: Callable[[Transitions, Scored, Remembered, Schedule], tuple[Array, dict[str, Array]]]
  reports: tuple[str, ...] = ()
  needs_means: bool = False


# (trainable, x, model_time, prompt) -> guided output
PolicyOutput = Callable[[PyTree, Array, Array, Int[Array, "m"]], Array]


def clipped(clip_range: float, guard: bool = False) -> Surrogate:
  """PPO's clipped surrogate (arXiv 1707.06347, eq. (7)), as DanceGRPO has it.

  Args:
    clip_range: c; the ratio counts within [1 - c, 1 + c]. It belongs to how the policy reduces its
      log-probs: DanceGRPO has 1e-4 for "mean", PPO 0.2 for "sum".
    guard: the ratio and the weight of GRPO-Guard (arXiv 2510.22319); it needs the objective's
      `old_log_prob` to be "recompute".
  """

  def loss(t: Transitions, new: Scored, old: Remembered, schedule: Schedule) -> tuple[Array, dict]:
    log_ratio = objective.log_ratio(new.log_prob, old.log_prob)
    weight: Array | float = 1.0
    if guard:
      assert old.mean is not None  # because of needs_means
      log_ratio = jax.vmap(objective.guard_log_ratio)(new.mean, old.mean, new.std, t.x_next)
      weight = objective.guard_weight(schedule.sigma[t.step], schedule.sigma[t.step + 1])
    ratio = jnp.exp(log_ratio)
    losses = weight * objective.surrogate(ratio, t.advantage, clip_range)
    outside = objective.is_clipped(ratio, t.advantage, clip_range)
    return losses, {
      "ratio": ratio,
      "clip_fraction": outside.astype(jnp.float32),
      "approx_kl": objective.approximate_kl(log_ratio),
    }

  return Surrogate(loss=loss, reports=("clip_fraction",), needs_means=guard)


def remembers(settings: Objective) -> bool:
  """Whether the old policy needs a pass of its own: the first optimizer step's old policy is the
  policy itself, later ones' is not.
  """
  return settings.old_log_prob == "recompute" and settings.updates > 1


def algorithm(
  policy_output: PolicyOutput,
  schedule: Schedule,
  policy: Policy,
  settings: Objective,
  surrogate: Surrogate,
  reference: PyTree | None = None,
) -> Algorithm:
  """GRPO for the engine; its batch is a `Batch`, its keys are `Keys`.

  Args:
    policy_output: `(trainable, x, model_time, prompt) -> guided output`.
    schedule: the grid.
    policy: the sampler that drew the trajectories.
    settings: static choices.
    surrogate: what a transition's loss is: `clipped`, `dppo.trust_region`, or one's own.
    reference: trainable parameters that a KL penalty holds to; None where its weight is 0.

  Its metrics are ratio, approximate KL and the surrogate's own statistics over all transitions, and
  the drift of the two sources of old log-probs before the first optimizer step.

  Raises:
    ValueError: an unknown `old_log_prob`, one that lacks what the surrogate needs, or a KL mode
      that has no meaning for the policy. The loss raises it for a KL penalty without a reference.
  """
  if settings.old_log_prob not in OLD_LOG_PROBS:
    raise ValueError(
      f"old_log_prob is {settings.old_log_prob!r}, must be one of {', '.join(OLD_LOG_PROBS)}"
    )
  recomputes = settings.old_log_prob == "recompute"
  if surrogate.needs_means and not recomputes:
    raise ValueError("this surrogate needs the old policy's means: set old_log_prob to 'recompute'")
  if reference is not None:
    transitions.check_kl(settings.kl_mode, policy.kind, policy.prediction)

  def forward(trainable: PyTree, t: Transitions) -> Scored:
    return score(policy_output, schedule, policy, trainable, t)

  def remembered_of(log_prob: Array, mean: Array) -> Remembered:
    return Remembered(log_prob=log_prob, mean=mean if surrogate.needs_means else None)

  def remember(trainable: PyTree, t: Transitions) -> Remembered:
    old = forward(trainable, t)
    return remembered_of(old.log_prob, old.mean)

  def blank(t: Transitions) -> tuple[Remembered, dict[str, Array]]:
    numbers = jnp.zeros_like(t.weight)
    names = ("weight", "ratio", "approx_kl", "kl", "rollout_drift", *surrogate.reports)
    return remembered_of(numbers, jnp.zeros_like(t.x)), dict.fromkeys(names, numbers)

  def deal(batch: Batch, keys: Keys) -> tuple[Array, Array]:
    count, samples = batch.prompt.shape
    selected = timesteps.select(
      settings.timesteps, settings.timestep_fraction, batch.step_index.shape[0], keys[0]
    )
    in_rows = selected.reshape(count, samples, -1)
    return partition(keys[1], in_rows, settings.updates, settings.microbatch)

  def weigh(batch: Batch, items: tuple[Array, Array]) -> Float[Array, "m"]:
    return jax.vmap(lambda weight, sample: weight[sample])(batch.weight, items[0]).reshape(-1)

  def loss(
    trainable: PyTree, t: Transitions, remembered: Remembered | None, is_first: Array
  ) -> tuple:
    new = forward(trainable, t)
    now = jax.lax.stop_gradient(remembered_of(new.log_prob, new.mean))
    if not recomputes:
      old = now._replace(log_prob=t.rollout_log_prob)
    elif remembered is None:  # there is one optimizer step: the policy is the old one
      old = now
    else:
      old = jax.tree.map(lambda a, b: jnp.where(is_first, a, b), now, remembered)
    losses, statistics = surrogate.loss(t, new, old, schedule)
    statistics["kl"] = jnp.zeros_like(losses)
    if reference is None and settings.kl_weight:
      raise ValueError(f"kl_weight is {settings.kl_weight}: this penalty needs a reference")
    if reference is not None:
      held = jax.lax.stop_gradient(forward(reference, t))
      statistics["kl"] = _distances(settings.kl_mode, policy, schedule, t, new, held)
      losses = losses + settings.kl_weight * statistics["kl"]
    drift = jnp.abs(jnp.expm1(new.log_prob - t.rollout_log_prob))
    return losses, statistics | {"rollout_drift": drift, "weight": t.weight}

  return Algorithm(
    deal=deal,
    take=gather,
    weigh=weigh,
    blank=blank,
    remember=remember if remembers(settings) else None,
    loss=loss,
    metrics=summary,
  )


def score(
  policy_output: PolicyOutput,
  schedule: Schedule,
  policy: Policy,
  trainable: PyTree,
  t: Transitions,
) -> Scored:
  """The policy's density at the transitions' actions, for old and new parameters alike."""
  output = policy_output(trainable, t.x, schedule.model_time[t.step], t.prompt)
  transition = distribution(policy, schedule, t.step, t.x, output)
  return Scored(
    log_prob=log_prob(transition, t.x_next, policy.log_prob),
    mean=transition.mean,
    std=transition.std,
    output=output,
  )


def _distances(
  mode: str, policy: Policy, schedule: Schedule, t: Transitions, new: Scored, held: Scored
) -> Float[Array, "m"]:
  """How far the policy is from the reference at each transition; see `transitions.kl`."""

  def distance(step: Array, new: Scored, held: Scored) -> Float[Array, ""]:
    return transitions.kl(
      mode,
      kind=policy.kind,
      prediction_type=policy.prediction,
      reduce=policy.log_prob,
      point=point(schedule, step),
      transition=transitions.Transition(new.mean, new.std),
      reference=transitions.Transition(held.mean, held.std),
      output=new.output,
      reference_output=held.output,
    )

  return jax.vmap(distance)(t.step, new, held)


def summary(statistics: dict[str, Float[Array, "u n m"]]) -> dict[str, Array]:
  """Scalars out of the statistics; samples of weight 0 stay out.

  What a surrogate reports, for example "clip_fraction", becomes its mean over the transitions.
  """
  weight = statistics["weight"]
  used, total = weight > 0, jnp.maximum(weight.sum(), 1.0)

  def mean(name: str) -> Array:
    return jnp.where(used, statistics[name], 0.0).sum() / total

  ratio = statistics["ratio"]
  drift = jnp.where(used, jnp.abs(ratio - 1.0), 0.0)[0]  # of the first optimizer step
  known = ("weight", "ratio", "rollout_drift", "approx_kl", "kl")
  return {name: mean(name) for name in statistics if name not in known} | {
    "ratio/mean": mean("ratio"),
    "ratio/min": jnp.min(jnp.where(used, ratio, 1.0)),
    "ratio/max": jnp.max(jnp.where(used, ratio, 1.0)),
    "ratio/drift_max": jnp.max(drift),
    "ratio/rollout_drift_max": jnp.max(jnp.where(used, statistics["rollout_drift"], 0.0)[0]),
    "approx_kl": mean("approx_kl"),
    "kl": mean("kl"),
  }

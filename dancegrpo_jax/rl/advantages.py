"""From scores to advantages: normalisation within a prompt's group, several rewards, selection,
statistics over iterations.

Rewards are `[prompts P, samples G]`; a failed reward is NaN and is masked out, never turned into a
number. Masked inputs pass a `where` before any arithmetic, since 0 * NaN is NaN.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

MODES = ("advantages", "rewards", "gdpo")
WEIGHTED_SUM = "sum"  # name of the one signal of mode "rewards"


class Statistics(NamedTuple):
  """What rewards are normalised with, one entry for each group.

  The mean of the rewards is `origin + mean`, in two parts: the mean of equal rewards over their
  origin is then exactly 0. A plain float32 mean would have a round-off error, which the division by
  a tiny std turns into advantages near 1.

  Attributes:
    origin: the first valid reward.
    mean: of the valid rewards, over the origin.
    std: of the valid rewards.
    spread: largest valid reward minus smallest.
    number: of valid rewards.
  """

  origin: Float[Array, "*groups"]
  mean: Float[Array, "*groups"]
  std: Float[Array, "*groups"]
  spread: Float[Array, "*groups"]
  number: Int[Array, "*groups"]


class Advantages(NamedTuple):
  """What the update trains on.

  Attributes:
    advantage: `[P, G]`, 0 where the weight is 0.
    weight: `[P, G]`, 1, or 0 for samples that no reward may move (failed, or alone in their group).
    failed: share of the samples with a failed term.
    flat_groups: share of the groups in which every advantage is 0.
  """

  advantage: Float[Array, "prompts samples"]
  weight: Float[Array, "prompts samples"]
  failed: Float[Array, ""]
  flat_groups: Float[Array, ""]


class PromptStats(NamedTuple):
  """Ring buffers of each prompt's latest rewards (DDPO, arXiv 2305.13301): `count` rewards were
  ever written.
  """

  values: Float[Array, "num_prompts size"]
  # The field's name is in checkpoints. As a NamedTuple's it hides tuple.count, which nobody needs.
  count: Int[Array, "num_prompts"]  # type: ignore[assignment]


def group_statistics(
  rewards: Float[Array, "*groups n"], valid: Bool[Array, "*groups n"], ddof: int = 1
) -> Statistics:
  """Mean, std (ddof 1 unbiased, 0 not), spread (max - min) and number of the valid rewards of each
  group.
  """
  rewards = jnp.where(valid, rewards, 0.0)
  number = jnp.sum(valid, axis=-1)
  origin = jnp.take_along_axis(rewards, jnp.argmax(valid, axis=-1, keepdims=True), axis=-1)
  centred = jnp.where(valid, rewards - origin, 0.0)
  mean = jnp.sum(centred, axis=-1) / jnp.maximum(number, 1)
  squares = jnp.where(valid, jnp.square(centred - mean[..., None]), 0.0)
  std = jnp.sqrt(jnp.sum(squares, axis=-1) / jnp.maximum(number - ddof, 1))
  # Masked entries are 0 here, which is the origin and so lies inside the range.
  spread = jnp.max(centred, axis=-1) - jnp.min(centred, axis=-1)
  return Statistics(origin=origin[..., 0], mean=mean, std=std, spread=spread, number=number)


def group_advantages(
  rewards: Float[Array, "prompts samples"],
  valid: Bool[Array, "prompts samples"],
  *,
  ddof: int = 1,
  eps: ScalarLike = 1e-8,
  clamp: ScalarLike = 5.0,
  min_spread: ScalarLike = 1e-6,
  statistics: Statistics | None = None,
) -> Float[Array, "prompts samples"]:
  """A = (r - mean) / (std + eps) within each group, clipped to +-clamp; 0 where invalid (arXiv
  2505.07818, eq. (9)).

  Args:
    rewards: NaN is allowed where not valid.
    valid: which rewards count.
    ddof: 1 = unbiased std, 0 = not.
    eps: added to the std.
    clamp: bound of |A|; infinity for none.
    min_spread: a group whose rewards differ by no more than this gets A = 0.
    statistics: `[P]`, used in place of the group's own (`prompt_statistics`).
  """
  used = group_statistics(rewards, valid, ddof) if statistics is None else statistics
  centred = jnp.where(valid, rewards, 0.0) - used.origin[:, None] - used.mean[:, None]
  normalised = jnp.clip(centred / (used.std[:, None] + eps), jnp.negative(clamp), clamp)
  return jnp.where(valid & (used.spread > min_spread)[:, None], normalised, 0.0)


def apply_thresholds(
  scores: dict[str, Float[Array, "*shape"]], thresholds: Sequence[tuple[str, float | int]]
) -> dict[str, Float[Array, "*shape"]]:
  """Binary rewards: 1 where score > value, else 0, for the named terms; a failed score stays NaN.

  Raises:
    ValueError: a threshold for a term that isn't scored.
  """
  _require(scores, thresholds, "thresholds")
  binary = {
    term: jnp.where(jnp.isfinite(scores[term]), (scores[term] > value).astype(jnp.float32), jnp.nan)
    for term, value in thresholds
  }
  return {**scores, **binary}


def signals(
  scores: dict[str, Float[Array, "prompts samples"]],
  terms: Sequence[tuple[str, float | int]],
  mode: str,
) -> tuple[dict[str, Float[Array, "prompts samples"]], Bool[Array, "prompts samples"]]:
  """The rewards that get normalised, by name, and which samples are valid: those finite in every
  term.

  Mode "rewards" has one signal, the weighted sum, named `WEIGHTED_SUM`; the others one a term.
  Statistics over iterations are kept for these.

  Raises:
    ValueError: an unknown mode, no term, or a term that isn't scored.
  """
  if mode not in MODES:
    raise ValueError(f"reward.combine is {mode!r}, must be one of {', '.join(MODES)}")
  if not terms:
    raise ValueError("reward.terms is empty, name at least one (term, weight)")
  _require(scores, terms, "terms")
  valid = jnp.all(jnp.stack([jnp.isfinite(scores[term]) for term, _ in terms]), axis=0)
  masked = {term: jnp.where(valid, scores[term].astype(jnp.float32), 0.0) for term, _ in terms}
  if mode == "rewards":
    weighted = (weight * masked[term] for term, weight in terms)
    masked = {WEIGHTED_SUM: sum(weighted, start=jnp.zeros(()))}
  return masked, valid


def combine(
  scores: dict[str, Float[Array, "prompts samples"]],
  terms: Sequence[tuple[str, float | int]],
  mode: str = "advantages",
  *,
  ddof: int = 1,
  eps: ScalarLike = 1e-8,
  clamp: ScalarLike = 5.0,
  min_spread: ScalarLike = 1e-6,
  statistics: dict[str, Statistics] | None = None,
) -> Advantages:
  """Advantages of one reward or several. A sample that fails any term leaves all terms' statistics
  and gets weight 0.

  A group with fewer than 2 valid rewards has weight 0; one with equal rewards keeps weight 1 with A
  = 0, so that a KL penalty still acts on it.

  Args:
    scores: every term's scores; NaN (or infinity) = failed.
    terms: (term, weight), the terms to use.
    mode: "advantages" (sum of weighted advantages, DanceGRPO), "rewards" (advantage of the weighted
      sum, Flow-GRPO) or "gdpo" (the first, then normalised over the whole batch; arXiv 2601.05242).
    ddof, eps, min_spread: see `group_advantages`.
    clamp: applied once, to the result.
    statistics: by name of the signal (`signals`), in place of the groups' own; a sample then needs
      no second one in its group, and weight 0 means fewer than 2 rewards behind the statistics.

  Raises:
    ValueError: see `signals`.
  """
  named, valid = signals(scores, terms, mode)
  statistics = statistics or {
    name: group_statistics(rewards, valid, ddof) for name, rewards in named.items()
  }
  normalise = functools.partial(
    group_advantages, ddof=ddof, eps=eps, clamp=jnp.inf, min_spread=min_spread
  )
  known = jnp.all(jnp.stack([statistics[name].number >= 2 for name in named]), axis=0)
  trained = valid & known[:, None]
  weights = {WEIGHTED_SUM: 1.0} if mode == "rewards" else dict(terms)
  weighted = (
    weights[name] * normalise(rewards, trained, statistics=statistics[name])
    for name, rewards in named.items()
  )
  total = sum(weighted, start=jnp.zeros(()))
  if mode == "gdpo":
    batch = normalise(total.reshape(1, -1), trained.reshape(1, -1))
    total = batch.reshape(total.shape)
  total = jnp.clip(total, jnp.negative(clamp), clamp)
  return Advantages(
    advantage=total,
    weight=trained.astype(jnp.float32),
    failed=jnp.mean((~valid).astype(jnp.float32)),
    flat_groups=jnp.mean(jnp.all(total == 0, axis=1).astype(jnp.float32)),
  )


def best_of(advantages: Advantages, k: int) -> tuple[Int[Array, "prompts k"], Advantages]:
  """Keeps the k/2 highest and the k/2 lowest advantages of each prompt, re-centred to mean 0
  (best-of-n of DanceGRPO).

  Samples of weight 0 are picked only where fewer than k others exist, and keep their weight 0. Ties
  go by sample id.

  Returns:
    The samples' positions in their groups `[P, k]`, highest advantage first, all different, and
    their `Advantages`.

  Raises:
    ValueError: k that is odd, below 2 or above G.
  """
  group = advantages.advantage.shape[1]
  if k % 2 or not 2 <= k <= group:
    raise ValueError(
      f"advantage.best_of is {k}, must be even and lie between 2 and the {group} samples a prompt"
    )
  valid = advantages.weight > 0
  order = jnp.argsort(jnp.where(valid, -advantages.advantage, jnp.inf), axis=1, stable=True)
  slot = jnp.arange(k)[None, :]
  lowest = jnp.sum(valid, axis=1, keepdims=True) - k + slot  # the last k/2 of the valid ones
  chosen = jnp.take_along_axis(
    order, jnp.where(slot < k // 2, slot, jnp.maximum(lowest, slot)), axis=1
  )
  weight = jnp.take_along_axis(advantages.weight, chosen, axis=1)
  advantage = jnp.take_along_axis(advantages.advantage, chosen, axis=1)
  mean = jnp.sum(weight * advantage, axis=1, keepdims=True) / jnp.maximum(
    jnp.sum(weight, axis=1, keepdims=True), 1.0
  )
  selected = advantages._replace(
    advantage=jnp.where(weight > 0, advantage - mean, 0.0), weight=weight
  )
  return chosen, selected


def empty_stats(num_prompts: int, size: int) -> PromptStats:
  """Ring buffers of `size` rewards for each prompt of the data set, with nothing in them."""
  return PromptStats(jnp.zeros((num_prompts, size), jnp.float32), jnp.zeros(num_prompts, jnp.int32))


def update_stats(
  stats: PromptStats,
  prompts: Int[Array, "prompts"],
  rewards: Float[Array, "prompts samples"],
  valid: Bool[Array, "prompts samples"],
) -> PromptStats:
  """Appends the valid rewards, in the order of the samples, to the buffers of `prompts` (ids, which
  may repeat).
  """
  size = stats.values.shape[1]

  def append(carry: PromptStats, row):
    prompt, group, ok = row
    rank = jnp.cumsum(ok) - 1
    keep = ok & (rank >= jnp.sum(ok) - size)  # of more rewards than slots, the last ones
    slot = jnp.where(keep, (carry.count[prompt] + rank) % size, size)
    values = carry.values.at[prompt, slot].set(group, mode="drop")
    return PromptStats(values, carry.count.at[prompt].add(jnp.sum(ok, dtype=jnp.int32))), None

  return jax.lax.scan(append, stats, (prompts, jnp.where(valid, rewards, 0.0), valid))[0]


def prompt_statistics(
  stats: PromptStats,
  prompts: Int[Array, "prompts"],
  rewards: Float[Array, "prompts samples"],
  valid: Bool[Array, "prompts samples"],
  *,
  min_count: int = 16,
  ddof: int = 1,
) -> Statistics:
  """Statistics of each prompt over iterations, once `min_count` rewards were seen; until then those
  of the whole batch.

  As in DDPO, `stats` already holds this iteration's rewards (`update_stats` first).

  Args:
    stats: the ring buffers.
    prompts: ids of the P prompts.
    rewards: this iteration's.
    valid: which of them count.
    min_count: rewards of a prompt from which on its own statistics are used.
    ddof: 1 = unbiased std, 0 = not.
  """
  filled = jnp.arange(stats.values.shape[1])[None, :] < stats.count[prompts][:, None]
  history = group_statistics(stats.values[prompts], filled, ddof)
  batch = group_statistics(rewards.reshape(-1), valid.reshape(-1), ddof)
  enough = stats.count[prompts] >= min_count
  return jax.tree.map(lambda mine, everyone: jnp.where(enough, mine, everyone), history, batch)


def _require(scores: dict, pairs: Sequence[tuple], what: str) -> None:
  missing = [term for term, _ in pairs if term not in scores]
  if missing:
    raise ValueError(
      f"reward.{what} names {', '.join(missing)}, but the rewards give"
      f" {', '.join(sorted(scores)) or 'nothing'}"
    )

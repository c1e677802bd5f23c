"""An iteration's trajectories as items to train on: (sample, step) pairs, dealt into microbatches.

Samples lie in `lanes`: the batch axes of every array here are `[lanes, samples of a lane]`. A
permutation acts within a lane and each microbatch takes equally from every lane, so that a device
that owns whole lanes never fetches a trajectory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, Key

from dancegrpo_jax.rl import lanes, rng
from dancegrpo_jax.rl.advantages import Advantages
from dancegrpo_jax.rl.rollout import Rollout

Keys = tuple[Key[Array, "samples"], Key[Array, ""]]  # one a sample for the steps; for the shuffling


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


# Which axis of each array the lanes are; of an array that every device holds as a whole, None.
LANE_AXES = {
  "step_index": None,
  "latents": 1,
  "log_probs": 1,
  "prompt": 0,
  "advantage": 0,
  "weight": 0,
}


class Transitions(NamedTuple):
  """A microbatch of m transitions."""

  step: Int[Array, "m"]
  x: Float[Array, "m *shape"]
  x_next: Float[Array, "m *shape"]
  rollout_log_prob: Float[Array, "m"]
  prompt: Int[Array, "m"]
  advantage: Float[Array, "m"]
  weight: Float[Array, "m"]


def batch_of(
  rollouts: tuple[Rollout, ...],
  prompt: Int[Array, "lanes samples"],
  advantage: Float[Array, "selected"],
  weight: Float[Array, "selected"],
  chosen: Int[Array, "blocks chosen"] | None = None,
  count: int = 1,
) -> Batch:
  """An iteration's trajectories in lanes.

  Args:
    rollouts: one a chunk, in the order of `lanes.deal`.
    prompt: row of the conditioning of each selected sample.
    advantage: of the selected samples.
    weight: of the selected samples.
    chosen: positions of the selected samples in their block of lanes (`lanes.blocks`), or None
      where all are trained. No sample leaves its block.
    count: number of lanes.
  """

  def gathered(name: str) -> Array:
    whole = lanes.in_lanes([getattr(rollout, name) for rollout in rollouts], count, 1)
    return whole if chosen is None else lanes.select(whole, chosen)

  return Batch(
    step_index=rollouts[0].step_index,
    latents=gathered("latents"),
    log_probs=gathered("log_probs"),
    prompt=prompt,
    advantage=advantage.reshape(count, -1),
    weight=weight.reshape(count, -1),
  )


def batch_of_groups(drawn: Rollout, result: Advantages) -> Batch:
  """A rollout and its advantages as a batch, for scripts on one device: all samples are trained.

  Args:
    drawn: P G samples, prompt by prompt: sample number b is sample b % G of prompt b // G.
    result: of `advantages.combine`, `[P, G]`. Row p belongs to row p of the conditioning.

  Raises:
    ValueError: another number of samples.
  """
  prompts, group = result.advantage.shape
  if len(drawn.sample) != prompts * group:
    raise ValueError(
      f"the rollout has {len(drawn.sample)} samples, the advantages belong to {prompts} x {group}"
    )
  return batch_of(
    rollouts=(drawn,),
    prompt=jnp.repeat(jnp.arange(prompts, dtype=jnp.int32), group)[None],
    advantage=result.advantage.reshape(-1),
    weight=result.weight.reshape(-1),
  )


def keys_of(seed: int, iteration: rng.Index, prompt_ids: rng.Indices, sample: rng.Indices) -> Keys:
  """The keys of an iteration's update.

  Args:
    seed: of the run.
    iteration: number of the iteration, traced or not.
    prompt_ids: of each selected sample, lane by lane: its prompt's position in the data set.
    sample: its position in its group.
  """
  steps = rng.sample_keys(rng.stream(seed, "timesteps"), iteration, prompt_ids, sample)
  return steps, rng.derive(rng.stream(seed, "shuffle"), iteration)


def partition(
  key: Key[Array, ""],
  selected: Int[Array, "lanes samples trained"],
  updates: int,
  microbatch: int,
) -> tuple[Int[Array, "u n lanes s"], Int[Array, "u n lanes s"]]:
  """Shuffles each lane's (sample, step) pairs and deals them out.

  Returns:
    (sample, step), both int32 `[updates, microbatches, lanes, microbatch / lanes]`: positions in
    the lane and in the K steps.

  Raises:
    ValueError: a microbatch that is not a multiple of the lanes, or does not fit the transitions.
  """
  count, samples, trained = selected.shape
  if microbatch % count:
    raise ValueError(f"microbatch is {microbatch}, must be a multiple of the {count} lanes")
  if selected.size % (updates * microbatch):
    raise ValueError(
      f"updates x microbatch is {updates} x {microbatch}, must divide the {selected.size}"
      f" transitions ({count * samples} samples x {trained} steps)"
    )
  keys = jax.vmap(lambda lane: jax.random.fold_in(key, lane))(jnp.arange(count))
  order = jax.vmap(lambda k: jax.random.permutation(k, samples * trained))(keys)
  step = jnp.take_along_axis(selected.reshape(count, -1), order, axis=1)

  def deal(x: Array) -> Array:
    rows = rearrange(x, "l (u n s) -> u n l s", u=updates, s=microbatch // count)
    return rows.astype(jnp.int32)

  return deal(order // trained), deal(step)


def gather(batch: Batch, items: tuple[Int[Array, "lanes s"], Int[Array, "lanes s"]]) -> Transitions:
  """The transitions of one microbatch; each lane indexes itself."""

  def lane(latents, log_probs, prompt, advantage, weight, sample, step) -> Transitions:
    return Transitions(
      step=batch.step_index[step],
      x=latents[step, sample],
      x_next=latents[step + 1, sample],
      rollout_log_prob=log_probs[step, sample],
      prompt=prompt[sample],
      advantage=advantage[sample],
      weight=weight[sample],
    )

  arrays = (batch.latents, batch.log_probs, batch.prompt, batch.advantage, batch.weight)
  rows = jax.vmap(lane, in_axes=(1, 1, 0, 0, 0, 0, 0))(*arrays, *items)
  t = jax.tree.map(lambda row: rearrange(row, "l s ... -> (l s) ..."), rows)

  def sound(x: Array) -> Array:
    """A sample that is left out may hold NaN, and 0 * NaN is NaN: it must not enter at all."""
    return jnp.where(t.weight.reshape(-1, *(1,) * (x.ndim - 1)) > 0, x, 0.0)

  return t._replace(
    x=sound(t.x), x_next=sound(t.x_next), rollout_log_prob=sound(t.rollout_log_prob)
  )

"""The engine of an update: optimizer steps over microbatches, whatever is learned from them.

An iteration's work is cut in two ways. It has `updates` optimizer steps, and each of them sums the
gradients of `microbatches` forward and backward passes. A call of `remember` or `accumulate` does
any number of these passes: the bounds of its loop are arguments, so that one compiled program
serves every length, and where the calls begin and end changes no bit of the result.

What is learned is an `Algorithm`: functions that pick items out of a batch and score them. GRPO
(rl/grpo.py) is the first. The engine knows neither trajectories nor log-probs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from dancegrpo_jax.rl.state import TrainState
from dancegrpo_jax.types import PyTree


class Algorithm(NamedTuple):
  """How a batch becomes losses. m is the number of items in a microbatch.

  Attributes:
    deal: `(batch, keys) -> items`. Items are a pytree of arrays `[updates, microbatches, ...]`; row
      [u, i] of it says what microbatch i of optimizer step u is made of.
    take: `(batch, items of one microbatch) -> microbatch`, a pytree.
    weigh: `(batch, items of one microbatch) -> f32[m]`. Items of weight 0 are left out of the loss;
      it is the mean over the weights of an optimizer step.
    blank: `(microbatch) -> (remembered, statistics)`, zeros in the shapes of what the next two
      return.
    remember: `(trainable, microbatch) -> pytree`: what the loss needs of the policy as it was
      before the first optimizer step. It is called for the later steps' microbatches. None where
      the loss needs nothing.
    loss: `(trainable, microbatch, remembered, is_first) -> (f32[m], {name: f32[m]})`: losses before
      weighting, and statistics. `is_first` tells whether this is the first optimizer step, whose
      policy is the old one; `remembered` is only meaningful in later steps.
    metrics: `({name: f32[updates, microbatches, m]}) -> {name: scalar}` of the statistics.
  """

  deal: Callable[[Any, Any], PyTree]
  take: Callable[[Any, PyTree], Any]
  weigh: Callable[[Any, PyTree], Array]
  blank: Callable[[Any], tuple[PyTree, dict[str, Array]]]
  remember: Callable[[PyTree, Any], PyTree] | None
  loss: Callable[[PyTree, Any, PyTree, Array], tuple[Array, dict[str, Array]]]
  metrics: Callable[[dict[str, Array]], dict[str, Array]]


class Work(NamedTuple):
  """What an iteration's optimizer steps go through.

  Attributes:
    batch: of the algorithm.
    items: of the algorithm, `[updates, microbatches, ...]`.
    totals: sum of the weights of each optimizer step, at least 1.
  """

  batch: Any
  items: PyTree
  totals: Float[Array, "updates"]


class Sums(NamedTuple):
  """What the calls of an iteration hand on to each other.

  Attributes:
    remembered: of the algorithm, `[updates, microbatches, ...]`, or None. Row 0 is never used.
    gradient: sum over the microbatches of the present optimizer step.
    loss: the same of the loss.
    statistics: `[updates, microbatches, m]` each, filled as far as the work has come.
    losses: of each optimizer step that was taken.
    norms: of its gradient.
    finite: whether it was applied; one whose loss or gradient is not finite is skipped.
  """

  remembered: PyTree | None
  gradient: PyTree
  loss: Float[Array, ""]
  statistics: dict[str, Float[Array, "updates microbatches m"]]
  losses: Float[Array, "updates"]
  norms: Float[Array, "updates"]
  finite: Bool[Array, "updates"]


def begin(algorithm: Algorithm, trainable: PyTree, batch: Any, keys: Any) -> tuple[Work, Sums]:
  """The work of an iteration, and sums with nothing in them yet."""
  items = algorithm.deal(batch, keys)
  updates, microbatches = jax.tree.leaves(items)[0].shape[:2]
  weights = jax.vmap(jax.vmap(lambda row: algorithm.weigh(batch, row)))(items)
  work = Work(
    batch=batch,
    items=items,
    # The weights are not reshaped before they are summed: their last axis is split over devices.
    totals=jnp.maximum(weights.sum(axis=(1, 2)), 1.0),
  )

  def several(rows: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros((updates, microbatches, *x.shape), x.dtype), rows)

  remembered, statistics = jax.eval_shape(
    lambda: algorithm.blank(algorithm.take(batch, _at(items, 0, 0)))
  )
  sums = Sums(
    remembered=None if algorithm.remember is None else several(remembered),
    gradient=jax.tree.map(jnp.zeros_like, trainable),
    loss=jnp.zeros((), jnp.float32),
    statistics=several(statistics),
    losses=jnp.zeros((updates,), jnp.float32),
    norms=jnp.zeros((updates,), jnp.float32),
    finite=jnp.zeros((updates,), jnp.bool_),
  )
  return work, sums


def remember(
  algorithm: Algorithm,
  trainable: PyTree,
  work: Work,
  sums: Sums,
  start: Int[Array, ""] | int,
  stop: Int[Array, ""] | int,
) -> Sums:
  """Stores what the algorithm needs of the policy before its first optimizer step.

  Args:
    algorithm: one that has `remember`.
    trainable: the parameters before the first optimizer step.
    work: of the iteration.
    sums: whose `remembered` is filled.
    start: first microbatch of this call, counted through all optimizer steps but the first.
    stop: one past its last.
  """
  _, microbatches = jax.tree.leaves(work.items)[0].shape[:2]
  remember_one = algorithm.remember
  assert remember_one is not None, "this algorithm remembers nothing"

  def one(k: Int[Array, ""], remembered: PyTree) -> PyTree:
    update, i = 1 + k // microbatches, k % microbatches
    row = remember_one(trainable, algorithm.take(work.batch, _at(work.items, update, i)))
    return _put(remembered, row, update, i)

  return sums._replace(remembered=jax.lax.fori_loop(start, stop, one, sums.remembered))


def accumulate(
  algorithm: Algorithm,
  trainable: PyTree,
  work: Work,
  sums: Sums,
  update: Int[Array, ""] | int,
  start: Int[Array, ""] | int,
  stop: Int[Array, ""] | int,
) -> Sums:
  """Adds the gradients of some microbatches of an optimizer step.

  Args:
    algorithm: whose loss is differentiated.
    trainable: the parameters before this optimizer step.
    work: of the iteration.
    sums: before.
    update: number of the optimizer step, from 0.
    start: first microbatch of this call.
    stop: one past its last.
  """

  def weighted(trainable: PyTree, microbatch: Any, remembered: PyTree, row: PyTree) -> tuple:
    is_first = jnp.equal(update, 0)
    losses, statistics = algorithm.loss(trainable, microbatch, remembered, is_first)
    weight = algorithm.weigh(work.batch, row)
    value = jnp.sum(weight * losses) / work.totals[update]
    return value, jax.lax.stop_gradient(statistics)

  def one(i: Int[Array, ""], carry: tuple) -> tuple:
    gradient, loss, statistics = carry
    row = _at(work.items, update, i)
    remembered = None if sums.remembered is None else _at(sums.remembered, update, i)
    microbatch = algorithm.take(work.batch, row)
    (part, new), g = jax.value_and_grad(weighted, has_aux=True)(
      trainable, microbatch, remembered, row
    )
    return jax.tree.map(jnp.add, gradient, g), loss + part, _put(statistics, new, update, i)

  carry = (sums.gradient, sums.loss, sums.statistics)
  gradient, loss, statistics = jax.lax.fori_loop(start, stop, one, carry)
  return sums._replace(gradient=gradient, loss=loss, statistics=statistics)


def step(
  optimizer: optax.GradientTransformation,
  ema_decay: float,
  state: TrainState,
  sums: Sums,
  update: Int[Array, ""] | int,
) -> tuple[TrainState, Sums]:
  """One optimizer step with the accumulated gradient, which is 0 again afterwards.

  A step whose loss or gradient is not finite changes nothing but the count of skipped steps.

  Args:
    optimizer: gradient clipping included.
    ema_decay: of the running average of the parameters; of no effect where `state.ema` is None.
    state: before; its fields `step, skipped, trainable, opt_state, ema` change.
    sums: after the last microbatch of this step.
    update: number of the optimizer step, from 0.
  """
  norm = optax.tree.norm(sums.gradient)
  finite = jnp.isfinite(sums.loss) & jnp.isfinite(norm)
  changes, opt_state = optimizer.update(sums.gradient, state.opt_state, state.trainable)
  new = (optax.apply_updates(state.trainable, changes), opt_state)
  trainable, opt_state = jax.tree.map(
    lambda a, b: jnp.where(finite, a, b), new, (state.trainable, state.opt_state)
  )
  ema = state.ema
  if ema is not None:
    decay = jnp.where(finite, ema_decay, 1.0)
    ema = jax.tree.map(
      lambda e, p: decay * e + (1.0 - decay) * p.astype(jnp.float32), ema, trainable
    )
  after = state._replace(
    step=state.step + finite.astype(jnp.int32),
    skipped=state.skipped + (~finite).astype(jnp.int32),
    trainable=trainable,
    opt_state=opt_state,
    ema=ema,
  )
  done = sums._replace(
    gradient=jax.tree.map(jnp.zeros_like, sums.gradient),
    loss=jnp.zeros_like(sums.loss),
    losses=sums.losses.at[update].set(sums.loss),
    norms=sums.norms.at[update].set(norm),
    finite=sums.finite.at[update].set(finite),
  )
  return after, done


def metrics(algorithm: Algorithm, sums: Sums) -> dict[str, Array]:
  """The algorithm's metrics, and loss, gradient norm and number of skipped steps of the engine."""
  return algorithm.metrics(sums.statistics) | {
    "loss": sums.losses.mean(),
    "grad_norm": sums.norms.mean(),
    "optimizer/skipped": jnp.sum(~sums.finite),
  }


def update(
  algorithm: Algorithm,
  optimizer: optax.GradientTransformation,
  state: TrainState,
  batch: Any,
  keys: Any,
  ema_decay: float = 0.0,
) -> tuple[TrainState, dict[str, Array]]:
  """All optimizer steps of an iteration in one call: for scripts that run on one device.

  Args:
    algorithm: what is learned.
    optimizer: gradient clipping included.
    state: before.
    batch: of the algorithm.
    keys: of the algorithm's `deal`.
    ema_decay: of the running average of the parameters; of no effect where `state.ema` is None.

  Returns:
    The state after, and metrics: scalars by name.

  Raises:
    ValueError: a batch that can't be cut as the algorithm wants it.
  """
  work, sums = begin(algorithm, state.trainable, batch, keys)
  updates, microbatches = jax.tree.leaves(work.items)[0].shape[:2]
  if sums.remembered is not None:
    sums = remember(algorithm, state.trainable, work, sums, 0, (updates - 1) * microbatches)

  def one(number: Int[Array, ""], carry: tuple[TrainState, Sums]) -> tuple[TrainState, Sums]:
    state, sums = carry
    sums = accumulate(algorithm, state.trainable, work, sums, number, 0, microbatches)
    return step(optimizer, ema_decay, state, sums, number)

  state, sums = jax.lax.fori_loop(0, updates, one, (state, sums))
  return state, metrics(algorithm, sums)


def _at(tree: PyTree, update: Any, microbatch: Any) -> PyTree:
  """Row [update, microbatch] of every leaf."""
  return jax.tree.map(lambda x: x[update, microbatch], tree)


def _put(tree: PyTree, row: PyTree, update: Any, microbatch: Any) -> PyTree:
  """The tree with a row in the place [update, microbatch] of every leaf."""
  return jax.tree.map(lambda x, y: x.at[update, microbatch].set(y), tree, row)

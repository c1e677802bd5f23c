"""Classifier-free guidance (arXiv 2207.12598): both branches in one call of the network, with
gradients through both.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dancegrpo_jax.types import Conditioning, PyTree

# (x, model_time, rows of one branch) -> output
Network = Callable[
  [Float[Array, "batch *shape"], Float[Array, "batch"], PyTree], Float[Array, "batch *shape"]
]
# (x, model_time, both branches) -> guided output
Guided = Callable[
  [Float[Array, "batch *shape"], Float[Array, "batch"], Conditioning], Float[Array, "batch *shape"]
]


def guide(
  positive_output: Float[Array, "*shape"],
  negative_output: Float[Array, "*shape"],
  scale: float | int,
) -> Float[Array, "*shape"]:
  """negative + scale (positive - negative), in float32."""
  positive = positive_output.astype(jnp.float32)
  negative = negative_output.astype(jnp.float32)
  return negative + scale * (positive - negative)


def _weave(a: Array, b: Array) -> Array:
  """Rows of `a` and `b` in turn. If they were joined end to end, a batch that is split over devices
  would have to move between them.
  """
  return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])


def classifier_free(network: Network, scale: float | int) -> Guided:
  """Makes `guided(x, model_time, Conditioning) -> output` of `network(x [B, ...], model_time [B],
  rows) -> output`.

  There is one call on the doubled batch, in which both branches of a sample lie side by side. Every
  leaf of `Conditioning.positive` and `.negative` has B rows. A scale of 1 needs the positive branch
  alone, at half the cost.

  Raises:
    ValueError: when called without a negative branch and a scale other than 1.
  """

  def positive_only(x, model_time, conditioning):
    return network(x, model_time, conditioning.positive)

  def guided(x, model_time, conditioning):
    if conditioning.negative is None:
      raise ValueError(
        f"guidance scale {scale} needs a negative branch, the conditioning has none; set the"
        " scale to 1"
      )
    rows = jax.tree.map(_weave, conditioning.positive, conditioning.negative)
    output = network(_weave(x, x), _weave(model_time, model_time), rows)
    output = output.reshape(-1, 2, *output.shape[1:])
    return guide(output[:, 0], output[:, 1], scale)

  return positive_only if scale == 1 else guided

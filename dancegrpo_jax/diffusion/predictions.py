"""What a network output means: an estimate of the clean sample and of the noise.

Everything is float32, whatever the network computes in. Functions are elementwise; alpha and sigma
are scalars.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike

PREDICTION_TYPES = ("epsilon", "v", "velocity")


class Prediction(NamedTuple):
  """Estimates of the two parts of x = alpha * x0 + sigma * eps, both shaped like x."""

  x0: Float[Array, "*shape"]
  eps: Float[Array, "*shape"]


def from_output(
  kind: str,
  x: Float[Array, "*shape"],
  output: Float[Array, "*shape"],
  alpha: ScalarLike,
  sigma: ScalarLike,
) -> Prediction:
  """Turns a network output at noisy sample `x` into a `Prediction`.

  Args:
    kind: "epsilon" (the noise; alpha must not be 0), "v" (alpha eps - sigma x0, arXiv 2202.00512;
      alpha^2 + sigma^2 = 1) or "velocity" (eps - x0, rectified flow; alpha + sigma = 1).
    x: the noisy sample.
    output: what the network returned.
    alpha: factor of the clean sample at this time.
    sigma: factor of the noise at this time.

  Raises:
    ValueError: an unknown `kind`.
  """
  x, output = x.astype(jnp.float32), output.astype(jnp.float32)
  if kind == "epsilon":
    return Prediction((x - sigma * output) / alpha, output)
  if kind == "v":
    return Prediction(x * alpha - output * sigma, output * alpha + x * sigma)
  if kind == "velocity":
    return Prediction(x - sigma * output, x + alpha * output)
  raise ValueError(f"prediction type is {kind!r}, must be one of {', '.join(PREDICTION_TYPES)}")


def velocity(prediction: Prediction) -> Float[Array, "*shape"]:
  """dx/dsigma of rectified flow: eps - x0."""
  return prediction.eps - prediction.x0

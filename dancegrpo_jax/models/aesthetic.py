"""The head of LAION's aesthetic predictor v2.

It consists of dense layers only: the published network has no activations between them.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# {number in the published Sequential: width}; the missing numbers are dropouts.
LAYERS = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}


class Head(nn.Module):
  """From image embeddings of length 1 to scores in points, float32."""

  @nn.compact
  def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b"]:
    for number, width in LAYERS.items():
      # This is a product of five matrices. In a TPU's default precision, bfloat16, the score would
      # be wrong by a hundredth of a point.
      x = nn.Dense(
        width, precision=jax.lax.Precision.HIGHEST, dtype=jnp.float32, name=f"layers_{number}"
      )(x)
    return x[:, 0]

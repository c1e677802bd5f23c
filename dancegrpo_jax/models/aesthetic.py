"""The head of LAION's aesthetic predictor v2. Dense layers alone: the published network has no
activation between them.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# number in the published Sequential, whose others are dropouts -> width
LAYERS = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}


class Head(nn.Module):
  """Image embeddings of length 1 -> scores, float32."""

  @nn.compact
  def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b"]:
    for number, width in LAYERS.items():
      # the product of five matrices: a TPU's default bfloat16 passes would cost a hundredth of a
      # point
      x = nn.Dense(
        width, precision=jax.lax.Precision.HIGHEST, dtype=jnp.float32, name=f"layers_{number}"
      )(x)
    return x[:, 0]

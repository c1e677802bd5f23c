"""The network of the example: which of eight colours the background of a picture has."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Of the embedded emoji model's captions: "a red apple on a blue background".
COLOURS = ("red", "cyan", "yellow", "green", "blue", "purple", "pink", "white")
SIDE = 8  # pictures of any size are averaged down to this height and width


class BackgroundJudge(nn.Module):
  """Two dense layers on a small copy of the picture. What lies at its edge counts as background,
  which the weights have learned.

  Attributes:
    hidden: width between the layers.
  """

  hidden: int = 32
  dtype: jnp.dtype = jnp.float32
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b colours"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    small = jax.image.resize(pixels, (len(pixels), SIDE, SIDE, 3), "linear", antialias=True)
    x = small.reshape(len(pixels), -1).astype(self.dtype)
    x = nn.gelu(nn.Dense(self.hidden, name="fc1", **types)(2.0 * x - 1.0))
    return nn.Dense(len(COLOURS), name="fc2", **types)(x)

"""The embedding of a denoiser's time and guidance: sinusoids, and the dense layers after them."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dancegrpo_jax.models.layers import Dense, Dtype


def sinusoid(
  time: Float[Array, "b"], width: int, flip_sin_to_cos: bool, shift: int | float
) -> Float[Array, "b w"]:
  """The sinusoidal embedding of model times, which need not be integers; float32.

  Args:
    time: one number a sample.
    width: the number of sinusoids, half of them sines.
    flip_sin_to_cos: whether the cosines come first.
    shift: diffusers' `freq_shift` of the frequencies.
  """
  half = width // 2
  frequency = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
  angle = time.astype(jnp.float32)[:, None] * frequency[None, :]
  parts = (jnp.cos(angle), jnp.sin(angle)) if flip_sin_to_cos else (jnp.sin(angle), jnp.cos(angle))
  return jnp.concatenate(parts, axis=-1)


class TimeEmbedding(nn.Module):
  """Two dense layers with silu between them."""

  features: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b w"]) -> Float[Array, "b t"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = nn.silu(Dense(self.features, name="linear_1", **types)(x))
    return Dense(self.features, name="linear_2", **types)(x)

"""Convolutions over frames, height and width, in which no frame sees a later one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dancegrpo_jax.models.attention import place
from dancegrpo_jax.models.layers import Dtype, by_sample, convolve


class Conv3d(nn.Module):
  """torch.nn.Conv3d without padding: `[b, f, h, w, in] -> [b, f', h', w', features]`.

  The kernel is `[size, size, size, in, features]`.

  Attributes:
    strides: along the frames, and along height and width.
  """

  features: int
  size: int = 3
  strides: tuple[int, int] = (1, 1)
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w i"]) -> Float[Array, "b f2 h2 w2 o"]:
    shape = (self.size,) * 3 + (x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    if self.size == 1 and self.strides == (1, 1):
      y = x @ kernel[0, 0, 0]
    elif place().platform == "cpu":
      y = summed(x, kernel, self.strides)
    else:
      y = native(x, kernel, self.strides)
    return by_sample(y) + bias.astype(self.dtype).reshape(1, 1, 1, 1, -1)


def native(
  x: Float[Array, "b f h w i"], kernel: Float[Array, "t k k i o"], strides: tuple[int, int]
) -> Float[Array, "b f2 h2 w2 o"]:
  """The convolution as XLA has it."""
  time, space = strides
  return jax.lax.conv_general_dilated(
    x, kernel, (time, space, space), "VALID", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
  )


def summed(
  x: Float[Array, "b f h w i"], kernel: Float[Array, "t k k i o"], strides: tuple[int, int]
) -> Float[Array, "b f2 h2 w2 o"]:
  """The convolution as the sum of convolutions of single frames, one for each frame that a result
  sees.

  On CPUs it is up to five times as fast as `native` where there are few channels, and its gradient
  is always as fast, see `layers.convolve`. Forward with 128 channels and more it takes half as long
  again, but networks that wide are rarely computed on CPUs.
  """
  time, space = strides
  frames = (x.shape[1] - len(kernel)) // time + 1

  def tap(index: int) -> Array:
    seen = x[:, index : index + (frames - 1) * time + 1 : time]
    flat = seen.reshape(-1, *seen.shape[2:])
    return convolve(flat, kernel[index], space, ((0, 0), (0, 0)))

  y = sum((tap(index) for index in range(1, len(kernel))), start=tap(0))
  return y.reshape(x.shape[0], frames, *y.shape[1:])


class CausalConv(nn.Module):
  """diffusers' HunyuanVideoCausalConv3d: every edge is repeated, the past one twice, so that a
  frame depends on itself and the two before it.

  The convolution is a module inside this one because the names of the weights require it.
  """

  features: int
  size: int = 3
  strides: tuple[int, int] = (1, 1)
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w i"]) -> Float[Array, "b f2 h2 w2 o"]:
    side = (self.size // 2, self.size // 2)
    x = jnp.pad(x, ((0, 0), (self.size - 1, 0), side, side, (0, 0)), mode="edge")
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    return Conv3d(self.features, self.size, self.strides, name="conv", **types)(x)

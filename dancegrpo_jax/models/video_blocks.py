"""The blocks of HunyuanVideo's autoencoder, for clips `[b, f, h, w, c]`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dancegrpo_jax.models.attention import attention
from dancegrpo_jax.models.causal_conv import CausalConv
from dancegrpo_jax.models.layers import Dense, Dtype, GroupNorm

EPSILON = 1e-6  # every norm of the autoencoder


class Resnet(nn.Module):
  """Norm, silu, convolution, twice, and a shortcut. The norms' statistics are of all frames."""

  features: int
  groups: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w i"]) -> Float[Array, "b f h w o"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    y = nn.silu(GroupNorm(self.groups, EPSILON, name="norm1", **types)(x))
    y = CausalConv(self.features, name="conv1", **types)(y)
    y = nn.silu(GroupNorm(self.groups, EPSILON, name="norm2", **types)(y))
    y = CausalConv(self.features, name="conv2", **types)(y)
    if x.shape[-1] != self.features:
      x = CausalConv(self.features, size=1, name="conv_shortcut", **types)(x)
    return x + y


class FrameAttention(nn.Module):
  """The attention with one head in the middle, in which a frame sees itself and those before it."""

  groups: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    batch, frames, height, width, channels = x.shape
    y = GroupNorm(self.groups, EPSILON, name="group_norm", **types)(x)
    y = y.reshape(batch, -1, channels)
    q, k, v = (
      Dense(channels, name=name, **types)(y)[:, :, None, :] for name in ("to_q", "to_k", "to_v")
    )
    y = _attend_to_earlier_frames(q, k, v, frames)[:, :, 0, :]
    return x + Dense(channels, name="to_out_0", **types)(y).reshape(x.shape)


def _attend_to_earlier_frames(
  q: Float[Array, "b n h d"], k: Float[Array, "b n h d"], v: Float[Array, "b n h d"], frames: int
) -> Float[Array, "b n h d"]:
  """Attention of each frame's tokens to those of this frame and of all earlier ones.

  The logits of one frame's queries are in memory at a time, in the backward pass too: those of a
  whole clip of 53 frames of 480 x 480 pixels would take 10 GB.
  """
  batch, tokens, *head = q.shape
  size = tokens // frames

  @jax.checkpoint
  def of_frame(index_and_queries: tuple[Array, Array]) -> Array:
    index, queries = index_and_queries
    seen = jnp.full((batch,), (index + 1) * size)
    # The head is as wide as the feature map, which no fused kernel supports.
    return attention(queries, k, v, key_lengths=seen, impl="xla")

  queries = q.reshape(batch, frames, size, *head).swapaxes(0, 1)
  y = jax.lax.map(of_frame, (jnp.arange(frames), queries))
  return y.swapaxes(0, 1).reshape(q.shape)


class MidBlock(nn.Module):
  """A resnet, an attention and another resnet."""

  groups: int
  add_attention: bool
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = Resnet(x.shape[-1], self.groups, name="resnets_0", **types)(x)
    if self.add_attention:
      x = FrameAttention(self.groups, name="attentions_0", **types)(x)
    return Resnet(x.shape[-1], self.groups, name="resnets_1", **types)(x)


class Downsample(nn.Module):
  """A convolution with strides in time and in space, which is a module because its name is one."""

  features: int
  factors: tuple[int, int]
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w i"]) -> Float[Array, "b f2 h2 w2 o"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    return CausalConv(self.features, strides=self.factors, name="conv", **types)(x)


class Upsample(nn.Module):
  """Repeats pixels in space, and in time those of all frames but the first; then a convolution."""

  features: int
  factors: tuple[int, int]
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w i"]) -> Float[Array, "b f2 h2 w2 o"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    return CausalConv(self.features, name="conv", **types)(repeated(x, *self.factors))


def repeated(x: Float[Array, "b f h w c"], time: int, space: int) -> Float[Array, "b f2 h2 w2 c"]:
  """Every pixel `space` times along both sides, and every frame but the first `time` times."""
  b, f, h, w, c = x.shape
  shape = (b, f, time, h, space, w, space, c)
  y = jnp.broadcast_to(x[:, :, None, :, None, :, None], shape)
  return y.reshape(b, time * f, space * h, space * w, c)[:, time - 1 :]

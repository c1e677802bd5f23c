"""Attention, and the transformer block of diffusers' UNets."""

import functools
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dancegrpo_jax.models.layers import Conv, Dense, Dtype, GroupNorm, LayerNorm


def attention(
  q: Float[Array, "b n h d"],
  k: Float[Array, "b m h d"],
  v: Float[Array, "b m h d"],
  *,
  mask: Bool[Array, "#b #h #n m"] | None = None,
  bias: Float[Array, "#b #h n m"] | None = None,
  scale: float | None = None,
  impl: str = "auto",
) -> Float[Array, "b n h d"]:
  """Scaled dot-product attention; logits and softmax in float32.

  Args:
    q: queries; k, v: keys and values; the head axis is third.
    mask: True where a query may look.
    bias: added to the logits.
    scale: of the products; None = d**-0.5.
    impl: xla | cudnn (NVIDIA GPUs) | splash (TPUs) | auto, which takes what the devices have and xla elsewhere. cudnn is for
      half precision and head dimensions that every generation takes, splash for head dimensions that 128 divides; neither
      takes a mask or a bias here. What a kernel can't do, xla does, with a line in the log.
  """
  d = q.shape[-1]
  place = platform()
  wanted = {"gpu": "cudnn", "tpu": "splash"}.get(place, "xla") if impl == "auto" else impl
  plain = mask is None and bias is None
  if wanted == "splash" and plain and d % 128 == 0:
    from dancegrpo_jax.models import splash  # here: Pallas takes a second to import

    return splash.attention(q, k, v, d**-0.5 if scale is None else scale, interpret=place != "tpu")
  half = q.dtype in (jnp.bfloat16, jnp.float16)
  if wanted == "cudnn" and plain and half and d % 8 == 0 and d <= 128:
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")
  if wanted != "xla":
    _told(wanted, q.dtype.name, d, plain)
  return jax.nn.dot_product_attention(q, k, v, bias, mask, scale=scale, implementation="xla")


def platform() -> str:
  """cpu, gpu or tpu: what the program is for. The mesh's devices say it, which aren't this machine's where plan.py compiles."""
  device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  name = jax.default_backend() if device is None else device.platform
  return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


@functools.cache
def _told(kernel: str, dtype: str, head_dim: int, plain: bool) -> None:
  """Says once a shape that a kernel is not used."""
  what = "" if plain else ", a mask or a bias"
  # A warning, which Python shows where nobody has set up logging.
  logging.getLogger(__name__).warning("attention: xla in place of %s for %s, heads of %d%s", kernel, dtype, head_dim, what)


class Attention(nn.Module):
  """diffusers' Attention: queries from `x`, keys and values from `context` (or `x`)."""

  heads: int
  qkv_bias: bool = False
  impl: str = "auto"
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b n c"], context: Float[Array, "b m k"] | None = None) -> Float[Array, "b n c"]:
    context = x if context is None else context
    channels = x.shape[-1]
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def heads(name: str, y: Array) -> Array:
      y = Dense(channels, use_bias=self.qkv_bias, name=name, **types)(y)
      return y.reshape(*y.shape[:-1], self.heads, channels // self.heads)

    y = attention(heads("to_q", x), heads("to_k", context), heads("to_v", context), impl=self.impl)
    return Dense(channels, name="to_out_0", **types)(y.reshape(x.shape))


class FeedForward(nn.Module):
  """Gated exact-gelu MLP (GEGLU), four times as wide."""

  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    hidden, gate = jnp.split(Projection(8 * x.shape[-1], name="net_0", **types)(x), 2, axis=-1)
    return Dense(x.shape[-1], name="net_2", **types)(hidden * jax.nn.gelu(gate, approximate=False))


class Projection(nn.Module):
  """The projection in front of a feed-forward's activation; a module of its own because its weights are named `net.0.proj`."""

  features: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n h"]:
    return Dense(self.features, name="proj", dtype=self.dtype, param_dtype=self.param_dtype)(x)


class TransformerBlock(nn.Module):
  """diffusers' BasicTransformerBlock: self-attention, cross-attention, feed-forward, each pre-normed."""

  heads: int
  impl: str = "auto"
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b n c"], context: Float[Array, "b m k"]) -> Float[Array, "b n c"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = x + Attention(self.heads, impl=self.impl, name="attn1", **types)(LayerNorm(name="norm1", **types)(x))
    x = x + Attention(self.heads, impl=self.impl, name="attn2", **types)(LayerNorm(name="norm2", **types)(x), context)
    return x + FeedForward(name="ff", **types)(LayerNorm(name="norm3", **types)(x))


class Transformer2D(nn.Module):
  """diffusers' Transformer2DModel: transformer blocks over the pixels of a feature map, with a residual around them."""

  heads: int
  layers: int
  groups: int
  linear_projection: bool
  impl: str = "auto"
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], context: Float[Array, "b m k"]) -> Float[Array, "b h w c"]:
    b, h, w, c = x.shape
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    y = GroupNorm(self.groups, 1e-6, name="norm", **types)(x)
    if self.linear_projection:
      y = Dense(c, name="proj_in", **types)(y.reshape(b, h * w, c))
    else:
      y = Conv(c, size=1, padding=0, name="proj_in", **types)(y).reshape(b, h * w, c)
    for i in range(self.layers):
      y = TransformerBlock(self.heads, impl=self.impl, name=f"transformer_blocks_{i}", **types)(y, context)
    if self.linear_projection:
      y = Dense(c, name="proj_out", **types)(y).reshape(b, h, w, c)
    else:
      y = Conv(c, size=1, padding=0, name="proj_out", **types)(y.reshape(b, h, w, c))
    return x + y

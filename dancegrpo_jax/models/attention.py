"""Attention, and the transformer block of diffusers' UNets."""

import functools
import logging
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dancegrpo_jax.models import per_device
from dancegrpo_jax.models.layers import Conv, Dense, Dtype, GroupNorm, LayerNorm

HALF = ("bfloat16", "float16")


class Place(NamedTuple):
  """The device that a program runs on.

  Attributes:
    platform: cpu | gpu | tpu.
    capability: the compute capability of an NVIDIA GPU, for example (9, 0) for Hopper; (0, 0) for
      every other device.
  """

  platform: str
  capability: tuple[int, int] = (0, 0)


class Shape(NamedTuple):
  """The sizes of an attention on all devices together, without the batch.

  Attributes:
    queries: the number of queries, in tokens.
    keys: the number of keys, in tokens.
    heads: the number of heads.
    head_dim: the width of a head.
    dtype: the name of the dtype of queries, keys and values.
  """

  queries: int
  keys: int
  heads: int
  head_dim: int
  dtype: str


def kernel(impl: str, place: Place, shape: Shape, plain: bool) -> str:
  """The implementation that computes an attention: xla | cudnn | splash.

  | kernel | `impl`                   | platform | capability | dtype             | head width    |
  | ------ | ------------------------ | -------- | ---------- | ----------------- | ------------- |
  | cudnn  | cudnn, or auto on a GPU  | gpu      | 8.x        | bfloat16, float16 | 8, 16 .. 128  |
  | cudnn  | cudnn, or auto on a GPU  | gpu      | 9.x        | bfloat16, float16 | 8, 16 .. 256  |
  | cudnn  | cudnn, or auto on a GPU  | gpu      | 10 and up  | bfloat16, float16 | 8, 16 .. 128  |
  | splash | splash, or auto on a TPU | any      | any        | any               | 128, 256 ..   |
  | xla    | everything else          |          |            |                   |               |

  The numbers of queries and keys don't matter, because both kernels get them padded (`_cudnn`,
  models/splash.py). Whether a gradient is taken doesn't matter either, so that rollout and update
  always share a kernel; this is why the heads of 10.x end at 128.

  The limits of cudnn are those of JAX's own check (jax/_src/cudnn/fused_attention_stablehlo.py,
  0.10 to 0.11) and of NVIDIA's support matrix (https://docs.nvidia.com/cudnn/operations/Attention,
  9.18): heads above 128 have a backward pass on Hopper, but not in every version on later chips.

  Args:
    impl: the value of the config: auto | xla | cudnn | splash.
    place: the device that the attention runs on.
    shape: the sizes of the attention.
    plain: whether there is neither a bias nor a mask other than `causal` and `key_lengths`.
  """
  if impl == "auto":
    impl = {"gpu": "cudnn", "tpu": "splash"}.get(place.platform, "xla")
  if impl == "cudnn" and plain and place.platform == "gpu" and place.capability >= (8, 0):
    widest = 256 if place.capability[0] == 9 else 128
    fits = shape.head_dim % 8 == 0 and shape.head_dim <= widest
    return "cudnn" if shape.dtype in HALF and fits else "xla"
  if impl == "splash" and plain and shape.head_dim % 128 == 0:
    return "splash"
  return "xla"


def attention(
  q: Float[Array, "b n h d"],
  k: Float[Array, "b m h d"],
  v: Float[Array, "b m h d"],
  *,
  key_lengths: Int[Array, "b"] | None = None,
  causal: bool = False,
  mask: Bool[Array, "#b #h #n m"] | None = None,
  bias: Float[Array, "#b #h n m"] | None = None,
  scale: float | None = None,
  impl: str = "auto",
) -> Float[Array, "b n h d"]:
  """Scaled dot-product attention, with logits and softmax in float32.

  Every implementation supports `key_lengths` and `causal`. Only xla supports a mask or a bias.

  Args:
    q: queries; the head axis is the third one.
    k: keys.
    v: values.
    key_lengths: the number of valid keys of each sample, at least 1. The caller puts the valid keys
      first. None means that all keys are valid.
    causal: whether query i sees the keys 0 to i only.
    mask: True where a query sees a key.
    bias: a term that is added to the logits.
    scale: the factor of the products; None means d**-0.5.
    impl: xla | cudnn | splash | auto (what suits the devices); `kernel` has the table. Where the
      config names a kernel that can't compute this attention, xla computes it, and the log says so
      once.
  """
  shape = Shape(
    queries=q.shape[1], keys=k.shape[1], heads=q.shape[2], head_dim=q.shape[3], dtype=q.dtype.name
  )
  scale = shape.head_dim**-0.5 if scale is None else scale
  key_lengths = None if key_lengths is None else key_lengths.astype(jnp.int32)
  where = place()
  plain = mask is None and bias is None
  chosen = kernel(impl=impl, place=where, shape=shape, plain=plain)
  if chosen == "cudnn":
    return per_device.attend(
      functools.partial(_cudnn, causal=causal, scale=scale), q, k, v, key_lengths
    )
  if chosen == "splash":
    from dancegrpo_jax.models import splash  # imported here because Pallas takes a second

    return splash.attention(
      q,
      k,
      v,
      scale,
      key_lengths=key_lengths,
      causal=causal,
      interpret=where.platform != "tpu",
    )
  if impl not in ("auto", "xla"):
    _warn_once(impl, shape.dtype, shape.head_dim, plain)
  return jax.nn.dot_product_attention(
    q,
    k,
    v,
    bias=bias,
    mask=mask,
    scale=scale,
    is_causal=causal,
    key_value_seq_lengths=key_lengths,
    implementation="xla",
  )


def _cudnn(
  q: Float[Array, "b n h d"],
  k: Float[Array, "b m h d"],
  v: Float[Array, "b m h d"],
  key_lengths: Int[Array, "b"] | None,
  *,
  causal: bool,
  scale: float,
) -> Float[Array, "b n h d"]:
  """cuDNN's fused attention on one device, for any number of queries and keys.

  JAX (0.10 to 0.11) rejects odd lengths wherever a gradient is taken, with or without a bias. An
  odd length is therefore padded by one token, the kernel gets the true lengths, and the result of
  the padded query is cut off.
  """
  batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
  lengths = {}
  if key_lengths is not None or queries % 2 or keys % 2:
    all_keys = jnp.full((batch,), keys, jnp.int32)
    lengths["query_seq_lengths"] = jnp.full((batch,), queries, jnp.int32)
    lengths["key_value_seq_lengths"] = all_keys if key_lengths is None else key_lengths
  q, k, v = (_padded_to_even(x) for x in (q, k, v))
  y = _fused(q, k, v, scale=scale, is_causal=causal, **lengths)
  return y[:, :queries]


def _padded_to_even(x: Float[Array, "b n h d"]) -> Float[Array, "b m h d"]:
  """`x` with zeros for one more token where the number of tokens is odd."""
  return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))


# The kernel itself. It has a name of its own so that a test can replace it.
_fused = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


def place() -> Place:
  """The device that the program which is being traced will run on.

  This is a device of the mesh, and not of this machine where `plan` compiles for other devices. All
  GPUs of a machine are assumed to be equal.
  """
  device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  name = jax.default_backend() if device is None else device.platform
  name = {"cuda": "gpu", "rocm": "gpu"}.get(name, name)
  if name != "gpu":
    return Place(name)
  if jax.default_backend() == "gpu":
    device = jax.local_devices()[0]
  return Place(name, capability_of(device))


# The capabilities of cards that `plan` compiles for without having them, by their device_kind.
CAPABILITIES = {"NVIDIA H100 80GB HBM3": "9.0"}


def capability_of(device: Any) -> tuple[int, int]:
  """The compute capability of a device; (0, 0) for all but NVIDIA's GPUs (AMD's is "gfx90a")."""
  known = CAPABILITIES.get(getattr(device, "device_kind", ""), "")
  major, _, minor = str(getattr(device, "compute_capability", known)).partition(".")
  return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else (0, 0)


@functools.cache
def _warn_once(impl: str, dtype: str, head_dim: int, plain: bool) -> None:
  """Warns, once for each kind of attention, that the configured kernel can't compute it."""
  what = "" if plain else ", a mask or a bias"
  # The level is a warning because Python shows those even where logging isn't set up.
  logging.getLogger(__name__).warning(
    "attention: xla in place of %s for %s, heads of %d%s", impl, dtype, head_dim, what
  )


class Attention(nn.Module):
  """diffusers' Attention: queries from `x`, keys and values from `context` or else from `x`.

  `key_lengths` are the numbers of valid keys, which come first; None means that all are valid.
  """

  heads: int
  qkv_bias: bool = False
  impl: str = "auto"
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n c"],
    context: Float[Array, "b m k"] | None = None,
    key_lengths: Int[Array, "b"] | None = None,
  ) -> Float[Array, "b n c"]:
    context = x if context is None else context
    channels = x.shape[-1]
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def heads(name: str, y: Array) -> Array:
      y = Dense(channels, use_bias=self.qkv_bias, name=name, **types)(y)
      return y.reshape(*y.shape[:-1], self.heads, channels // self.heads)

    q, k, v = heads("to_q", x), heads("to_k", context), heads("to_v", context)
    y = attention(q, k, v, key_lengths=key_lengths, impl=self.impl)
    return Dense(channels, name="to_out_0", **types)(y.reshape(x.shape))


class FeedForward(nn.Module):
  """An MLP with a gate through the exact gelu (GEGLU), four times as wide as its input."""

  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    hidden, gate = jnp.split(Projection(8 * x.shape[-1], name="net_0", **types)(x), 2, axis=-1)
    return Dense(x.shape[-1], name="net_2", **types)(hidden * jax.nn.gelu(gate, approximate=False))


class Projection(nn.Module):
  """The projection before the activation of a feed-forward.

  It is a module of its own because checkpoints name its weights `net.0.proj`.
  """

  features: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n h"]:
    return Dense(self.features, name="proj", dtype=self.dtype, param_dtype=self.param_dtype)(x)


class TransformerBlock(nn.Module):
  """diffusers' BasicTransformerBlock: self-attention, cross-attention and feed-forward, each with a
  norm before it.
  """

  heads: int
  impl: str = "auto"
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n c"], context: Float[Array, "b m k"]
  ) -> Float[Array, "b n c"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = x + Attention(self.heads, impl=self.impl, name="attn1", **types)(
      LayerNorm(name="norm1", **types)(x)
    )
    x = x + Attention(self.heads, impl=self.impl, name="attn2", **types)(
      LayerNorm(name="norm2", **types)(x), context
    )
    return x + FeedForward(name="ff", **types)(LayerNorm(name="norm3", **types)(x))


class Transformer2D(nn.Module):
  """diffusers' Transformer2DModel: transformer blocks over the pixels of a feature map, and a
  residual connection around them.
  """

  heads: int
  layers: int
  groups: int
  linear_projection: bool
  impl: str = "auto"
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], context: Float[Array, "b m k"]
  ) -> Float[Array, "b h w c"]:
    b, h, w, c = x.shape
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    y = GroupNorm(self.groups, 1e-6, name="norm", **types)(x)
    if self.linear_projection:
      y = Dense(c, name="proj_in", **types)(y.reshape(b, h * w, c))
    else:
      y = Conv(c, size=1, padding=0, name="proj_in", **types)(y).reshape(b, h * w, c)
    for i in range(self.layers):
      y = TransformerBlock(self.heads, impl=self.impl, name=f"transformer_blocks_{i}", **types)(
        y, context
      )
    if self.linear_projection:
      y = Dense(c, name="proj_out", **types)(y).reshape(b, h, w, c)
    else:
      y = Conv(c, size=1, padding=0, name="proj_out", **types)(y.reshape(b, h, w, c))
    return x + y

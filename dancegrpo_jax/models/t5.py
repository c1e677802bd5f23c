"""T5 v1.1's encoder, with the parameter names of transformers' T5EncoderModel.

Raffel et al., arXiv 1910.10683; v1.1 has a gated gelu and an embedding that is not scaled. Logits
are not divided by the root of the head's width. All layers share one table of biases by distance,
which checkpoints store with the first layer. The fields of `T5Encoder` carry the names of
config.json. Norms, logits and softmax are computed in float32 whatever `dtype` is. The residual
overflows float16.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dancegrpo_jax.models.attention import attention
from dancegrpo_jax.models.config import (
  TRANSFORMERS_HARMLESS,
  TRANSFORMERS_NEUTRAL,
  from_config,
  keys_of,
)
from dancegrpo_jax.models.layers import Dense, Dtype, RMSNorm


def buckets(length: int, count: int, max_distance: int) -> np.ndarray:
  """The row of the bias table for every (query, key): `[length, length]`.

  Half of the `count` rows are for keys after the query. In each half, the first half of the rows
  are for one distance each. The widths of the others grow with the logarithm of the distance, and
  the last one is for `max_distance` and more. The computation is in float32, as in training.
  """
  offset = np.arange(length)[None, :] - np.arange(length)[:, None]
  distance = np.abs(offset)
  half = count // 2
  exact = half // 2
  ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
  ratio = ratio / np.float32(math.log(max_distance / exact))
  far = np.minimum(exact + (ratio * np.float32(half - exact)).astype(np.int64), half - 1)
  return np.where(offset > 0, half, 0) + np.where(distance < exact, distance, far)


class SelfAttention(nn.Module):
  """Multi-head attention whose projections have no biases.

  `bias` [1, heads, n, n] is added to the logits.
  """

  num_heads: int
  d_kv: int
  dtype: Dtype
  param_dtype: Dtype

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], bias: Float[Array, "1 h n n"]
  ) -> Float[Array, "b n d"]:
    types = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
    shape = (*x.shape[:2], self.num_heads, self.d_kv)
    q, k, v = (
      Dense(self.num_heads * self.d_kv, name=name, **types)(x).reshape(shape) for name in "qkv"
    )
    # No fused kernel supports a trained bias for every length.
    y = attention(q, k, v, bias=bias, scale=1.0, impl="xla")
    return Dense(x.shape[-1], name="o", **types)(y.reshape(*x.shape[:2], -1))


class GatedDense(nn.Module):
  """The product of two projections, the first one through a gelu (tanh), is projected back."""

  d_ff: int
  dtype: Dtype
  param_dtype: Dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    types = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
    gate = jax.nn.gelu(Dense(self.d_ff, name="wi_0", **types)(x), approximate=True)
    return Dense(x.shape[-1], name="wo", **types)(gate * Dense(self.d_ff, name="wi_1", **types)(x))


class AttentionLayer(nn.Module):
  """A norm and an attention with a residual connection around them."""

  num_heads: int
  d_kv: int
  epsilon: float
  dtype: Dtype
  param_dtype: Dtype

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], bias: Float[Array, "1 h n n"]
  ) -> Float[Array, "b n d"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    y = RMSNorm(self.epsilon, name="layer_norm", **types)(x)
    return x + SelfAttention(self.num_heads, self.d_kv, name="SelfAttention", **types)(y, bias)


class FeedForwardLayer(nn.Module):
  """A norm and gated projections with a residual connection around them."""

  d_ff: int
  epsilon: float
  dtype: Dtype
  param_dtype: Dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    y = RMSNorm(self.epsilon, name="layer_norm", **types)(x)
    return x + GatedDense(self.d_ff, name="DenseReluDense", **types)(y)


class Block(nn.Module):
  """Attention and feed-forward, in the (carry, output) form that nn.scan needs."""

  num_heads: int
  d_kv: int
  d_ff: int
  epsilon: float
  dtype: Dtype
  param_dtype: Dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"], bias: Float[Array, "1 h n n"]) -> tuple:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = AttentionLayer(self.num_heads, self.d_kv, self.epsilon, name="layer_0", **types)(x, bias)
    return FeedForwardLayer(self.d_ff, self.epsilon, name="layer_1", **types)(x), None


class Stack(nn.Module):
  """The blocks and a last norm.

  With `scan_blocks` the parameters of the blocks are stacked on axis 0 of `block`; otherwise they
  are in `block_0`, `block_1` and so on.
  """

  num_layers: int
  num_heads: int
  d_kv: int
  d_ff: int
  num_buckets: int
  max_distance: int
  epsilon: float
  scan_blocks: bool
  dtype: Dtype
  param_dtype: Dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    table = nn.Embed(
      self.num_buckets,
      self.num_heads,
      dtype=jnp.float32,
      param_dtype=self.param_dtype,
      name="relative_attention_bias",
    )
    bias = table(buckets(x.shape[1], self.num_buckets, self.max_distance)).transpose(2, 0, 1)[None]
    args = (self.num_heads, self.d_kv, self.d_ff, self.epsilon)
    if self.scan_blocks:
      stack = nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=self.num_layers,
      )
      x, _ = stack(*args, name="block", **types)(x, bias)
    else:
      for i in range(self.num_layers):
        x, _ = Block(*args, name=f"block_{i}", **types)(x, bias)
    return RMSNorm(self.epsilon, name="final_layer_norm", **types)(x)


class T5Encoder(nn.Module):
  """From token ids to states. Attention includes the padding, as in FLUX's training."""

  vocab_size: int = 32128
  d_model: int = 512
  d_kv: int = 64
  d_ff: int = 2048
  num_layers: int = 6
  num_heads: int = 8
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  layer_norm_epsilon: float = 1e-6
  scan_blocks: bool = False
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, input_ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    embed = nn.Embed(
      self.vocab_size,
      self.d_model,
      embedding_init=nn.initializers.normal(1.0),
      name="shared",
      **types,
    )
    encoder = Stack(
      num_layers=self.num_layers,
      num_heads=self.num_heads,
      d_kv=self.d_kv,
      d_ff=self.d_ff,
      num_buckets=self.relative_attention_num_buckets,
      max_distance=self.relative_attention_max_distance,
      epsilon=self.layer_norm_epsilon,
      scan_blocks=self.scan_blocks,
      name="encoder",
      **types,
    )
    return encoder(embed(input_ids))


# T5 v1.1 and mT5 have the same encoder. UMT5 has a position table in every layer.
KEYS = keys_of(
  T5Encoder,
  neutral={
    **TRANSFORMERS_NEUTRAL,
    "feed_forward_proj": ("gated-gelu",),
    "model_type": ("t5", "mt5"),
  },
  harmless={
    **TRANSFORMERS_HARMLESS,
    "dense_act_fn": "follows from feed_forward_proj",
    "eos_token_id": "is the tokenizer's business",
    "is_gated_act": "follows from feed_forward_proj",
    "n_positions": "positions are relative, and have no end",
    "num_decoder_layers": "the decoder is not built here",
    "scale_decoder_outputs": "the decoder is not built here",
  },
)


def from_json(
  config_json: dict,
  dtype: Dtype = jnp.float32,
  param_dtype: Dtype = jnp.float32,
  scan_blocks: bool = False,
) -> T5Encoder:
  """The encoder that a T5 config.json describes.

  Raises:
    ValueError: a key has a value that is not implemented, or the feed-forward is not v1.1's.
  """
  if "feed_forward_proj" not in config_json:
    raise ValueError(
      "T5Encoder's config.json has no feed_forward_proj, which is then 'relu'; only"
      " 'gated-gelu', that of version 1.1, is implemented"
    )
  return from_config(
    T5Encoder,
    KEYS,
    config_json,
    dtype=dtype,
    param_dtype=param_dtype,
    scan_blocks=scan_blocks,
  )

"""FluxTransformer2DModel, the denoiser of FLUX.1, in diffusers' layout and names.

Text tokens and image tokens first go through "double" blocks, which have separate weights for the
two but one attention over both. Then they are joined and go through "single" blocks. Latents are
not packed, `[b, h, w, c]`; the network makes a token of each of their 2x2 squares. Time, guidance
and the pooled text modulate every norm. Positions enter as rotations of queries and keys, with a
part of each head for each axis. The residual is in `dtype`; norms, modulation and rotations are
computed in float32.

HunyuanVideo has the same blocks (hunyuan_video.py).
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dancegrpo_jax.models.attention import Projection, attention
from dancegrpo_jax.models.blocks import repeated
from dancegrpo_jax.models.config import from_config, keys_of
from dancegrpo_jax.models.embeddings import TimeEmbedding, sinusoid
from dancegrpo_jax.models.layers import Dense, Dtype, RMSNorm, standardise
from dancegrpo_jax.models.rotary import Rotation, grid, rotate, rotation

_EPSILON = 1e-6  # of every norm of the network
_SINUSOIDS = 256  # the number of sinusoids of time and guidance


def pack(latents: Float[Array, "b h w c"]) -> Float[Array, "b n p"]:
  """One token for every 2x2 square, row by row.

  The entries of a token are ordered (channel, row, column). `h` and `w` must be even.
  """
  b, h, w, c = latents.shape
  squares = latents.reshape(b, h // 2, 2, w // 2, 2, c)
  return squares.transpose(0, 1, 3, 5, 2, 4).reshape(b, h // 2 * (w // 2), 4 * c)


def unpack(tokens: Float[Array, "b n p"], height: int, width: int) -> Float[Array, "b h w c"]:
  """The inverse of `pack` for latents of this height and width."""
  b, _, entries = tokens.shape
  squares = tokens.reshape(b, height // 2, width // 2, entries // 4, 2, 2)
  return squares.transpose(0, 1, 4, 2, 5, 3).reshape(b, height, width, entries // 4)


def positions(text_tokens: int, rows: int, columns: int) -> np.ndarray:
  """The position (0, row, column) of every token, text first: `[text_tokens + rows * columns, 3]`.

  All text tokens have the position (0, 0, 0).
  """
  return np.concatenate([np.zeros((text_tokens, 3), np.int64), grid(1, rows, columns)])


class Modulation(nn.Module):
  """Computes `parts` vectors `[b, 1, d]`, float32, from the conditioning."""

  parts: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, conditioning: Float[Array, "b d"]) -> list[Array]:
    width = self.parts * conditioning.shape[-1]
    linear = Dense(width, name="linear", dtype=self.dtype, param_dtype=self.param_dtype)
    y = linear(nn.silu(conditioning))
    return jnp.split(y.astype(jnp.float32)[:, None, :], self.parts, axis=-1)


def modulate(
  x: Float[Array, "b n d"], shift: Float[Array, "b 1 d"], scale: Float[Array, "b 1 d"]
) -> Float[Array, "b n d"]:
  """A norm whose shift and scale come from the conditioning; the result has the dtype of `x`."""
  return (standardise(x, _EPSILON) * (1.0 + scale) + shift).astype(x.dtype)


def gated(
  x: Float[Array, "b n d"], gate: Float[Array, "b 1 d"], branch: Float[Array, "b n d"]
) -> Float[Array, "b n d"]:
  """x + gate * branch, in the dtype of `x`."""
  return (x.astype(jnp.float32) + gate * branch.astype(jnp.float32)).astype(x.dtype)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """The tanh approximation of GELU, which FLUX was trained with."""
  return jax.nn.gelu(x, approximate=True)


class FeedForward(nn.Module):
  """Two dense layers with an activation between them, four times as wide as the input."""

  activation: Callable[[Array], Array] = gelu
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    hidden = self.activation(Projection(4 * x.shape[-1], name="net_0", **types)(x))
    return Dense(x.shape[-1], name="net_2", **types)(hidden)


class _Attention(nn.Module):
  """The part that both kinds of attention share: projections, rotations and the attention."""

  heads: int
  impl: str = "auto"
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  def project(
    self, x: Float[Array, "b n d"], names: tuple[str, str, str], norms: tuple[str, str]
  ) -> tuple[Array, Array, Array]:
    """Queries, keys and values `[b, n, h, d]`; queries and keys are normalised head by head.

    Args:
      x: tokens.
      names: the layers of queries, keys and values.
      norms: the norms of queries and keys.
    """
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    shape = (*x.shape[:2], self.heads, x.shape[-1] // self.heads)
    q, k, v = (Dense(x.shape[-1], name=name, **types)(x).reshape(shape) for name in names)
    q, k = (RMSNorm(_EPSILON, name=name, **types)(y) for name, y in zip(norms, (q, k)))
    return q, k, v

  def attend(
    self, q: Array, k: Array, v: Array, by: Rotation, key_lengths: Int[Array, "b"] | None
  ) -> Float[Array, "b n d"]:
    y = attention(rotate(q, by), rotate(k, by), v, key_lengths=key_lengths, impl=self.impl)
    return y.reshape(*y.shape[:2], -1)


# The names of the layers and norms of image tokens (and of all tokens in single blocks), and of
# text tokens.
_IMAGE = ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")
_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")


class JointAttention(_Attention):
  """One attention over text and image, with separate projections. Returns (text, image).

  The tokens of `by` are text and image. With `key_lengths` they are image and text, so that valid
  tokens come first.
  """

  @nn.compact
  def __call__(
    self,
    text: Float[Array, "b t d"],
    image: Float[Array, "b n d"],
    by: Rotation,
    key_lengths: Int[Array, "b"] | None = None,
  ) -> tuple[Float[Array, "b t d"], Float[Array, "b n d"]]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    streams = [self.project(text, *_TEXT), self.project(image, *_IMAGE)]
    tokens, width = text.shape[1:]
    of_text, of_image = slice(None, tokens), slice(tokens, None)
    if key_lengths is not None:
      streams = streams[::-1]
      of_text, of_image = slice(image.shape[1], None), slice(None, image.shape[1])
    q, k, v = (jnp.concatenate(parts, axis=1) for parts in zip(*streams))
    y = self.attend(q, k, v, by, key_lengths)
    text = Dense(width, name="to_add_out", **types)(y[:, of_text])
    image = Dense(width, name="to_out_0", **types)(y[:, of_image])
    return text, image


class SelfAttention(_Attention):
  """Attention without a projection of its result, which the block has."""

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], by: Rotation, key_lengths: Int[Array, "b"] | None = None
  ) -> Float[Array, "b n d"]:
    q, k, v = self.project(x, *_IMAGE)
    return self.attend(q, k, v, by, key_lengths)


class DoubleBlock(nn.Module):
  """diffusers' FluxTransformerBlock, in the (carry, output) form that nn.scan needs.

  The carry is (text, image). `by` and `key_lengths` are those of `JointAttention`.
  """

  heads: int
  impl: str = "auto"
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    streams: tuple[Array, Array],
    conditioning: Float[Array, "b d"],
    by: Rotation,
    key_lengths: Int[Array, "b"] | None = None,
  ) -> tuple:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    suffixes = ("_context", "")  # of text and image
    parts = [Modulation(6, name=f"norm1{suffix}", **types)(conditioning) for suffix in suffixes]
    normed = [modulate(x, shift, scale) for x, (shift, scale, *_) in zip(streams, parts)]
    attended = JointAttention(self.heads, self.impl, name="attn", **types)(*normed, by, key_lengths)
    added = [gated(x, gate, y) for x, (_, _, gate, *_), y in zip(streams, parts, attended)]
    results = tuple(
      gated(x, gate, FeedForward(name=f"ff{suffix}", **types)(modulate(x, shift, scale)))
      for x, (*_, shift, scale, gate), suffix in zip(added, parts, suffixes)
    )
    return results, None


class SingleBlock(nn.Module):
  """diffusers' FluxSingleTransformerBlock: attention and feed-forward in parallel, over text and
  image as one sequence, of which `key_lengths` are the numbers of valid tokens.
  """

  heads: int
  impl: str = "auto"
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    conditioning: Float[Array, "b d"],
    by: Rotation,
    key_lengths: Int[Array, "b"] | None = None,
  ) -> tuple:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    width = x.shape[-1]
    shift, scale, gate = Modulation(3, name="norm", **types)(conditioning)
    y = modulate(x, shift, scale)
    attended = SelfAttention(self.heads, self.impl, name="attn", **types)(y, by, key_lengths)
    hidden = gelu(Dense(4 * width, name="proj_mlp", **types)(y))
    y = Dense(width, name="proj_out", **types)(jnp.concatenate([attended, hidden], axis=-1))
    return gated(x, gate, y), None


class Embeddings(nn.Module):
  """The conditioning `[b, d]`: the sum of the embeddings of time, pooled text and, in a
  guidance-distilled model, guidance.
  """

  features: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, time: Float[Array, "b"], pooled: Float[Array, "b p"], guidance: Float[Array, "b"] | None
  ) -> Float[Array, "b d"]:
    def embed(name: str, x: Array) -> Array:
      return TimeEmbedding(
        self.features, name=name, dtype=self.dtype, param_dtype=self.param_dtype
      )(x.astype(self.dtype))

    y = embed("timestep_embedder", sinusoid(time, _SINUSOIDS, True, 0))
    if guidance is not None:
      y = y + embed("guidance_embedder", sinusoid(1000.0 * guidance, _SINUSOIDS, True, 0))
    return y + embed("text_embedder", pooled)


class FluxTransformer2DModel(nn.Module):
  """Predicts the velocity, which is noise minus clean sample.

  The fields are the keys of the published config.json. With `scan_blocks` the parameters of equal
  blocks are stacked on axis 0 of `transformer_blocks` and `single_transformer_blocks`, and one
  block of each kind is compiled. Otherwise they are in `transformer_blocks_0`,
  `transformer_blocks_1` and so on.
  """

  in_channels: int = 64
  out_channels: int | None = None
  num_layers: int = 19
  num_single_layers: int = 38
  attention_head_dim: int = 128
  num_attention_heads: int = 24
  joint_attention_dim: int = 4096
  pooled_projection_dim: int = 768
  guidance_embeds: bool = False
  axes_dims_rope: tuple[int, ...] = (16, 56, 56)
  scan_blocks: bool = False
  remat: bool = False
  impl: str = "auto"
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    latents: Float[Array, "b h w c"],
    time: Float[Array, "b"],
    text: Float[Array, "b t k"],
    pooled: Float[Array, "b p"],
    guidance: Float[Array, "b"] | None = None,
  ) -> Float[Array, "b h w o"]:
    """The velocity.

    Args:
      latents: their height and width are even, and they have in_channels / 4 channels.
      time: model times from 0 to 1000, as floats.
      text: T5's states.
      pooled: CLIP's pooled text.
      guidance: the guidance scale of a guidance-distilled model; None for a model without
        `guidance_embeds`.

    Raises:
      ValueError: `guidance` is missing, or is given to a model without `guidance_embeds`.
    """
    if (guidance is not None) != self.guidance_embeds:
      raise ValueError(
        f"FluxTransformer2DModel: guidance_embeds is {self.guidance_embeds}, but guidance is"
        f" {guidance}"
      )
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    width = self.num_attention_heads * self.attention_head_dim
    height, columns = latents.shape[1:3]
    by = rotation(positions(text.shape[1], height // 2, columns // 2), self.axes_dims_rope)
    image = Dense(width, name="x_embedder", **types)(pack(latents))
    text = Dense(width, name="context_embedder", **types)(text)
    conditioning = Embeddings(width, name="time_text_embed", **types)(time, pooled, guidance)

    args = (self.num_attention_heads, self.impl, self.dtype, self.param_dtype)
    how = {"scan_blocks": self.scan_blocks, "remat": self.remat}
    name = "transformer_blocks"
    double = repeated(DoubleBlock, *args, count=self.num_layers, name=name, **how)
    text, image = double((text, image), conditioning, by)
    name, count = "single_transformer_blocks", self.num_single_layers
    single = repeated(SingleBlock, *args, count=count, name=name, **how)
    x = single(jnp.concatenate([text, image], axis=1), conditioning, by)

    scale, shift = Modulation(2, name="norm_out", **types)(conditioning)
    y = modulate(x[:, text.shape[1] :], shift, scale)
    y = Dense(self.out_channels or self.in_channels, name="proj_out", **types)(y)
    return unpack(y, height, columns)


KEYS = keys_of(
  FluxTransformer2DModel,
  neutral={"patch_size": (1,)},
  harmless={},
  types={"out_channels": (int, type(None))},
)


def from_json(
  config_json: dict,
  dtype: Dtype = jnp.float32,
  param_dtype: Dtype = jnp.float32,
  scan_blocks: bool = False,
  remat: bool = False,
  impl: str = "auto",
) -> FluxTransformer2DModel:
  """The network of a published transformer/config.json.

  Raises:
    ValueError: a key has a value that is not implemented.
  """
  network = from_config(
    FluxTransformer2DModel,
    KEYS,
    config_json,
    dtype=dtype,
    param_dtype=param_dtype,
    scan_blocks=scan_blocks,
    remat=remat,
    impl=impl,
  )
  widths, head = network.axes_dims_rope, network.attention_head_dim
  if sum(widths) != head or any(width % 2 for width in widths):
    raise ValueError(
      f"FluxTransformer2DModel: axes_dims_rope {widths} must be even and sum to"
      f" attention_head_dim {head}"
    )
  if len(widths) != 3 or network.in_channels % 4:
    raise ValueError(
      f"FluxTransformer2DModel: axes_dims_rope {widths} must have three axes, and in_channels"
      f" {network.in_channels} must be a multiple of 4, for 2x2 squares"
    )
  return network

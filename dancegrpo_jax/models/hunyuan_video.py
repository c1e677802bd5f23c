"""HunyuanVideoTransformer3DModel, the denoiser of HunyuanVideo and SkyReels-V1 (arXiv 2412.03603),
in diffusers' layout and names.

The double and single blocks are FLUX's (flux.py). What differs: a token is a 2x2 square of one
frame, and its position is (frame, row, column); the language model's text goes through blocks of
its own first, the token refiner; and texts have lengths. Tokens are ordered [image, text], so that
the valid ones come first. Tokens after the end of a text change nothing. Whoever wants to compare
with diffusers: there, such tokens see other keys than here, and no valid token sees them.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dancegrpo_jax.models.attention import Attention
from dancegrpo_jax.models.blocks import repeated
from dancegrpo_jax.models.config import from_config, keys_of
from dancegrpo_jax.models.flux import (
  DoubleBlock,
  Embeddings,
  FeedForward,
  Modulation,
  SingleBlock,
  gated,
  modulate,
  pack,
  unpack,
)
from dancegrpo_jax.models.layers import Dense, Dtype, LayerNorm, by_sample
from dancegrpo_jax.models.rotary import Rotation, grid, rotation

_EPSILON = 1e-6  # of the refiner's norms


class PatchEmbedding(nn.Module):
  """A convolution over every 2x2 square of every frame: one token each.

  The kernel is `[c, 2, 2, features]` with the axes (channel, row, column) of `pack`.
  """

  features: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b n d"]:
    init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", (0, 1, 2), 3)
    kernel = self.param("kernel", init, (x.shape[-1], 2, 2, self.features), self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
    squares = jax.vmap(pack, 1, 1)(x.astype(self.dtype))
    tokens = squares.reshape(x.shape[0], -1, squares.shape[-1])
    y = by_sample(tokens @ kernel.astype(self.dtype).reshape(-1, self.features))
    return y + bias.astype(self.dtype)[None, None]


class Patches(nn.Module):
  """It is a module of its own because checkpoints name its weights `x_embedder.proj`."""

  features: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b n d"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    return PatchEmbedding(self.features, name="proj", **types)(x)


class RefinerBlock(nn.Module):
  """Attention and feed-forward over a text, whose results are gated by the conditioning, in the
  (carry, output) form that nn.scan needs.
  """

  heads: int
  impl: str = "auto"
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b t d"], conditioning: Float[Array, "b d"], lengths: Int[Array, "b"]
  ) -> tuple:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    gate, gate_ff = Modulation(2, name="norm_out", **types)(conditioning)
    y = LayerNorm(_EPSILON, name="norm1", **types)(x)
    attention = Attention(self.heads, qkv_bias=True, impl=self.impl, name="attn", **types)
    x = gated(x, gate, attention(y, key_lengths=lengths))
    y = LayerNorm(_EPSILON, name="norm2", **types)(x)
    return gated(x, gate_ff, FeedForward(activation=nn.silu, name="ff", **types)(y)), None


class RefinerBlocks(nn.Module):
  """The refiner's blocks, which checkpoints name `token_refiner.refiner_blocks`."""

  heads: int
  layers: int
  scan_blocks: bool = False
  remat: bool = False
  impl: str = "auto"
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b t d"], conditioning: Float[Array, "b d"], lengths: Int[Array, "b"]
  ) -> Float[Array, "b t d"]:
    blocks = repeated(
      RefinerBlock,
      *(self.heads, self.impl, self.dtype, self.param_dtype),
      count=self.layers,
      name="refiner_blocks",
      scan_blocks=self.scan_blocks,
      remat=self.remat,
    )
    return blocks(x, conditioning, lengths)


class TokenRefiner(nn.Module):
  """From the language model's states to the text tokens of the denoiser.

  The conditioning of its blocks is the time and the mean of the text's valid states.
  """

  features: int
  heads: int
  layers: int
  scan_blocks: bool = False
  remat: bool = False
  impl: str = "auto"
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, text: Float[Array, "b t k"], time: Float[Array, "b"], lengths: Int[Array, "b"]
  ) -> Float[Array, "b t d"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    valid = jnp.arange(text.shape[1])[None, :, None] < lengths[:, None, None]
    states = jnp.where(valid, text.astype(jnp.float32), 0.0)
    mean = states.sum(1) / lengths[:, None].astype(jnp.float32)
    conditioning = Embeddings(self.features, name="time_text_embed", **types)(
      time, mean.astype(text.dtype), None
    )
    x = Dense(self.features, name="proj_in", **types)(text)
    refine = RefinerBlocks(
      heads=self.heads,
      layers=self.layers,
      scan_blocks=self.scan_blocks,
      remat=self.remat,
      impl=self.impl,
      name="token_refiner",
      **types,
    )
    return refine(x, conditioning, lengths)


class HunyuanVideoTransformer3DModel(nn.Module):
  """Predicts the velocity, which is noise minus clean sample.

  The fields are the keys of the published config.json. An image-to-video model has more
  `in_channels` than `out_channels`: the noisy latents' first, then the condition's. With
  `scan_blocks` the parameters of equal blocks are stacked, as in `FluxTransformer2DModel`.
  """

  in_channels: int = 16
  out_channels: int | None = 16
  num_layers: int = 20
  num_single_layers: int = 40
  num_refiner_layers: int = 2
  attention_head_dim: int = 128
  num_attention_heads: int = 24
  text_embed_dim: int = 4096
  pooled_projection_dim: int = 768
  guidance_embeds: bool = True
  rope_axes_dim: tuple[int, ...] = (16, 56, 56)
  rope_theta: float = 256.0
  scan_blocks: bool = False
  remat: bool = False
  impl: str = "auto"
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  def rotations(self, frames: int, rows: int, columns: int, text_tokens: int) -> Rotation:
    """The rotations of all tokens. Text tokens are not rotated."""
    ids = np.concatenate([grid(frames, rows, columns), np.zeros((text_tokens, 3), np.int64)])
    return rotation(ids, self.rope_axes_dim, self.rope_theta)

  @nn.compact
  def __call__(
    self,
    latents: Float[Array, "b f h w c"],
    time: Float[Array, "b"],
    text: Float[Array, "b t k"],
    lengths: Int[Array, "b"],
    pooled: Float[Array, "b p"],
    guidance: Float[Array, "b"] | None = None,
  ) -> Float[Array, "b f h w o"]:
    """The velocity.

    Args:
      latents: their height and width are even, and they have in_channels channels.
      time: model times from 0 to 1000, as floats.
      text: the language model's states.
      lengths: the number of valid states of each text, at least 1; the valid ones come first.
      pooled: CLIP's pooled text.
      guidance: the guidance scale of a guidance-distilled model; None for a model without
        `guidance_embeds`.

    Raises:
      ValueError: `guidance` is missing, or is given to a model without `guidance_embeds`.
    """
    if (guidance is not None) != self.guidance_embeds:
      raise ValueError(
        f"HunyuanVideoTransformer3DModel: guidance_embeds is {self.guidance_embeds}, but guidance"
        f" is {guidance}"
      )
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    how = {"scan_blocks": self.scan_blocks, "remat": self.remat}
    heads, width = self.num_attention_heads, self.num_attention_heads * self.attention_head_dim
    frames, height, columns = latents.shape[1:4]
    by = self.rotations(frames, height // 2, columns // 2, text.shape[1])
    image = Patches(width, name="x_embedder", **types)(latents)
    refiner = TokenRefiner(
      width,
      heads,
      self.num_refiner_layers,
      impl=self.impl,
      name="context_embedder",
      **how,
      **types,
    )
    text = refiner(text, time, lengths)
    conditioning = Embeddings(width, name="time_text_embed", **types)(time, pooled, guidance)

    fixed = conditioning, by, image.shape[1] + lengths
    args = heads, self.impl, self.dtype, self.param_dtype
    name, count = "transformer_blocks", self.num_layers
    text, image = repeated(DoubleBlock, *args, count=count, name=name, **how)((text, image), *fixed)
    name, count = "single_transformer_blocks", self.num_single_layers
    x = jnp.concatenate([image, text], axis=1)
    x = repeated(SingleBlock, *args, count=count, name=name, **how)(x, *fixed)

    scale, shift = Modulation(2, name="norm_out", **types)(conditioning)
    y = modulate(x[:, : image.shape[1]], shift, scale)
    y = Dense(4 * (self.out_channels or self.in_channels), name="proj_out", **types)(y)
    by_frame = y.reshape(y.shape[0], frames, -1, y.shape[-1])
    return jax.vmap(lambda tokens: unpack(tokens, height, columns), 1, 1)(by_frame)


KEYS = keys_of(
  HunyuanVideoTransformer3DModel,
  neutral={
    # The conditions of Tencent's own image-to-video models; SkyReels-V1 has none of them.
    "image_condition_type": (None,),
    "mlp_ratio": (4.0,),
    "patch_size": (2,),
    "patch_size_t": (1,),
    "qk_norm": ("rms_norm",),
  },
  types={"out_channels": (int, type(None))},
)


def from_json(
  config_json: dict,
  dtype: Dtype = jnp.float32,
  param_dtype: Dtype = jnp.float32,
  scan_blocks: bool = False,
  remat: bool = False,
  impl: str = "auto",
) -> HunyuanVideoTransformer3DModel:
  """The network of a published transformer/config.json.

  Raises:
    ValueError: a key has a value that is not implemented.
  """
  network = from_config(
    HunyuanVideoTransformer3DModel,
    KEYS,
    config_json,
    dtype=dtype,
    param_dtype=param_dtype,
    scan_blocks=scan_blocks,
    remat=remat,
    impl=impl,
  )
  widths, head = network.rope_axes_dim, network.attention_head_dim
  if len(widths) != 3 or sum(widths) != head or any(width % 2 for width in widths):
    raise ValueError(
      f"HunyuanVideoTransformer3DModel: rope_axes_dim {widths} must be three even numbers that sum"
      f" to attention_head_dim {head}"
    )
  return network

"""AutoencoderKL of Stable Diffusion and FLUX, in diffusers' layout and names."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dancegrpo_jax.models.attention import attention
from dancegrpo_jax.models.config import from_config, keys_of, require_lengths
from dancegrpo_jax.models.layers import (
  Conv,
  Dense,
  Downsample,
  Dtype,
  GroupNorm,
  ResnetBlock,
  Upsample,
)
from dancegrpo_jax.types import PyTree

_EPSILON = 1e-6  # every norm of the autoencoder


class AttentionBlock(nn.Module):
  """The attention with one head in the middle of encoder and decoder."""

  groups: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    batch, channels = x.shape[0], x.shape[-1]
    y = GroupNorm(self.groups, _EPSILON, name="group_norm", **types)(x)
    y = y.reshape(batch, -1, channels)
    q, k, v = (
      Dense(channels, name=name, **types)(y)[:, :, None, :] for name in ("to_q", "to_k", "to_v")
    )
    # The head is as wide as the feature map, which no fused kernel supports.
    y = attention(q, k, v, impl="xla")[:, :, 0, :]
    return x + Dense(channels, name="to_out_0", **types)(y).reshape(x.shape)


class MidBlock(nn.Module):
  """A resnet, an attention and another resnet."""

  groups: int
  add_attention: bool
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = ResnetBlock(x.shape[-1], self.groups, _EPSILON, name="resnets_0", **types)(x)
    if self.add_attention:
      x = AttentionBlock(self.groups, name="attentions_0", **types)(x)
    return ResnetBlock(x.shape[-1], self.groups, _EPSILON, name="resnets_1", **types)(x)


class EncoderBlock(nn.Module):
  """Resnets, then a convolution with stride 2 that is padded on the right and bottom only."""

  features: int
  layers: int
  groups: int
  downsample: bool
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    for j in range(self.layers):
      x = ResnetBlock(self.features, self.groups, _EPSILON, name=f"resnets_{j}", **types)(x)
    if self.downsample:
      x = Downsample(self.features, ((0, 1), (0, 1)), name="downsamplers_0", **types)(x)
    return x


class DecoderBlock(nn.Module):
  """Resnets, then a layer that doubles height and width."""

  features: int
  layers: int
  groups: int
  upsample: bool
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    for j in range(self.layers):
      x = ResnetBlock(self.features, self.groups, _EPSILON, name=f"resnets_{j}", **types)(x)
    return Upsample(self.features, name="upsamplers_0", **types)(x) if self.upsample else x


class Encoder(nn.Module):
  """From pixels to the moments of latents, `[b, h, w, 3] -> [b, h/f, w/f, 2 latent]`."""

  widths: tuple[int, ...]
  layers: int
  groups: int
  latent_channels: int
  mid_attention: bool
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 m"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = Conv(self.widths[0], name="conv_in", **types)(x)
    for i, width in enumerate(self.widths):
      last = i == len(self.widths) - 1
      x = EncoderBlock(width, self.layers, self.groups, not last, name=f"down_blocks_{i}", **types)(
        x
      )
    x = MidBlock(self.groups, self.mid_attention, name="mid_block", **types)(x)
    x = nn.silu(GroupNorm(self.groups, _EPSILON, name="conv_norm_out", **types)(x))
    return Conv(2 * self.latent_channels, name="conv_out", **types)(x)


class Decoder(nn.Module):
  """From latents to pixels, `[b, h, w, latent] -> [b, f h, f w, out]`."""

  widths: tuple[int, ...]
  layers: int
  groups: int
  out_channels: int
  mid_attention: bool
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, z: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 c"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = Conv(self.widths[-1], name="conv_in", **types)(z)
    x = MidBlock(self.groups, self.mid_attention, name="mid_block", **types)(x)
    for i, width in enumerate(reversed(self.widths)):
      last = i == len(self.widths) - 1
      x = DecoderBlock(
        width, self.layers + 1, self.groups, not last, name=f"up_blocks_{i}", **types
      )(x)
    x = nn.silu(GroupNorm(self.groups, _EPSILON, name="conv_norm_out", **types)(x))
    return Conv(self.out_channels, name="conv_out", **types)(x)


class AutoencoderKL(nn.Module):
  """The variational autoencoder; the fields are the keys of its config.json.

  Pixels here are in [-1, 1]. `encode` returns and `decode` takes the network's latents;
  `pixels_of` converts the denoiser's latents to them.
  """

  in_channels: int = 3
  out_channels: int = 3
  down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
  up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
  block_out_channels: tuple[int, ...] = (64,)
  layers_per_block: int = 1
  latent_channels: int = 4
  norm_num_groups: int = 32
  scaling_factor: float = 0.18215
  shift_factor: float | None = None
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  mid_block_add_attention: bool = True
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  def setup(self):
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    shape = (tuple(self.block_out_channels), self.layers_per_block, self.norm_num_groups)
    self.encoder = Encoder(*shape, self.latent_channels, self.mid_block_add_attention, **types)
    self.decoder = Decoder(*shape, self.out_channels, self.mid_block_add_attention, **types)
    if self.use_quant_conv:
      self.quant_conv = Conv(2 * self.latent_channels, size=1, padding=0, **types)
    if self.use_post_quant_conv:
      self.post_quant_conv = Conv(self.latent_channels, size=1, padding=0, **types)

  def encode(
    self, pixels: Float[Array, "b h w c"]
  ) -> tuple[Float[Array, "b h2 w2 z"], Float[Array, "b h2 w2 z"]]:
    """Mean and log-variance (clipped to [-30, 20]) of the latents."""
    moments = self.encoder(pixels)
    if self.use_quant_conv:
      moments = self.quant_conv(moments)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_variance, -30.0, 20.0)

  def decode(self, latents: Float[Array, "b h w z"]) -> Float[Array, "b h2 w2 c"]:
    """Pixels, nominally in [-1, 1], not clipped."""
    return self.decoder(self.post_quant_conv(latents) if self.use_post_quant_conv else latents)

  def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """The reconstruction from the mean. It uses every parameter, which `init` relies on."""
    return self.decode(self.encode(pixels)[0])


def pixels_of(
  network: AutoencoderKL, params: PyTree, latents: Float[Array, "b h w z"]
) -> Float[Array, "b h2 w2 c"]:
  """Pixels in [0, 1], float32, from latents with the denoiser's scale and shift."""
  unscaled = latents / network.scaling_factor + (network.shift_factor or 0.0)
  pixels = network.apply({"params": params}, unscaled.astype(network.dtype), method="decode")
  return jnp.clip(pixels.astype(jnp.float32) / 2 + 0.5, 0.0, 1.0)


KEYS = keys_of(
  AutoencoderKL,
  neutral={"act_fn": ("silu",), "latents_mean": (None,), "latents_std": (None,)},
  harmless={
    "force_upcast": "the dtype is config.model.frozen_dtype",
    "sample_size": "is the size of tiles, and nothing is tiled here",
  },
  types={"shift_factor": (int, float, type(None))},
)


def from_json(
  config_json: dict, dtype: Dtype = jnp.float32, param_dtype: Dtype = jnp.float32
) -> AutoencoderKL:
  """The network of a published vae/config.json.

  Raises:
    ValueError: a key has a value that is not implemented.
  """
  network = from_config(AutoencoderKL, KEYS, config_json, dtype=dtype, param_dtype=param_dtype)
  kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
  for key, kind in kinds.items():
    other = set(getattr(network, key)) - {kind}
    if other:
      raise ValueError(f"AutoencoderKL: {key} holds {sorted(other)}; only {kind} is implemented")
  require_lengths(network, "block_out_channels", *kinds)
  return network

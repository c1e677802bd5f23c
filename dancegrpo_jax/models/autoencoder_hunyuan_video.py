"""AutoencoderKLHunyuanVideo, the autoencoder of videos, in diffusers' layout and names.

Clips are `[b, f, h, w, c]`. The first latent frame stands for one frame and every later one for
four, so that a clip has 4 n + 1 frames, and a picture is a clip of one frame. No frame of a
convolution or of an attention sees a later one, but the norms' statistics are of all frames.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dancegrpo_jax.models.causal_conv import CausalConv, Conv3d
from dancegrpo_jax.models.config import from_config, keys_of, require_lengths
from dancegrpo_jax.models.layers import Dtype, GroupNorm
from dancegrpo_jax.models.video_blocks import EPSILON, Downsample, MidBlock, Resnet, Upsample


class EncoderBlock(nn.Module):
  """Resnets, then a convolution that divides the frames, the height and the width by factors."""

  features: int
  layers: int
  groups: int
  factors: tuple[int, int]
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w i"]) -> Float[Array, "b f2 h2 w2 o"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    for j in range(self.layers):
      x = Resnet(self.features, self.groups, name=f"resnets_{j}", **types)(x)
    if self.factors != (1, 1):
      x = Downsample(self.features, self.factors, name="downsamplers_0", **types)(x)
    return x


class DecoderBlock(nn.Module):
  """Resnets, then a layer that multiplies the frames, the height and the width by factors."""

  features: int
  layers: int
  groups: int
  factors: tuple[int, int]
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w i"]) -> Float[Array, "b f2 h2 w2 o"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    for j in range(self.layers):
      x = Resnet(self.features, self.groups, name=f"resnets_{j}", **types)(x)
    if self.factors != (1, 1):
      x = Upsample(self.features, self.factors, name="upsamplers_0", **types)(x)
    return x


class Encoder(nn.Module):
  """From pixels to the moments of latents, `[b, f, h, w, 3] -> [b, f', h', w', 2 latent]`."""

  widths: tuple[int, ...]
  layers: int
  groups: int
  latent_channels: int
  mid_attention: bool
  factors: tuple[tuple[int, int], ...]
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w i"]) -> Float[Array, "b f2 h2 w2 o"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = CausalConv(self.widths[0], name="conv_in", **types)(x)
    for i, (width, factors) in enumerate(zip(self.widths, self.factors, strict=True)):
      block = EncoderBlock(
        width, self.layers, self.groups, factors, name=f"down_blocks_{i}", **types
      )
      x = block(x)
    x = MidBlock(self.groups, self.mid_attention, name="mid_block", **types)(x)
    x = nn.silu(GroupNorm(self.groups, EPSILON, name="conv_norm_out", **types)(x))
    return CausalConv(2 * self.latent_channels, name="conv_out", **types)(x)


class Decoder(nn.Module):
  """From latents to pixels, `[b, f', h', w', latent] -> [b, f, h, w, out]`."""

  widths: tuple[int, ...]
  layers: int
  groups: int
  out_channels: int
  mid_attention: bool
  factors: tuple[tuple[int, int], ...]
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, z: Float[Array, "b f h w i"]) -> Float[Array, "b f2 h2 w2 o"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = CausalConv(self.widths[-1], name="conv_in", **types)(z)
    x = MidBlock(self.groups, self.mid_attention, name="mid_block", **types)(x)
    for i, (width, factors) in enumerate(zip(reversed(self.widths), self.factors, strict=True)):
      block = DecoderBlock(
        width, self.layers + 1, self.groups, factors, name=f"up_blocks_{i}", **types
      )
      x = block(x)
    x = nn.silu(GroupNorm(self.groups, EPSILON, name="conv_norm_out", **types)(x))
    return CausalConv(self.out_channels, name="conv_out", **types)(x)


class AutoencoderKLHunyuanVideo(nn.Module):
  """The variational autoencoder of videos; the fields are the keys of its config.json.

  Pixels here are in [-1, 1], and nothing is tiled. `encode` returns and `decode` takes the
  network's latents; `video_tiles.pixels_of` converts the denoiser's latents to them.
  """

  in_channels: int = 3
  out_channels: int = 3
  latent_channels: int = 16
  down_block_types: tuple[str, ...] = ("HunyuanVideoDownBlock3D",) * 4
  up_block_types: tuple[str, ...] = ("HunyuanVideoUpBlock3D",) * 4
  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
  layers_per_block: int = 2
  norm_num_groups: int = 32
  scaling_factor: float = 0.476986
  spatial_compression_ratio: int = 8
  temporal_compression_ratio: int = 4
  mid_block_add_attention: bool = True
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  def setup(self):
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    shape = (tuple(self.block_out_channels), self.layers_per_block, self.norm_num_groups)
    rest = (self.mid_block_add_attention, factors_of(self))
    self.encoder = Encoder(*shape, self.latent_channels, *rest, **types)
    self.decoder = Decoder(*shape, self.out_channels, *rest, **types)
    self.quant_conv = Conv3d(2 * self.latent_channels, size=1, **types)
    self.post_quant_conv = Conv3d(self.latent_channels, size=1, **types)

  def encode(
    self, pixels: Float[Array, "b f h w c"]
  ) -> tuple[Float[Array, "b f2 h2 w2 z"], Float[Array, "b f2 h2 w2 z"]]:
    """Mean and log-variance (clipped to [-30, 20]) of the latents."""
    return split_moments(self.moments(pixels))

  def moments(self, pixels: Float[Array, "b f h w c"]) -> Float[Array, "b f2 h2 w2 m"]:
    """Mean and log-variance of the latents along the last axis, the latter not clipped."""
    return self.quant_conv(self.encoder(pixels))

  def decode(self, latents: Float[Array, "b f2 h2 w2 z"]) -> Float[Array, "b f h w c"]:
    """Pixels, nominally in [-1, 1], not clipped."""
    return self.decoder(self.post_quant_conv(latents))

  def __call__(self, pixels: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
    """The reconstruction from the mean. It uses every parameter, which `init` relies on."""
    return self.decode(self.encode(pixels)[0])


def split_moments(
  moments: Float[Array, "b f h w m"],
) -> tuple[Float[Array, "b f h w z"], Float[Array, "b f h w z"]]:
  """Mean and log-variance, clipped to [-30, 20], of a network's moments."""
  mean, log_variance = jnp.split(moments, 2, axis=-1)
  return mean, jnp.clip(log_variance, -30.0, 20.0)


def factors_of(network: AutoencoderKLHunyuanVideo) -> tuple[tuple[int, int], ...]:
  """What each level of the encoder divides, and of the decoder multiplies, frames and pixels by.

  The rule is that of diffusers, for encoder and decoder alike: the first levels change height and
  width, and the levels before the last one change the frames. In the published network these are
  (1, 2), (2, 2), (2, 2) and (1, 1).
  """
  levels = len(network.block_out_channels)
  in_space = network.spatial_compression_ratio.bit_length() - 1
  in_time = network.temporal_compression_ratio.bit_length() - 1
  return tuple(
    (2 if levels - 1 - in_time <= i < levels - 1 else 1, 2 if i < in_space else 1)
    for i in range(levels)
  )


KEYS = keys_of(AutoencoderKLHunyuanVideo, neutral={"act_fn": ("silu",)})


def from_json(
  config_json: dict, dtype: Dtype = jnp.float32, param_dtype: Dtype = jnp.float32
) -> AutoencoderKLHunyuanVideo:
  """The network of a published vae/config.json.

  Raises:
    ValueError: a key has a value that is not implemented.
  """
  network = from_config(
    AutoencoderKLHunyuanVideo, KEYS, config_json, dtype=dtype, param_dtype=param_dtype
  )
  kinds = {
    "down_block_types": "HunyuanVideoDownBlock3D",
    "up_block_types": "HunyuanVideoUpBlock3D",
  }
  for key, kind in kinds.items():
    other = set(getattr(network, key)) - {kind}
    if other:
      raise ValueError(
        f"AutoencoderKLHunyuanVideo: {key} holds {sorted(other)}; only {kind} is implemented"
      )
  require_lengths(network, "block_out_channels", *kinds)
  _check_ratios(network)
  return network


def _check_ratios(network: AutoencoderKLHunyuanVideo) -> None:
  """Checks that the levels really compress by the ratios that the file states.

  Raises:
    ValueError: they don't.
  """
  space, time = (network.spatial_compression_ratio, network.temporal_compression_ratio)
  levels = len(network.block_out_channels)
  allowed = [2**i for i in range(levels + 1)]
  if time != 4 or levels < 3:
    raise ValueError(
      f"AutoencoderKLHunyuanVideo: temporal_compression_ratio = {time} with {levels} levels; only"
      " 4 with at least 3 levels is implemented"
    )
  if space not in allowed:
    raise ValueError(
      f"AutoencoderKLHunyuanVideo: spatial_compression_ratio = {space} with {levels} levels; it"
      f" must be one of {', '.join(map(str, allowed))}"
    )

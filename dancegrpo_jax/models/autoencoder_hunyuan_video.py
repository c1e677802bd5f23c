"""AutoencoderKLHunyuanVideo, the autoencoder of videos, in diffusers' layout and names.

Clips are `[b, f, h, w, c]`. The first frame stands for itself and every later latent frame for four
frames, so that a clip has 4 n + 1 frames, and a picture is a clip of one frame.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dancegrpo_jax.models.attention import attention
from dancegrpo_jax.models.causal_conv import CausalConv, Conv3d
from dancegrpo_jax.models.config import from_config, keys_of, require_lengths
from dancegrpo_jax.models.layers import Dense, Dtype, GroupNorm

_EPSILON = 1e-6  # every norm of the autoencoder


class Resnet(nn.Module):
  """Norm, silu, convolution, twice, and a shortcut. The norms' statistics are of all frames."""

  features: int
  groups: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w i"]) -> Float[Array, "b f h w o"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    y = nn.silu(GroupNorm(self.groups, _EPSILON, name="norm1", **types)(x))
    y = CausalConv(self.features, name="conv1", **types)(y)
    y = nn.silu(GroupNorm(self.groups, _EPSILON, name="norm2", **types)(y))
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
    y = GroupNorm(self.groups, _EPSILON, name="group_norm", **types)(x)
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
    x = nn.silu(GroupNorm(self.groups, _EPSILON, name="conv_norm_out", **types)(x))
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
    x = nn.silu(GroupNorm(self.groups, _EPSILON, name="conv_norm_out", **types)(x))
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

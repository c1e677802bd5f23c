"""The autoencoder of HunyuanVideo against diffusers, with random weights in every tensor."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video as theirs_of
from torch_parity import convert, error, randomise, run

from dancegrpo_jax.conversion.tables.hunyuan_video_vae import AUTOENCODER
from dancegrpo_jax.models import autoencoder_hunyuan_video as ours_of
from dancegrpo_jax.models import video_tiles
from dancegrpo_jax.models.causal_conv import CausalConv, native, summed
from dancegrpo_jax.models.video_blocks import FrameAttention
from dancegrpo_jax.models.video_tiles import Tiles

# The published network in small: 4 levels, 8 x 8 pixels and 4 frames a latent.
FOUR = {
  "block_out_channels": [8, 8, 8, 8],
  "down_block_types": ["HunyuanVideoDownBlock3D"] * 4,
  "up_block_types": ["HunyuanVideoUpBlock3D"] * 4,
  "layers_per_block": 1,
  "latent_channels": 4,
  "norm_num_groups": 4,
}
# Of other widths, so that resnets have shortcuts; both remaining levels change frames and pixels.
THREE = FOUR | {
  "block_out_channels": [8, 16, 8],
  "down_block_types": ["HunyuanVideoDownBlock3D"] * 3,
  "up_block_types": ["HunyuanVideoUpBlock3D"] * 3,
  "spatial_compression_ratio": 4,
}
CONFIGS = {"four": FOUR, "three": THREE}


def ours(x: torch.Tensor) -> np.ndarray:
  """[b, c, f, h, w] -> [b, f, h, w, c]."""
  return np.ascontiguousarray(x.detach().permute(0, 2, 3, 4, 1).numpy())


def theirs(x: np.ndarray) -> np.ndarray:
  """[b, f, h, w, c] -> [b, c, f, h, w]."""
  return np.ascontiguousarray(x.transpose(0, 4, 1, 2, 3))


def drawn(seed: int, *shape: int) -> torch.Tensor:
  return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@cache
def pair(name: str, scale: float = 1.0):
  """Diffusers' network, which tiles nothing, our network, and our parameters."""
  published = randomise(AutoencoderKLHunyuanVideo(**CONFIGS[name]), seed=1, scale=scale)
  published.use_framewise_decoding = published.use_framewise_encoding = False
  network = ours_of.from_json(CONFIGS[name])
  params = convert(AUTOENCODER, published, network, np.zeros((1, 1, 8, 8, 3), np.float32))
  return published, network, params


@cache
def apply(network, method):
  """A method of a network; the same object in each test, so that it compiles once."""
  return lambda p, x: network.apply({"params": p}, x, method=method)


@pytest.mark.parametrize(
  "name, scale, frames",
  [
    ("four", 1.0, 1),
    ("four", 1.0, 4),
    ("four", 1e-3, 4),
    ("three", 1.0, 3),
  ],
)
def test_decode(name, scale, frames):
  published, network, params = pair(name, scale)
  latents = drawn(frames, 2, 4, frames, 2, 3)
  decoded = run(apply(network, "decode"), params, ours(latents))
  assert decoded.shape[1] == 4 * (frames - 1) + 1
  with torch.no_grad():
    assert error(theirs(decoded), published.decode(latents).sample) <= 1e-4


@pytest.mark.parametrize(
  "name, scale, frames",
  [("four", 1.0, 1), ("four", 1.0, 13), ("four", 1e-3, 13), ("three", 1.0, 9)],
)
def test_encode(name, scale, frames):
  published, network, params = pair(name, scale)
  pixels = drawn(frames, 2, 3, frames, 24, 16)
  mean, log_variance = run(apply(network, "encode"), params, ours(pixels))
  with torch.no_grad():
    posterior = published.encode(pixels).latent_dist
    assert error(theirs(mean), posterior.mean) <= 1e-4
    assert error(theirs(log_variance), posterior.logvar) <= 1e-4


def test_log_variance_is_clipped_as_diffusers_does():
  published, network, params = pair("three")
  pixels = drawn(9, 2, 3, 9, 24, 16)
  quant = {name: 100 * value for name, value in params["quant_conv"].items()}
  _, log_variance = run(apply(network, "encode"), params | {"quant_conv": quant}, ours(pixels))
  assert log_variance.min() == -30 and log_variance.max() == 20
  with torch.no_grad():
    posterior = theirs_of.DiagonalGaussianDistribution(
      100 * published.quant_conv(published.encoder(pixels))
    )
  assert error(theirs(log_variance), posterior.logvar) <= 1e-4


# ---- Tiles

SMALL = Tiles(side=64, side_stride=48)


@cache
def tiling_pair(tiling: str):
  """Diffusers' network with its tiles, ours, and parameters with which few pixels are clipped."""
  published = randomise(AutoencoderKLHunyuanVideo(**FOUR), seed=4)
  with torch.no_grad():
    for parameter in published.decoder.conv_out.parameters():
      parameter.mul_(0.2)
  if tiling == "none":
    published.use_framewise_decoding = published.use_framewise_encoding = False
  if tiling == "diffusers":
    side, stride = SMALL.side, SMALL.side_stride
    published.enable_tiling(
      side, side, tile_sample_stride_height=stride, tile_sample_stride_width=stride
    )
  network = ours_of.from_json(FOUR)
  params = convert(AUTOENCODER, published, network, np.zeros((1, 1, 8, 8, 3), np.float32))
  return published, network, params


@pytest.mark.parametrize(
  "tiling, shape",
  [
    ("none", (14, 2, 3)),
    ("time", (14, 2, 3)),
    pytest.param("time", (16, 2, 3), marks=pytest.mark.slow),
    ("diffusers", (1, 12, 12)),
    ("diffusers", (5, 12, 2)),
  ],
)
def test_tiled_decode(tiling, shape):
  """Of clips of several frames, heights and widths, with tiles of 64 pixels at a stride of 48.

  16 latent frames end in a tile of one frame, which adds nothing. 2 x 3 latents are one tile.
  """
  published, network, params = tiling_pair(tiling)
  latents = drawn(7, 1, 4, *shape)
  pixels = run(
    lambda p, z: video_tiles.pixels_of(network, p, z, tiling, SMALL), params, ours(latents)
  )
  with torch.no_grad():
    expected = published.decode(latents / 0.476986).sample.clip(-1, 1)
  assert (expected.abs() < 1).double().mean() > 0.95
  assert error(theirs(2 * pixels - 1), expected) <= 1e-4


@pytest.mark.parametrize(
  "tiling, shape",
  [
    ("time", (29, 16, 24)),
    ("diffusers", (1, 72, 48)),
    pytest.param("diffusers", (21, 72, 96), marks=pytest.mark.slow),
  ],
)
def test_tiled_encode(tiling, shape):
  published, network, params = tiling_pair(tiling)
  pixels = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(8))
  mean, log_variance = run(
    lambda p, x: video_tiles.posterior_of(network, p, x, tiling, SMALL), params, ours(pixels)
  )
  with torch.no_grad():
    posterior = published.encode(2 * pixels - 1).latent_dist
  assert error(theirs(mean), posterior.mean) <= 1e-4
  assert error(theirs(log_variance), posterior.logvar) <= 1e-4


def test_unknown_tilings_and_broken_tiles_are_refused():
  _, network, params = tiling_pair("none")
  with pytest.raises(ValueError, match="tiling = 'space': unknown; one of none, time, diffusers"):
    video_tiles.pixels_of(network, params, jnp.zeros((1, 1, 2, 2, 4)), "space")
  with pytest.raises(ValueError, match="multiples of 4 frames and 8 pixels"):
    video_tiles.pixels_of(network, params, jnp.zeros((1, 1, 2, 2, 4)), "time", Tiles(side=60))


# ---- Modules


@pytest.mark.parametrize("frames, strides", [(1, (2, 2)), (2, (1, 1)), (5, (1, 2)), (5, (2, 2))])
def test_causal_convolution(frames, strides):
  """Ours in both forms, of which one backend uses one, against diffusers."""
  time, space = strides
  published = randomise(
    theirs_of.HunyuanVideoCausalConv3d(6, 5, stride=(time, space, space)), seed=2
  )
  x = drawn(3, 2, 6, frames, 7, 8)
  kernel = published.conv.weight.detach().numpy().transpose(2, 3, 4, 1, 0)
  bias = published.conv.bias.detach().numpy()
  expected = published(x)
  params = {"conv": {"kernel": kernel, "bias": bias}}
  y = run(apply(CausalConv(5, strides=strides), None), params, ours(x))
  assert error(theirs(y), expected) <= 2e-5
  padded = np.pad(ours(x), ((0, 0), (2, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
  for form in (native, summed):
    y = run(lambda x, k, form=form: form(x, k, strides), padded, kernel)
    assert error(theirs(y + bias), expected) <= 2e-5


@pytest.mark.parametrize("frames", [1, 3])
def test_attention_to_earlier_frames(frames):
  published = randomise(
    theirs_of.HunyuanVideoMidBlock3D(8, resnet_groups=4, attention_head_dim=8), 5
  )
  attention = published.attentions[0]
  x = drawn(6, 2, 8, frames, 3, 4)
  flat = x.permute(0, 2, 3, 4, 1).flatten(1, 3)
  mask = theirs_of.prepare_causal_attention_mask(frames, 12, x.dtype, x.device, batch_size=2)
  params = {
    ours: {"kernel": module.weight.detach().numpy().T, "bias": module.bias.detach().numpy()}
    for ours, module in (
      ("to_q", attention.to_q),
      ("to_k", attention.to_k),
      ("to_v", attention.to_v),
      ("to_out_0", attention.to_out[0]),
    )
  }
  norm = attention.group_norm
  params["group_norm"] = {
    "scale": norm.weight.detach().numpy(),
    "bias": norm.bias.detach().numpy(),
  }
  y = run(apply(FrameAttention(4), None), params, ours(x))
  with torch.no_grad():
    expected = attention(flat, attention_mask=mask)
  assert error(y.reshape(2, -1, 8), expected) <= 2e-5


# ---- Gradients


def test_gradients_are_those_of_torch():
  """Of a loss of reconstruction and moments, for every parameter: pre-training needs them."""
  published, network, params = pair("three")
  pixels = drawn(9, 2, 3, 5, 8, 12)

  def loss(params, x):
    mean, log_variance = network.apply({"params": params}, x, method="encode")
    rebuilt = network.apply({"params": params}, mean, method="decode")
    return jnp.square(rebuilt - x).mean() + jnp.square(log_variance).mean()

  value, gradients = run(jax.value_and_grad(loss), params, ours(pixels))
  posterior = published.encode(pixels).latent_dist
  rebuilt = published.decode(posterior.mean).sample
  expected = (rebuilt - pixels).square().mean() + posterior.logvar.square().mean()
  carrier = AutoencoderKLHunyuanVideo(**THREE)
  derivatives = torch.autograd.grad(expected, list(published.parameters()))
  with torch.no_grad():
    for parameter, derivative in zip(carrier.parameters(), derivatives, strict=True):
      parameter.copy_(derivative)
  wanted = convert(AUTOENCODER, carrier, network, np.zeros((1, 1, 8, 8, 3), np.float32))
  largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(wanted), strict=True
  ):
    # Some are nothing but rounding: a softmax doesn't change with the bias of its keys.
    bound = 1e-4 * max(np.abs(b).max(), 1e-3 * largest)
    assert np.abs(a - b).max() <= bound, jax.tree_util.keystr(path)

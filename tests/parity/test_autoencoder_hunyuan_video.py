"""The autoencoder of HunyuanVideo against diffusers, with random weights in every tensor."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video as theirs_of
from torch_parity import convert, error, randomise, run

from dancegrpo_jax.conversion.tables.hunyuan_video import AUTOENCODER
from dancegrpo_jax.models import autoencoder_hunyuan_video as ours_of

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
  "layers_per_block": 2,
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


def apply(network, method):
  return lambda p, x: network.apply({"params": p}, x, method=method)


@pytest.mark.parametrize("name, scale", [("four", 1.0), ("four", 1e-3), ("three", 1.0)])
@pytest.mark.parametrize("frames", [1, 4, 14])
def test_decode(name, scale, frames):
  published, network, params = pair(name, scale)
  latents = drawn(frames, 2, 4, frames, 2, 3)
  decoded = run(apply(network, "decode"), params, ours(latents))
  assert decoded.shape[1] == 4 * (frames - 1) + 1
  with torch.no_grad():
    assert error(theirs(decoded), published.decode(latents).sample) <= 1e-4


@pytest.mark.parametrize("name, scale", [("four", 1.0), ("four", 1e-3), ("three", 1.0)])
@pytest.mark.parametrize("frames", [1, 13])
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
  pixels = drawn(0, 1, 3, 5, 8, 8)
  quant = {name: 100 * value for name, value in params["quant_conv"].items()}
  _, log_variance = run(apply(network, "encode"), params | {"quant_conv": quant}, ours(pixels))
  assert log_variance.min() == -30 and log_variance.max() == 20
  with torch.no_grad():
    posterior = theirs_of.DiagonalGaussianDistribution(
      100 * published.quant_conv(published.encoder(pixels))
    )
  assert error(theirs(log_variance), posterior.logvar) <= 1e-4


# ---- Modules


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("strides", [(1, 1), (1, 2), (2, 2)])
def test_causal_convolution(frames, strides):
  from dancegrpo_jax.models.causal_conv import CausalConv, Conv3d, native, summed

  time, space = strides
  published = theirs_of.HunyuanVideoCausalConv3d(6, 5, stride=(time, space, space))
  randomise(published, seed=2)
  x = drawn(3, 2, 6, frames, 7, 8)
  kernel = published.conv.weight.detach().numpy().transpose(2, 3, 4, 1, 0)
  params = {"conv": {"kernel": kernel, "bias": published.conv.bias.detach().numpy()}}
  y = run(apply(CausalConv(5, strides=strides), None), params, ours(x))
  assert error(theirs(y), published(x)) <= 2e-5
  assert Conv3d(5).features == 5
  padded = jnp.pad(ours(x), ((0, 0), (2, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
  forms = [
    run(form, padded, kernel)
    for form in (lambda x, k: native(x, k, strides), lambda x, k: summed(x, k, strides))
  ]
  np.testing.assert_allclose(*forms, atol=2e-5)

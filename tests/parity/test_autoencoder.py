"""The autoencoder against diffusers, with random weights in every tensor."""

from functools import cache

import pytest
import torch
from diffusers import AutoencoderKL
from torch_parity import convert, error, nchw, nhwc, randomise, run

from dancegrpo_jax.conversion.tables.stable_diffusion import AUTOENCODER
from dancegrpo_jax.models import autoencoder

SD = {
  "block_out_channels": [32, 64, 64],
  "down_block_types": ["DownEncoderBlock2D"] * 3,
  "up_block_types": ["UpDecoderBlock2D"] * 3,
  "layers_per_block": 2,
  "latent_channels": 4,
  "norm_num_groups": 16,
  "sample_size": 32,
}
FLUX = SD | {
  "latent_channels": 16,
  "use_quant_conv": False,
  "use_post_quant_conv": False,
  "shift_factor": 0.1159,
}


@cache
def ours_of(flux: bool):
  """Our network with its encoder and decoder.

  They are the same objects in each test, so that they compile once.
  """
  network = autoencoder.from_json(FLUX if flux else SD)
  return network, *(
    lambda p, x, m=m: network.apply({"params": p}, x, method=m) for m in ("encode", "decode")
  )


@pytest.mark.parametrize(
  "config, scale", [(SD, 1.0), (SD, 1e-3), (FLUX, 1.0)], ids=["sd", "sd-small", "flux"]
)
def test_encode_and_decode(config, scale):
  """Compares mean, log-variance and pixels of an image that is not square."""
  generator = torch.Generator().manual_seed(0)
  theirs = randomise(AutoencoderKL(**config), seed=1, scale=scale)
  network, encode, decode = ours_of(config is FLUX)
  pixels = torch.randn(2, 3, 24, 40, generator=generator)
  latents = torch.randn(2, config["latent_channels"], 6, 10, generator=generator)
  params = convert(AUTOENCODER, theirs, network, nhwc(pixels))
  mean, log_variance = run(encode, params, nhwc(pixels))
  decoded = run(decode, params, nhwc(latents))
  with torch.no_grad():
    posterior = theirs.encode(pixels).latent_dist
    assert error(nchw(mean), posterior.mean) <= 1e-4
    assert error(nchw(log_variance), posterior.logvar) <= 1e-4
    assert error(nchw(decoded), theirs.decode(latents).sample) <= 1e-4


def test_log_variance_is_clipped_as_diffusers_does():
  theirs = randomise(AutoencoderKL(**SD), seed=1)
  with torch.no_grad():
    theirs.quant_conv.weight.mul_(100.0)
  network, encode, _ = ours_of(False)
  pixels = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))
  params = convert(AUTOENCODER, theirs, network, nhwc(pixels))
  _, log_variance = run(encode, params, nhwc(pixels))
  assert log_variance.min() == -30 and log_variance.max() == 20
  with torch.no_grad():
    assert error(nchw(log_variance), theirs.encode(pixels).latent_dist.logvar) <= 1e-4


def test_unknown_blocks_are_refused():
  with pytest.raises(ValueError, match="AttnDownEncoderBlock2D"):
    autoencoder.from_json(SD | {"down_block_types": ["AttnDownEncoderBlock2D"]})

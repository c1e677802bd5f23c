"""The UNet against diffusers, with random weights in every tensor."""

from functools import cache

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch_parity import convert, error, nchw, nhwc, randomise, run

from dancegrpo_jax.conversion.table import Table
from dancegrpo_jax.conversion.tables.stable_diffusion import RESNET, TRANSFORMER_2D, UNET
from dancegrpo_jax.models import unet
from dancegrpo_jax.models.attention import Transformer2D
from dancegrpo_jax.models.layers import ResnetBlock

SD1 = {
  "block_out_channels": [32, 64, 96, 96],
  "cross_attention_dim": 24,
  "attention_head_dim": 8,
  "layers_per_block": 2,
  "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
  "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
  "sample_size": 16,
  "flip_sin_to_cos": True,
  "freq_shift": 0,
  "norm_eps": 1e-5,
}
SD2 = SD1 | {
  "attention_head_dim": [2, 4, 6, 6],
  "use_linear_projection": True,
  "upcast_attention": True,
}


def draw(*shape: int) -> torch.Tensor:
  return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@cache
def ours_of(second: bool):
  """Our network and its function.

  They are the same objects in each test, so that they compile once.
  """
  network = unet.from_json(SD2 if second else SD1)
  return network, lambda params, *arguments: network.apply({"params": params}, *arguments)


@pytest.mark.parametrize("config", [SD1, SD2], ids=["sd1", "sd2"])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_unet(config, scale):
  """Full depth and reduced width; latents are not square, and times are not integers."""
  theirs = randomise(UNet2DConditionModel(**config), seed=1, scale=scale)
  network, apply = ours_of(config is SD2)
  latents, context, time = draw(2, 4, 16, 24), draw(2, 7, 24), torch.tensor([981.0, 0.5])
  arguments = (nhwc(latents), time.numpy(), context.numpy())
  params = convert(UNET, theirs, network, *arguments)
  ours = run(apply, params, *arguments)
  with torch.no_grad():
    assert error(nchw(ours), theirs(latents, time, context).sample) <= 1e-4


@pytest.mark.parametrize(
  "change", [{"flip_sin_to_cos": False, "freq_shift": 1}, {"norm_eps": 1e-6, "layers_per_block": 1}]
)
def test_config_values_are_used(change):
  config = SD1 | {"block_out_channels": [32, 64], "norm_num_groups": 16} | change
  config |= {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
  }
  theirs = randomise(
    UNet2DConditionModel(**config), seed=2, scale=1e-3 if "norm_eps" in change else 1.0
  )
  network = unet.from_json(config)
  latents, context, time = draw(1, 4, 8, 8), draw(1, 3, 24), torch.tensor([37.0])
  arguments = (nhwc(latents), time.numpy(), context.numpy())
  ours = run(
    lambda p, *a: network.apply({"params": p}, *a),
    convert(UNET, theirs, network, *arguments),
    *arguments,
  )
  with torch.no_grad():
    assert error(nchw(ours), theirs(latents, time, context).sample) <= 1e-4


@pytest.mark.parametrize("flip, shift", [(True, 0), (False, 1)])
def test_time_embedding(flip, shift):
  """An angle of 999 in float32 is accurate to 6e-5, on both sides."""
  time = torch.tensor([0.0, 0.5, 1.0, 501.25, 999.0])
  ours = run(lambda t: unet.sinusoid(t, 320, flip, shift), time.numpy())
  assert (
    error(ours, get_timestep_embedding(time, 320, flip_sin_to_cos=flip, downscale_freq_shift=shift))
    <= 1e-4
  )


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_resnet_block(scale):
  theirs = randomise(
    ResnetBlock2D(in_channels=32, out_channels=64, temb_channels=40, groups=16, eps=1e-5),
    seed=3,
    scale=scale,
  )
  network = ResnetBlock(64, 16, 1e-5)
  x, time = draw(2, 32, 6, 10) * scale, draw(2, 40)
  params = convert(Table("resnet", RESNET), theirs, network, nhwc(x), time.numpy())
  ours = run(lambda p, *a: network.apply({"params": p}, *a), params, nhwc(x), time.numpy())
  with torch.no_grad():
    assert error(nchw(ours), theirs(x, time)) <= 2e-5


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_transformer(linear, scale):
  shape = {
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": 48,
    "cross_attention_dim": 24,
    "norm_num_groups": 16,
  }
  theirs = randomise(
    Transformer2DModel(**shape, num_layers=2, use_linear_projection=linear), seed=4, scale=scale
  )
  # With small inputs the residual would hide the branch, whose products would vanish.
  if scale != 1.0:
    with torch.no_grad():
      theirs.proj_out.weight.mul_(1 / scale)
  network = Transformer2D(4, 2, 16, linear)
  x, context = draw(2, 48, 4, 6) * scale, draw(2, 5, 24)
  params = convert(Table("transformer", TRANSFORMER_2D), theirs, network, nhwc(x), context.numpy())
  ours = run(lambda p, *a: network.apply({"params": p}, *a), params, nhwc(x), context.numpy())
  with torch.no_grad():
    assert error(nchw(ours), theirs(x, encoder_hidden_states=context).sample) <= 2e-5


def test_unknown_blocks_and_keys_are_refused():
  with pytest.raises(ValueError, match="AttnDownBlock2D"):
    unet.from_json(SD1 | {"down_block_types": ["AttnDownBlock2D"]})
  with pytest.raises(ValueError, match="class_embed_type = 'timestep'"):
    unet.from_json(SD1 | {"class_embed_type": "timestep"})


def test_error_is_relative_to_the_largest_value():
  assert error(np.float32([1.0, 4.2]), torch.tensor([1.0, 4.0])) == pytest.approx(0.05)

"""Stable Diffusion's networks at their published sizes against diffusers and transformers.

All tensors are random. A test takes minutes and up to 13 GiB (v2.1 at 96x96; trajectories 11, the
others 7) and is therefore not run by default. One test prints its numbers with

    pytest -m full_size -s tests/parity/test_full_size.py -k "unet and sd14"

The reference's network is saved in its library's layout and freed before the project's loader reads
ours from the files. test_unet.py, test_autoencoder.py, test_clip.py and test_trajectory.py are the
same tests at reduced width.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import trajectories
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from torch_parity import error, nchw, nhwc, randomise, run
from transformers import CLIPTextConfig, CLIPTextModel

from dancegrpo_jax.checkpoints import weights
from dancegrpo_jax.checkpoints.networks import abstract_params, class_name
from dancegrpo_jax.models import autoencoder, unet
from dancegrpo_jax.models.clip import ClipText

pytestmark = pytest.mark.full_size
FIXTURES = Path(__file__).parent.parent / "fixtures" / "tensors"
BOUND = 1e-4  # the bound for networks of full depth
# Side of the trajectories' latents: the 120 forward passes take ten minutes, and would take four
# times that at 64x64.
SIDE = 32
EOS = 49407


def published(name: str) -> dict:
  return json.loads((FIXTURES / f"{name}.json").read_text())


def drawn(cls: type, config: dict, folder: Path) -> torch.nn.Module:
  """A diffusers network with random weights, which is saved in `folder`."""
  network = randomise(empty(cls, config, torch.float32), seed=1)
  network.save_pretrained(folder, max_shard_size="20GB")
  return network


def empty(cls: type, config: dict, dtype: torch.dtype) -> torch.nn.Module:
  """A diffusers network without values, so that its weights are in memory only once."""
  with torch.device("meta"):
    network = cls.from_config(config).to(dtype)
  assert not list(network.buffers())  # buffers would stay without values
  return network.to_empty(device="cpu").eval()


@torch.no_grad()
def reread(cls: type, config: dict, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
  """What `drawn` saved, read tensor by tensor in another precision."""
  network = empty(cls, config, dtype)
  parameters = dict(network.named_parameters())
  with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
    assert set(file.keys()) == set(parameters)
    for name, parameter in parameters.items():
      parameter.copy_(file.get_tensor(name))
  return network


def ours_from(folder: Path, config: dict) -> dict:
  """Our parameters, read with the published config.json instead of the saved one."""
  return weights.load(folder, class_name(config), abstract_params(config))


def normal(*shape: int) -> torch.Tensor:
  return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def their_noise(config: dict, folder: Path, latents, time, context) -> torch.Tensor:
  return drawn(UNet2DConditionModel, config, folder)(latents, time, context).sample


@pytest.mark.parametrize("name, side, width", [("sd14-unet", 64, 768), ("sd21-unet", 96, 1024)])
def test_unet(scratch, measured, name, side, width):
  """One forward pass of one sample, at a time that is not an integer."""
  config = published(name)
  latents, time, context = normal(1, 4, side, side), torch.tensor([501.25]), normal(1, 77, width)
  theirs = their_noise(config, scratch, latents, time, context)
  network, params = unet.from_json(config), ours_from(scratch, config)
  ours = run(
    lambda p, *x: network.apply({"params": p}, *x),
    params,
    nhwc(latents),
    time.numpy(),
    context.numpy(),
  )
  measured(f"{name} at {side}x{side}", error(nchw(ours), theirs), BOUND)


@torch.no_grad()
def their_codes(config: dict, folder: Path, pixels, latents) -> tuple[torch.Tensor, ...]:
  theirs = drawn(AutoencoderKL, config, folder)
  posterior = theirs.encode(pixels).latent_dist
  return posterior.mean, posterior.logvar, theirs.decode(latents).sample


def test_autoencoder(scratch, measured):
  config = published("sd14-vae")
  pixels, latents = normal(1, 3, 512, 512).clip(-1, 1), normal(1, 4, 64, 64)
  theirs = their_codes(config, scratch, pixels, latents)
  network, params = autoencoder.from_json(config), ours_from(scratch, config)
  mean, log_variance = run(
    lambda p, x: network.apply({"params": p}, x, method="encode"), params, nhwc(pixels)
  )
  decoded = run(
    lambda p, x: network.apply({"params": p}, x, method="decode"), params, nhwc(latents)
  )
  names = ("encoder's mean at 512x512", "encoder's log-variance", "decoder at 512x512")
  for name, a, b in zip(names, (mean, log_variance, decoded), theirs, strict=True):
    measured(name, error(nchw(a), b), BOUND)


def token_ids(pad: int) -> np.ndarray:
  """A full row, a short one and an empty one, of any of the 49,406 words."""
  ids = np.random.default_rng(0).integers(0, EOS - 1, (3, 77))
  ids[:, 0] = EOS - 1
  for row, end in zip(ids, (76, 9, 1)):
    row[end], row[end + 1 :] = EOS, pad
  return ids.astype(np.int32)


@torch.no_grad()
def their_text(config: dict, folder: Path, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
  theirs = randomise(CLIPTextModel(CLIPTextConfig(**config)), seed=1)
  theirs.save_pretrained(folder)
  output = theirs(torch.tensor(ids, dtype=torch.long))
  return output.last_hidden_state, output.pooler_output


@pytest.mark.parametrize("name, pad", [("sd14-text", EOS), ("sd21-text", 0)])
def test_text_encoder(scratch, measured, name, pad):
  """CLIP-L of v1.4, padded with the end of text, and OpenCLIP-H of v2.1, padded with "!"."""
  config, ids = published(name), token_ids(pad)
  theirs = their_text(config, scratch, ids)
  network, params = ClipText.from_json(config), ours_from(scratch, config)
  hidden, pooled = run(lambda p, x: network.apply({"params": p}, x), params, ids)
  measured(f"{name}, hidden states", error(hidden, theirs[0]), BOUND)
  measured(f"{name}, pooled", error(pooled, theirs[1]), BOUND)


def test_trajectories_and_log_probs(scratch, measured):
  """30 steps of v1.4, and the log-probs that the update computes, against a float64 network."""
  jsons = {name: published(f"sd14-{file}") for name, file in trajectories.FILES.items()}
  drawn(UNet2DConditionModel, jsons["unet"], scratch / "unet")
  inputs = trajectories.draw_inputs(jsons["unet"], batch=1, side=SIDE, tokens=77)
  steps = (0, 15, 29)

  def network(dtype: torch.dtype) -> UNet2DConditionModel:
    return reread(UNet2DConditionModel, jsons["unet"], scratch / "unet", dtype)

  expected = trajectories.reference(network, jsons["scheduler"], inputs, steps)
  ours = trajectories.our_results(
    trajectories.our_pipeline(jsons, SIDE), scratch, inputs, expected.noisy, steps
  )
  trajectories.check(measured, ours, expected, jsons["scheduler"], inputs.noise, bound=1e-3)

"""FLUX's denoiser against diffusers, with random weights in every tensor.

Scanned blocks are compared with a loop over the blocks.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from tiny_checkpoint import relative_error
from torch_parity import convert, error, nhwc, randomise, run

from dancegrpo_jax.conversion.tables.flux import FLUX
from dancegrpo_jax.models import flux

SCHNELL = {
  "in_channels": 16,
  "num_layers": 2,
  "num_single_layers": 2,
  "attention_head_dim": 16,
  "num_attention_heads": 3,
  "joint_attention_dim": 24,
  "pooled_projection_dim": 20,
  "guidance_embeds": False,
  "axes_dims_rope": [4, 6, 6],
  "patch_size": 1,
}
DEV = SCHNELL | {"guidance_embeds": True}
HEIGHT, WIDTH, TOKENS = 6, 10, 7  # latents that are not square


def inputs(guidance: bool) -> tuple:
  """(latents [b, c, h, w], time 0 .. 1000, text, pooled, guidance or None).

  Times are not integers.
  """
  generator = torch.Generator().manual_seed(0)
  latents, text, pooled = (
    torch.randn(2, *shape, generator=generator)
    for shape in ((4, HEIGHT, WIDTH), (TOKENS, 24), (20,))
  )
  return (
    latents,
    torch.tensor([999.5, 31.25]),
    text,
    pooled,
    torch.tensor([3.5, 1.0]) if guidance else None,
  )


def ours_in(latents, *rest) -> tuple:
  """The same inputs for our network; the guidance is left out where it is None."""
  return (nhwc(latents), *(x.numpy() for x in rest if x is not None))


def their_output(theirs, latents, time, text, pooled, guidance) -> torch.Tensor:
  """Diffusers' output `[b, c, h, w]`, packed and unpacked by its pipeline."""
  batch, channels = latents.shape[:2]
  ids = FluxPipeline._prepare_latent_image_ids(batch, HEIGHT // 2, WIDTH // 2, "cpu", torch.float32)
  packed = FluxPipeline._pack_latents(latents, batch, channels, HEIGHT, WIDTH)
  with torch.no_grad():
    output = theirs(packed, text, pooled, time / 1000, ids, torch.zeros(TOKENS, 3), guidance).sample
  return FluxPipeline._unpack_latents(output, 8 * HEIGHT, 8 * WIDTH, 8)


@cache
def ours_of(guidance: bool, scan: bool, remat: bool = False):
  """Our network and its call.

  They are the same objects in each test, so that they compile once.
  """
  network = flux.from_json(DEV if guidance else SCHNELL, scan_blocks=scan, remat=remat)
  return network, lambda params, *arguments: network.apply({"params": params}, *arguments)


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_transformer(guidance, scale):
  theirs = randomise(FluxTransformer2DModel(**(DEV if guidance else SCHNELL)), seed=1, scale=scale)
  arguments = inputs(guidance)
  network, apply = ours_of(guidance, scan=True)
  ours = run(apply, convert(FLUX, theirs, network, *ours_in(*arguments)), *ours_in(*arguments))
  # An exact gelu would be 1.6e-4 off.
  assert error(ours, torch.from_numpy(nhwc(their_output(theirs, *arguments)))) <= 5e-5


def test_full_depth():
  """19 double and 38 single blocks, as published."""
  config = DEV | {"num_layers": 19, "num_single_layers": 38}
  theirs, arguments = randomise(FluxTransformer2DModel(**config), seed=4), inputs(True)
  network = flux.from_json(config, scan_blocks=True)
  params = convert(FLUX, theirs, network, *ours_in(*arguments))
  ours = run(lambda p, *a: network.apply({"params": p}, *a), params, *ours_in(*arguments))
  assert error(ours, torch.from_numpy(nhwc(their_output(theirs, *arguments)))) <= 1e-4


def test_scan_loop_and_remat_agree():
  """Outputs and gradients agree within round-off, and both parameter trees make one checkpoint."""
  theirs, results = randomise(FluxTransformer2DModel(**DEV), seed=2), []
  arguments = ours_in(*inputs(True))
  for scan, remat in ((False, False), (True, False), (True, True)):
    network, apply = ours_of(True, scan, remat)
    params = convert(FLUX, theirs, network, *arguments)

    def loss(p, *a, apply=apply):
      output = apply(p, *a)
      return jnp.square(output).mean(), output

    gradient, output = run(jax.grad(loss, has_aux=True), params, *arguments)
    if not scan:
      for name in ("transformer_blocks", "single_transformer_blocks"):
        blocks = [gradient.pop(key) for key in sorted(gradient) if key.startswith(name)]
        gradient[name] = jax.tree.map(lambda *x: np.stack(x), *blocks)
    results.append((output, gradient))
  for output, gradient in results[1:]:
    assert relative_error(output, results[0][0]) <= 1e-5
    assert relative_error(gradient, results[0][1]) <= 1e-5


def test_output_channels_are_the_configs():
  config = SCHNELL | {"out_channels": 8, "num_layers": 1, "num_single_layers": 1}
  theirs = randomise(FluxTransformer2DModel(**config), seed=3)
  network, arguments = flux.from_json(config), inputs(False)
  params = convert(FLUX, theirs, network, *ours_in(*arguments))
  ours = run(lambda p, *a: network.apply({"params": p}, *a), params, *ours_in(*arguments))
  assert error(ours, torch.from_numpy(nhwc(their_output(theirs, *arguments)))) <= 1e-4


def test_half_precision_stays_close():
  """In bfloat16 the results stay within a few steps of 2^-8.

  Norms, modulation and rotations are in float32.
  """
  theirs, arguments = randomise(FluxTransformer2DModel(**DEV), seed=1), inputs(True)
  network = flux.from_json(DEV, dtype=jnp.bfloat16, scan_blocks=True)
  params = convert(FLUX, theirs, network, *ours_in(*arguments))
  ours = run(lambda p, *a: network.apply({"params": p}, *a), params, *ours_in(*arguments))
  assert ours.dtype == jnp.bfloat16
  assert (
    error(ours.astype(np.float32), torch.from_numpy(nhwc(their_output(theirs, *arguments)))) <= 0.05
  )


def test_packing():
  latents = inputs(False)[0]
  packed = FluxPipeline._pack_latents(latents, 2, 4, HEIGHT, WIDTH)
  ours = run(flux.pack, nhwc(latents))
  np.testing.assert_array_equal(ours, packed.numpy())
  np.testing.assert_array_equal(run(lambda x: flux.unpack(x, HEIGHT, WIDTH), ours), nhwc(latents))


def test_rotations_of_the_published_size():
  """At 1024x1024 pixels only the last bits differ, however large the angle is."""
  ids = flux.positions(512, 64, 64)
  image = FluxPipeline._prepare_latent_image_ids(1, 64, 64, "cpu", torch.float32)
  np.testing.assert_array_equal(ids, torch.cat([torch.zeros(512, 3), image]).numpy())
  cos, sin = FluxPosEmbed(10000, (16, 56, 56))(torch.from_numpy(ids))
  for ours, theirs in zip(flux.rotation(ids, (16, 56, 56)), (cos, sin)):
    assert error(np.asarray(ours), theirs[:, ::2]) <= 1e-7


@pytest.mark.parametrize(
  "change, message",
  [
    ({"axes_dims_rope": [4, 6, 4]}, "must be even and sum to attention_head_dim 16"),
    ({"axes_dims_rope": [4, 7, 5]}, "must be even"),
    ({"axes_dims_rope": [8, 8]}, "three axes"),
    ({"in_channels": 6}, "multiple of 4"),
    ({"patch_size": 2}, "patch_size = 2"),
  ],
)
def test_bad_configs_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    flux.from_json(SCHNELL | change)


@pytest.mark.parametrize("given", [True, False])
def test_guidance_is_given_where_the_network_takes_it(given):
  arguments = ours_in(*inputs(given))
  with pytest.raises(ValueError, match="guidance_embeds"):
    jax.eval_shape(flux.from_json(SCHNELL if given else DEV).init, jax.random.key(0), *arguments)

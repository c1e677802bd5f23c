"""model.decode_batch: the samples of a chunk are decoded some at a time on each device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import TOY_SHAPE, tiny_config, toy_pipeline

from dancegrpo_jax.devices import sharding
from dancegrpo_jax.plan import hlo
from dancegrpo_jax.programs import sampling
from dancegrpo_jax.types import Media


def memory_hungry(params, latents):
  """Pixels by way of an array that is 4096 times as large as the latents."""
  wide = jnp.sin(latents[..., None] * params["waves"].reshape((1,) * latents.ndim + (-1,)))
  pixels = jnp.tanh(wide.reshape(*latents.shape[:-1], -1) @ params["mix"])
  return Media(pixels, 8.0)


PARAMS = {
  "waves": jnp.linspace(0.0, 1.0, 4096),
  "mix": jax.random.normal(jax.random.key(1), (TOY_SHAPE[-1] * 4096, 3)) / 64,
}


def decoded(batch: int, devices: int, samples: int = 16) -> tuple[np.ndarray, int, list]:
  """Pixels, bytes of temporary memory on a device, and what devices sent each other."""
  config = tiny_config(None, model__decode_batch=batch, mesh__data=devices)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
  pipeline = toy_pipeline()._replace(decode=memory_hungry)
  split = sharding.batch_sharding(mesh)
  latents = jax.random.normal(jax.random.key(0), (samples, *TOY_SHAPE))
  with jax.set_mesh(mesh):
    function = sampling.decode_program(config, pipeline, mesh)
    params = jax.device_put(PARAMS, sharding.replicated(mesh))
    lowered = jax.jit(function, out_shardings=split).lower(params, jax.device_put(latents, split))
    compiled = lowered.compile()
    media = compiled(params, jax.device_put(latents, split))
  assert media.fps == 8.0
  collectives = hlo.summary(compiled.as_text(), 1).collectives
  return np.asarray(media.pixels), compiled.memory_analysis().temp_size_in_bytes, collectives


@pytest.mark.parametrize("devices", [1, 4])
def test_the_batch_bounds_memory_and_changes_nothing_else(devices):
  whole, much, _ = decoded(0, devices)
  parts, little, collectives = decoded(1, devices)
  np.testing.assert_allclose(parts, whole, atol=1e-5)
  assert little < 2 * much / (16 // devices)  # with all samples of a device: 16 / devices as much
  assert not collectives


def test_a_batch_that_does_not_divide_the_samples():
  """12 samples of a device in batches of at most 5 are 3 batches of 4."""
  whole, much, _ = decoded(0, 1, samples=12)
  parts, little, _ = decoded(5, 1, samples=12)
  np.testing.assert_allclose(parts, whole, atol=1e-5)
  assert much / 4 < little < much / 2


def test_more_than_there_are():
  np.testing.assert_array_equal(decoded(64, 4)[0], decoded(0, 4)[0])

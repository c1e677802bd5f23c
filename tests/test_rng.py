"""Noise depends only on (seed, stream, iteration, prompt, sample, step).

It never depends on the batch or the devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dancegrpo_jax.devices import sharding
from dancegrpo_jax.rl import rng

SHAPE = (8, 8, 4)
PROMPT = np.repeat(np.arange(4), 4)  # 4 prompts x 4 samples
SAMPLE = np.tile(np.arange(4), 4)


@jax.jit(static_argnames="shared")
def draw(iteration, prompt, sample, step, shared):
  initial = rng.initial_noise(
    rng.stream(0, "initial"), iteration, prompt, sample, shared=shared, shape=SHAPE
  )
  return initial, rng.step_noise(
    rng.stream(0, "step"), iteration, prompt, sample, step, shape=SHAPE
  )


def whole(shared=False, iteration=3, step=2):
  return jax.tree.map(np.asarray, draw(iteration, PROMPT, SAMPLE, step, shared))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 4, 8])
def test_noise_is_bitwise_independent_of_the_batch_split(shared, rows):
  parts = [
    draw(3, PROMPT[i : i + rows], SAMPLE[i : i + rows], 2, shared) for i in range(0, 16, rows)
  ]
  for expected, part in zip(whole(shared), zip(*parts)):
    np.testing.assert_array_equal(np.concatenate(part), expected)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rows", [16, 8])
def test_noise_is_bitwise_independent_of_the_devices(shared, rows):
  mesh = sharding.make_mesh(ConfigDict({"data": 4, "fsdp": 2, "tensor": 1}))
  split = sharding.batch_sharding(mesh)
  with jax.set_mesh(mesh):
    parts = []
    for i in range(0, 16, rows):
      prompt, sample = (jax.device_put(x[i : i + rows], split) for x in (PROMPT, SAMPLE))
      part = draw(3, prompt, sample, 2, shared)
      assert len(part[1].sharding.device_set) == 8 and not part[1].sharding.is_fully_replicated
      parts.append(jax.tree.map(np.asarray, part))
  for expected, part in zip(whole(shared), zip(*parts)):
    np.testing.assert_array_equal(np.concatenate(part), expected)


def test_order_of_samples_does_not_matter():
  order = np.random.RandomState(0).permutation(16)
  for expected, shuffled in zip(whole(), draw(3, PROMPT[order], SAMPLE[order], 2, False)):
    np.testing.assert_array_equal(shuffled, expected[order])


def test_shared_noise_is_one_a_prompt():
  initial = whole(shared=True)[0].reshape(4, 4, *SHAPE)
  np.testing.assert_array_equal(initial, np.broadcast_to(initial[:, :1], initial.shape))
  assert len(np.unique(initial[:, 0].reshape(4, -1), axis=0)) == 4


def test_every_index_and_stream_matters():
  base = whole()
  draws = [*base, *whole(iteration=4), whole(step=3)[1], whole(shared=True)[0]]
  flat = np.concatenate([noise.reshape(16, -1) for noise in draws])
  distinct = len(np.unique(flat, axis=0))
  assert distinct == 16 * 5 + 4  # all samples of all draws differ, except those of a shared group
  assert not np.array_equal(
    jax.random.key_data(rng.stream(0, "a")), jax.random.key_data(rng.stream(1, "a"))
  )


def test_noise_is_standard_normal():
  noise = np.concatenate([noise.ravel() for noise in whole()])
  assert abs(noise.mean()) < 5 / np.sqrt(noise.size) and abs(noise.std() - 1) < 5 / np.sqrt(
    2 * noise.size
  )


def test_a_stream_is_the_same_in_every_version():
  # zlib.crc32(b"initial_noise") folded into threefry's key(42), computed once on JAX 0.10.2: a
  # change loses reproducibility
  assert jax.random.key_data(rng.stream(42, "initial_noise")).tolist() == [1191323504, 2054587545]


def test_indices_are_ordered():
  key = rng.stream(0, "x")
  assert (
    jax.random.key_data(rng.derive(key, 1, 2)) != jax.random.key_data(rng.derive(key, 2, 1))
  ).any()
  keys = rng.sample_keys(key, 1, jnp.arange(3))
  assert (jax.random.key_data(keys[2]) == jax.random.key_data(rng.derive(key, 1, 2))).all()

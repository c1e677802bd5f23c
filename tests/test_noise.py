"""Promise 2: noise depends only on (seed, iteration, prompt, sample, step).

It never depends on devices or on how a batch is divided.
"""

import functools

import jax
import numpy as np
import pytest
from tiny_checkpoint import TOY_SHAPE, Toy, toy_programs

IDS = np.array([5, 0, 7, 2], np.int32)  # ids of the iteration's 4 prompts, with 4 samples each


@functools.cache
def toy(devices: int, shared: bool) -> Toy:
  return toy_programs(jax.devices()[:devices], rollout__shared_noise=shared)


def draw(devices: int = 1, parts: int = 1, shared: bool = True, iteration: int = 3, ids=IDS):
  """(latents [states, 16, ...], samples [16, ...]) of one iteration.

  Its 16 samples are drawn in `parts` calls.
  """
  run = toy(devices, shared)
  with jax.set_mesh(run.mesh):
    rolled = [
      run.compiled.rollout(run.trainable, {}, run.conditioning, ids, numbers, np.int32(iteration))
      for numbers in np.arange(16, dtype=np.int32).reshape(parts, -1)
    ]
    latents, samples = zip(*((np.asarray(r.latents), np.asarray(r.sample)) for r in rolled))
  return np.concatenate(latents, 1), np.concatenate(samples)


@pytest.mark.parametrize("devices, parts", [(1, 4), (8, 1), (8, 2)])
def test_devices_and_parts_change_nothing(devices, parts):
  (expected, samples), (latents, drawn) = draw(), draw(devices, parts)
  assert expected.shape == (4, 16, *TOY_SHAPE)
  np.testing.assert_array_equal(latents[0], expected[0])  # bit for bit
  np.testing.assert_allclose(latents, expected, atol=1e-4 * np.abs(expected).max())
  np.testing.assert_allclose(drawn, samples, atol=1e-4 * np.abs(samples).max())


def test_a_sample_does_not_depend_on_its_neighbours():
  """A prompt keeps its noise when other prompts stand beside it; here two change places."""
  swapped = IDS[[1, 0, 2, 3]]
  before, after = (
    draw(shared=False, ids=ids)[0][0].reshape(4, 4, *TOY_SHAPE) for ids in (IDS, swapped)
  )
  np.testing.assert_array_equal(after, before[[1, 0, 2, 3]])


def test_iterations_draw_anew():
  first, again, other = (draw(iteration=iteration)[0] for iteration in (3, 3, 4))
  np.testing.assert_array_equal(again, first)
  assert (
    np.abs(other[0] - first[0]).min(axis=(1, 2, 3)).max() > 0 and not (other[0] == first[0]).any()
  )


def test_shared_noise_is_one_start_a_prompt():
  """All samples of a prompt start from the same latents and then diverge."""
  groups = draw()[0].reshape(4, 4, 4, *TOY_SHAPE)  # states, prompts, samples
  np.testing.assert_array_equal(groups[0], np.broadcast_to(groups[0][:, :1], groups[0].shape))
  assert len({start.tobytes() for start in groups[0][:, 0]}) == 4
  for state in groups[1:]:
    assert len({sample.tobytes() for sample in state.reshape(16, -1)}) == 16


def test_without_it_every_sample_starts_elsewhere():
  latents = draw(shared=False)[0]
  assert len({start.tobytes() for start in latents[0]}) == 16
  # standard normal: 16 x 32 numbers
  assert abs(latents[0].mean()) < 0.15 and abs(latents[0].std() - 1) < 0.1

"""Position of the SDE window, and classifier-free guidance in one call."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dancegrpo_jax.diffusion import guidance, windows
from dancegrpo_jax.types import Conditioning


def config(size=4, mode="fixed", start=0, stride=1, interval=25):
  return SimpleNamespace(size=size, mode=mode, start=start, stride=stride, interval=interval)


def starts(config_window, policy_steps, iterations):
  at = jax.jit(
    lambda iteration: windows.window(config_window, policy_steps, iteration, jax.random.key(0))
  )
  return [int(at(iteration)) for iteration in iterations]


def test_fixed_window():
  assert starts(config(start=3), 10, (0, 5, 100)) == [3, 3, 3]
  assert starts(config(size=0, start=3), 10, (0, 5)) == [0, 0]
  assert windows.size(config(size=0), 10) == 10


def test_sliding_window_moves_and_wraps():
  assert starts(config(mode="sliding"), 7, range(0, 200, 25)) == [0, 1, 2, 3, 0, 1, 2, 3]
  assert starts(config(mode="sliding"), 7, (0, 24, 25, 49, 50)) == [0, 0, 1, 1, 2]


def test_sliding_window_stops_at_the_end_before_it_wraps():
  assert starts(config(mode="sliding", stride=2, interval=1), 9, range(9)) == [
    0,
    2,
    4,
    5,
    0,
    2,
    4,
    5,
    0,
  ]
  assert starts(config(mode="sliding", start=3, stride=3, interval=1), 9, range(7)) == [
    3,
    5,
    0,
    3,
    5,
    0,
    3,
  ]
  assert starts(config(mode="sliding", size=0, interval=1), 9, range(3)) == [0, 0, 0]


def test_random_window_takes_every_position():
  keys = jax.random.split(jax.random.key(1), 200)
  got = jax.vmap(lambda key: windows.window(config(mode="random"), 7, 0, key))(keys)
  assert set(np.asarray(got).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
  "bad, message",
  [
    (config(size=11), "window.size is 11"),
    (config(start=7), "window.start is 7"),
    (config(mode="jumping"), "window.mode is 'jumping'"),
    (config(mode="sliding", stride=0), "window.stride"),
  ],
)
def test_mistakes_are_named(bad, message):
  with pytest.raises(ValueError, match=message):
    windows.window(bad, 10, 0, jax.random.key(0))


def denoise(x, model_time, rows):
  """Linear in each input, and different for every row."""
  return x * rows["scale"][:, None] + model_time[:, None] + rows["bias"]


BATCH = jnp.float32([[1.0, 2.0], [3.0, 4.0]])
TIME = jnp.float32([0.5, 0.25])
POSITIVE = {"scale": jnp.float32([2.0, 3.0]), "bias": jnp.float32([[1.0, 0.0], [0.0, 1.0]])}
NEGATIVE = {"scale": jnp.float32([1.0, -1.0]), "bias": jnp.zeros((2, 2))}


def test_guidance_extrapolates_from_the_negative_branch():
  # positive [[3.5, 4.5], [9.25, 13.25]], negative [[1.5, 2.5], [-2.75, -3.75]]
  got = guidance.classifier_free(denoise, 5.0)(BATCH, TIME, Conditioning(POSITIVE, NEGATIVE))
  np.testing.assert_allclose(got, [[11.5, 12.5], [57.25, 81.25]])
  assert got.dtype == jnp.float32
  nothing = guidance.classifier_free(denoise, 0.0)(BATCH, TIME, Conditioning(POSITIVE, NEGATIVE))
  np.testing.assert_allclose(nothing, [[1.5, 2.5], [-2.75, -3.75]])


@pytest.mark.parametrize("scale, calls, rows", [(1.0, 1, 2), (1, 1, 2), (4.0, 1, 4)])
def test_one_call_of_the_network(scale, calls, rows):
  seen = []

  def spy(x, model_time, conditioning):
    seen.append((x.shape[0], model_time.shape[0], conditioning["scale"].shape[0]))
    return denoise(x, model_time, conditioning)

  got = guidance.classifier_free(spy, scale)(BATCH, TIME, Conditioning(POSITIVE, NEGATIVE))
  assert seen == [(rows,) * 3] * calls
  if scale == 1:
    np.testing.assert_array_equal(got, denoise(BATCH, TIME, POSITIVE))


def test_scale_1_needs_no_negative_branch_and_others_do():
  guidance.classifier_free(denoise, 1.0)(BATCH, TIME, Conditioning(POSITIVE, None))
  with pytest.raises(ValueError, match="needs a negative branch"):
    guidance.classifier_free(denoise, 5.0)(BATCH, TIME, Conditioning(POSITIVE, None))


def test_gradients_flow_through_both_branches():
  def loss(positive, negative):
    return jnp.sum(
      guidance.classifier_free(denoise, 5.0)(BATCH, TIME, Conditioning(positive, negative))
    )

  positive, negative = jax.grad(loss, argnums=(0, 1))(POSITIVE, NEGATIVE)
  np.testing.assert_allclose(positive["bias"], np.full((2, 2), 5.0))
  np.testing.assert_allclose(negative["bias"], np.full((2, 2), -4.0))


def test_guidance_of_bfloat16_outputs_is_float32():
  got = guidance.guide(jnp.ones(3, jnp.bfloat16), jnp.zeros(3, jnp.bfloat16), 1.01)
  np.testing.assert_allclose(got, 1.01, rtol=1e-6)

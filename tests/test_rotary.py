"""Rotary position embeddings: the equation in float64, and the way in which TPUs compute it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dancegrpo_jax.models import attention, rotary

WIDTHS, THETA = (16, 56, 56), 256.0  # HunyuanVideo's
IDS = rotary.grid(2, 3, 4)


def draw(seed: int, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), (2, len(IDS), 3, sum(WIDTHS)), dtype)


def by_complex_numbers(x: np.ndarray) -> np.ndarray:
  """Every pair is a complex number, which is multiplied by e^(i angle)."""
  angles = [
    IDS[:, axis, None] / THETA ** (np.arange(0, width, 2) / width)
    for axis, width in enumerate(WIDTHS)
  ]
  turn = np.exp(1j * np.concatenate(angles, axis=-1))[None, :, None, :]
  turned = (np.float64(x[..., ::2]) + 1j * x[..., 1::2]) * turn
  return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


@pytest.fixture(params=["cpu", "gpu", "tpu"])
def platform(request, monkeypatch):
  monkeypatch.setattr(attention, "place", lambda: attention.Place(request.param))
  return request.param


def test_the_rotation_of_pairs(platform):
  x = draw(0)
  by = rotary.rotation(IDS, WIDTHS, THETA)
  np.testing.assert_allclose(rotary.rotate(x, by), by_complex_numbers(np.asarray(x)), atol=1e-6)


@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-7)])
def test_a_gradient_is_the_rotation_back(platform, dtype, bound):
  """Of sum(w * rotate(x)) it is w turned by the opposite angles, up to a last bit or two."""
  by = rotary.rotation(IDS, WIDTHS, THETA)
  weight = draw(1, dtype)

  def loss(x):
    return jnp.sum(rotary.rotate(x, by).astype(jnp.float32) * weight.astype(jnp.float32))

  gradient = np.float64(jax.grad(loss)(draw(0, dtype)))
  again = by_complex_numbers(gradient)
  expected = np.float64(weight)
  assert np.abs(again - expected).max() <= bound * np.abs(expected).max()


def test_a_tpu_gives_pairs_no_axis_of_their_own(monkeypatch):
  """It would pad it to 128. On other devices there is a fifth axis."""
  by = rotary.rotation(IDS, WIDTHS, THETA)

  def ranks(platform):
    monkeypatch.setattr(attention, "place", lambda: attention.Place(platform))
    jaxpr = jax.make_jaxpr(lambda x: rotary.rotate(x, by))(draw(0))
    return {value.aval.ndim for eqn in jaxpr.eqns for value in eqn.outvars}

  assert 5 in ranks("cpu") and 5 not in ranks("tpu")

"""The convolution's forms and backward pass against JAX's, alone and in a scan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dancegrpo_jax.models.layers import _product, _upright, convolve

# Stride, padding, kernel, input height and width.
CASES = [
  (1, ((1, 1), (1, 1)), 3, (8, 8)),
  (1, ((0, 0), (0, 0)), 3, (7, 5)),
  (1, ((2, 1), (0, 3)), 3, (6, 7)),
  (1, ((0, 0), (0, 0)), 1, (4, 4)),
  (2, ((1, 1), (1, 1)), 3, (8, 8)),
  (2, ((0, 1), (0, 1)), 3, (8, 6)),  # the autoencoder's downsampling
  (2, ((1, 1), (1, 1)), 3, (7, 9)),  # sizes that the stride doesn't divide
  (14, ((0, 0), (0, 0)), 14, (28, 42)),  # the patches of a vision tower
]


def plain(x, kernel, stride, padding):
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


@pytest.mark.parametrize("stride, padding, size, space", CASES)
def test_gradients_of_a_convolution(stride, padding, size, space):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((3, *space, 5)), jnp.float32)
  kernel = jnp.asarray(rng.standard_normal((size, size, 5, 4)), jnp.float32)
  y, pull = jax.vjp(lambda x, k: plain(x, k, stride, padding), x, kernel)
  dy = jnp.asarray(rng.standard_normal(y.shape), jnp.float32)
  ours, our_pull = jax.vjp(lambda x, k: convolve(x, k, stride, padding), x, kernel)
  np.testing.assert_array_equal(ours, y)
  for actual, expected in zip(our_pull(dy), pull(dy), strict=True):
    np.testing.assert_allclose(actual, expected, atol=2e-6 * float(np.abs(expected).max()))


@pytest.mark.parametrize("form", [_product, _upright])
@pytest.mark.parametrize("padding, size, space", [case[1:] for case in CASES if case[0] == 1])
def test_convolution_as_a_product(padding, size, space, form):
  """The forms for TPUs and their derivatives, which other tests do not reach on a CPU."""
  rng = np.random.default_rng(2)
  x = jnp.asarray(rng.standard_normal((3, *space, 5)), jnp.float32)
  kernel = jnp.asarray(rng.standard_normal((size, size, 5, 4)), jnp.float32)
  y, pull = jax.vjp(lambda x, k: plain(x, k, 1, padding), x, kernel)
  dy = jnp.asarray(rng.standard_normal(y.shape), jnp.float32)
  ours, our_pull = jax.vjp(lambda x, k: form(x, k, 1, padding), x, kernel)
  for actual, expected in zip((ours, *our_pull(dy)), (y, *pull(dy)), strict=True):
    np.testing.assert_allclose(actual, expected, atol=2e-6 * float(np.abs(expected).max()))


FORMS = [
  (128, 8, 1, ""),
  (4, 8, 1, "3x3"),
  (128, 8, 2, "3x3"),
  (640, 64, 1, "3x1"),
  (128, 256, 1, "3x3"),
]


@pytest.mark.parametrize("channels, side, stride, kernel", FORMS)
def test_the_form_for_tpus(channels, side, stride, kernel):
  """TPU programs keep a convolution only where a product is no better or needs too large copies."""

  def gradient(x, kernel):
    return jax.grad(lambda x, kernel: convolve(x, kernel, stride, ((1, 1), (1, 1))).sum(), (0, 1))(
      x, kernel
    )

  shapes = (
    jax.ShapeDtypeStruct((1, side, side, channels), "float32"),
    jax.ShapeDtypeStruct((3, 3, channels, 128), "float32"),
  )
  lowered = [
    jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
    for function in (lambda x, k: convolve(x, k, stride, ((1, 1), (1, 1))), gradient)
  ]
  assert all(("stablehlo.convolution" in text) == bool(kernel) for text in lowered)
  assert ("tensor<3x1x" in lowered[0]) == (kernel == "3x1")


def test_gradients_in_a_scan():
  """As in training: a loop over microbatches, in float32 and bfloat16."""
  rng = np.random.default_rng(1)
  x = rng.standard_normal((2, 4, 8, 8, 3)).astype(np.float32)
  kernel = rng.standard_normal((3, 3, 3, 3)).astype(np.float32) / 5

  def total(convolution, kernel, dtype):
    def body(carry, x):
      y = convolution(x.astype(dtype), kernel.astype(dtype), 1, ((1, 1), (1, 1)))
      return carry + jnp.sum(jnp.sin(y.astype(jnp.float32))), None

    return jax.lax.scan(body, 0.0, x)[0]

  for dtype, bound in (("float32", 1e-5), ("bfloat16", 2e-2)):
    expected, actual = (
      jax.grad(lambda k, f=f, d=dtype: total(f, k, d))(kernel) for f in (plain, convolve)
    )
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, atol=bound * float(np.abs(expected).max()))

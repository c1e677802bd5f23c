"""Rotary position embeddings (RoPE, arXiv 2104.09864): queries and keys are rotated by angles that
grow with the position of their token.

The rotations are computed on the host in float64, and are constants of a program.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dancegrpo_jax.models import attention

# Cosines and sines, one for each pair of a head's entries.
Rotation = tuple[Float[Array, "tokens pairs"], Float[Array, "tokens pairs"]]


def grid(frames: int, rows: int, columns: int) -> np.ndarray:
  """The position (frame, row, column) of every token, in this order: `[tokens, 3]`."""
  axes = np.meshgrid(np.arange(frames), np.arange(rows), np.arange(columns), indexing="ij")
  return np.stack(axes, axis=-1).reshape(-1, 3)


def rotation(ids: np.ndarray, widths: tuple[int, ...], theta: float = 10000.0) -> Rotation:
  """The rotations of tokens by their positions.

  Args:
    ids: positions `[tokens, axes]`.
    widths: the number of a head's entries that each axis rotates.
    theta: the base of the frequencies.
  """
  angles = [
    ids[:, axis, None] * theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    for axis, width in enumerate(widths)
  ]
  angle = np.concatenate(angles, axis=-1)
  return jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)


def rotate(x: Float[Array, "b n h d"], by: Rotation) -> Float[Array, "b n h d"]:
  """Rotates every pair (x[2k], x[2k + 1]) of a head by the k-th angle of its token, in float32.

  A TPU computes it another way than other devices. In bfloat16 the results are the same up to
  their last bit.
  """
  if attention.place().platform == "tpu":
    return _rotate_by_product(x, by)
  cos, sin = (part[None, :, None, :] for part in by)
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  a, b = pairs[..., 0], pairs[..., 1]
  return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)


def _rotate_by_product(x: Float[Array, "b n h d"], by: Rotation) -> Float[Array, "b n h d"]:
  """`rotate`, where a product with a matrix brings the entries of a pair together.

  On a TPU the entries of a pair lie side by side in a register. An axis of their own tears them
  apart and puts them together again, for which libtpu 0.0.42.1 expects four times the cycles. The
  matrix has one entry in each row, 1 or -1, so that the product is exact.
  """
  cos, sin = (jnp.repeat(part, 2, axis=-1)[None, :, None, :] for part in by)
  first = np.arange(0, x.shape[-1], 2)
  matrix = np.zeros((x.shape[-1],) * 2, np.float32)
  matrix[first + 1, first], matrix[first, first + 1] = -1, 1
  turned = jnp.einsum(
    "bnhd,de->bnhe",
    x,
    jnp.asarray(matrix, x.dtype),
    precision="highest",
    preferred_element_type=jnp.float32,
  )
  return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


def rotate_halves(x: Float[Array, "b n h d"], by: Rotation) -> Float[Array, "b n h d"]:
  """Rotates every pair (x[k], x[d / 2 + k]) of a head by the k-th angle of its token.

  This is the order of language models, where `rotate` has that of image models.
  """
  cos, sin = (part[None, :, None, :] for part in by)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)

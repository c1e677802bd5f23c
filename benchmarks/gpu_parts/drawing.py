"""Random weights that are made on the device.

Those of FLUX and T5 have 33 GB, which a host would need minutes to draw and then to send.
Distributions are those of `checkpoints.weights.draw`; the numbers differ.
"""

import zlib
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

# Elements: smaller arrays are made on the host, where no program need be compiled for them.
SMALL = 2**16


def deviation(path: str, shape: tuple[int, ...]) -> float:
  """Standard deviation of a parameter; 0 where it is constant, see `constant`."""
  leaf = path.rpartition("/")[2]
  if leaf in ("bias", "scale") or (len(shape) < 2 and leaf != "class_embedding"):
    return 0.0
  stacked = len(shape) % 2  # one axis more where blocks are stacked
  return 0.02 if "embedding" in leaf else prod(shape[stacked:-1]) ** -0.5


def constant(path: str) -> float:
  """The value of a constant parameter: 0 for a bias, 1 for the scale of a norm."""
  return 0.0 if path.endswith("bias") else 1.0


def normal(shape: tuple[int, ...], dtype, std: float, sharding, seed: int) -> jax.Array:
  """A large array, drawn on the devices where it will stay."""
  draw = _drawer(shape, jnp.dtype(dtype).name, std, sharding)
  return draw(np.uint32(seed))


def _drawer(shape, dtype, std, sharding):
  key = (shape, dtype, std, sharding)
  if key not in _drawers:

    def run(seed):
      keys = jax.random.key(seed, impl="rbg")  # compiles and runs many times faster than threefry
      return (std * jax.random.normal(keys, shape, jnp.float32)).astype(dtype)

    _drawers[key] = jax.jit(run, out_shardings=sharding)
  return _drawers[key]


_drawers: dict = {}


def draw(abstract_params, shardings=None, seed: int = 0, *, table=None):
  """Takes the place of `checkpoints.weights.draw`, with the same arguments.

  The number of axes says what is stacked, since no network of the benchmark has convolutions over
  time. The table is not needed.
  """
  del table
  flat = flatten_dict(abstract_params, sep="/")
  placed = (
    flatten_dict(shardings, sep="/")
    if isinstance(shardings, dict)
    else dict.fromkeys(flat, shardings)
  )

  def one(path: str, leaf) -> jax.Array:
    shape, std = tuple(leaf.shape), deviation(path, tuple(leaf.shape))
    number = zlib.crc32(f"{seed} {path}".encode())
    if std and prod(shape) > SMALL:
      return normal(shape, leaf.dtype, std, placed[path], number)
    small = (
      np.random.default_rng(number).standard_normal(shape) * std
      if std
      else np.full(shape, constant(path))
    )
    return jax.device_put(small.astype(leaf.dtype), placed[path])

  return unflatten_dict({path: one(path, leaf) for path, leaf in flat.items()}, sep="/")


def install() -> None:
  """Lets `random:` checkpoints of this process be drawn by `draw`."""
  from dancegrpo_jax.checkpoints import weights

  weights.draw = draw

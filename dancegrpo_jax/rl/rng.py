"""Named key streams: every random number is a function of (seed, stream name, indices).

Keys are derived where they are used and never carried, so that noise can't depend on the batch
split, the number of devices or the order of calls, and a resumed run needs no generator state. A
sample has a key of its own and draws by vmap: one key for a whole batch would give a sample other
numbers in another batch.

    noise = rng.stream(config.seed, "initial_noise")
    latents = rng.initial_noise(noise, iteration, prompt, sample, shared=True, shape=(64, 64, 4))
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

Index = int | np.integer | Int[Array, ""]  # a fixed number or a traced scalar
Indices = Int[Array, "batch"] | Int[np.ndarray, "batch"]


def stream(seed: int, name: str) -> Key[Array, ""]:
  """The root key of a stream. Same seed and name: same key, in every process and version.

  Always threefry: JAX's `rbg` generator gives other numbers under vmap and on other devices.
  """
  return jax.random.fold_in(
    jax.random.key(seed, impl="threefry2x32"), np.uint32(zlib.crc32(name.encode()))
  )


def derive(key: Key[Array, ""], *indices: Index) -> Key[Array, ""]:
  """A key named by indices under `key`; the order of the indices matters."""
  for index in indices:
    key = jax.random.fold_in(key, index)
  return key


def sample_keys(key: Key[Array, ""], *indices: Index | Indices) -> Key[Array, "batch"]:
  """One key a sample, named by its row of each index; scalars hold for all samples. One index at
  least is `[batch]`.
  """
  axes = tuple(0 if jnp.ndim(index) else None for index in indices)
  return jax.vmap(lambda *row: derive(key, *row), in_axes=axes)(*indices)


def initial_noise(
  key: Key[Array, ""],
  iteration: Index,
  prompt: Indices,
  sample: Indices,
  *,
  shared: bool = True,
  shape: tuple[int, ...],
) -> Float[Array, "batch *shape"]:
  """x_T: standard normal `[batch, *shape]`, float32, at an iteration.

  Args:
    key: a stream of its own, as `stream(seed, "initial_noise")`.
    iteration: of the run; traced or not.
    prompt: `[batch]`, the prompt's slot or id.
    sample: `[batch]`, position in the group.
    shared: one noise for all samples of a prompt (DanceGRPO, section 3): the key omits `sample`.
    shape: of one sample's latents.
  """
  indices = (iteration, prompt) if shared else (iteration, prompt, sample)
  return _normal(sample_keys(key, *indices), shape)


def step_noise(
  key: Key[Array, ""],
  iteration: Index,
  prompt: Indices,
  sample: Indices,
  step: Index,
  *,
  shape: tuple[int, ...],
) -> Float[Array, "batch *shape"]:
  """The noise of one stochastic step: standard normal `[batch, *shape]`, float32. Arguments as for
  `initial_noise`.
  """
  return _normal(sample_keys(key, iteration, prompt, sample, step), shape)


def _normal(keys: Key[Array, "batch"], shape: tuple[int, ...]) -> Float[Array, "batch *shape"]:
  return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)

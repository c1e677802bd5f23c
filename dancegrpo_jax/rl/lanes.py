"""How an iteration's samples are dealt to rollout chunks and to the devices.

Samples lie in a fixed number of lanes (config.mesh.lanes). Lane l holds the l-th part of all
samples in order, and a device owns whole lanes, so that the update's batches depend neither on the
number of devices nor on the size of the rollout's chunks.
"""

from math import gcd

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


def deal(samples: int, chunk: int, lanes: int) -> np.ndarray:
  """Sample numbers by chunk, int32 `[samples / chunk, chunk]`; every chunk takes equally from each
  lane.

  Args:
    samples: of an iteration; a multiple of `chunk`.
    chunk: samples of one call of the rollout; a multiple of `lanes`.
    lanes: number of lanes.
  """
  numbers = np.arange(samples, dtype=np.int32).reshape(lanes, -1, chunk // lanes)
  return numbers.swapaxes(0, 1).reshape(-1, chunk)


def in_lanes(chunks: list[Array], lanes: int, axis: int) -> Array:
  """Chunks of `[.., chunk, ..]` as `[.., lanes, samples / lanes, ..]`: a device keeps the rows that
  it made.

  Args:
    chunks: the parts of one array, in the order of `deal`.
    lanes: number of lanes.
    axis: of the samples.
  """
  rows = [x.reshape(*x.shape[:axis], lanes, -1, *x.shape[axis + 1 :]) for x in chunks]
  return jnp.concatenate(rows, axis + 1)


def blocks(prompts: int, lanes: int) -> int:
  """The largest number of blocks of neighbouring lanes in which every prompt's samples lie whole.

  Each lane is a block where the prompts are a multiple of the lanes. Each device owns whole blocks
  where the prompts are a multiple of the devices.

  Args:
    prompts: of an iteration; each has equally many samples.
    lanes: number of lanes.
  """
  return gcd(prompts, lanes)


def select(rows: Array, chosen: Int[Array, "blocks selected"]) -> Array:
  """Some of the samples, equally many of each block: `[.., lanes, selected of a lane, ..]`.

  Each block is indexed by itself, so that no sample leaves a device that owns the whole block.

  Args:
    rows: of `in_lanes`, `[.., lanes, samples, ..]` with the lanes along axis 1.
    chosen: positions of the selected samples in their block, in the order of the result; a multiple
      of the lanes in all.
  """
  first, lanes, _, *rest = rows.shape
  whole = rows.reshape(first, len(chosen), -1, *rest)
  taken = jax.vmap(lambda block, numbers: block[:, numbers], in_axes=(1, 0), out_axes=1)
  return taken(whole, chosen).reshape(first, lanes, -1, *rest)

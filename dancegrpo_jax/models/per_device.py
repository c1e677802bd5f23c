"""Runs an attention kernel, which is made for one device, on every device of a mesh.

XLA's partitioner can't see into a kernel. JAX has a rule for cuDNN's kernel, which follows any
partition of the arguments and fails where that doesn't divide the heads (JAX 0.11.2: CLIP's 12
heads over 8 devices). So this module states the partition itself.
"""

from collections.abc import Callable
from math import prod

import jax
from jaxtyping import Array, Float, Int

from dancegrpo_jax.types import SAMPLE_AXES


def attend(
  kernel: Callable,
  q: Float[Array, "b n h d"],
  k: Float[Array, "b m h d"],
  v: Float[Array, "b m h d"],
  key_lengths: Int[Array, "b"] | None,
) -> Float[Array, "b n h d"]:
  """`kernel(q, k, v, key_lengths)`, called on each device with its samples and heads.

  Samples are split over the fsdp and data axes, and heads over tensor. Where the axes don't divide
  samples or heads, every device computes all of these.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return kernel(q, k, v, key_lengths)
  axes = tuple(axis for axis in SAMPLE_AXES if axis in mesh.shape)
  samples = axes if q.shape[0] % prod(mesh.shape[axis] for axis in axes) == 0 else None
  heads = "tensor" if "tensor" in mesh.shape and q.shape[2] % mesh.shape["tensor"] == 0 else None
  spec = jax.P(samples, None, heads, None)
  local = jax.shard_map(
    kernel, mesh=mesh, in_specs=(spec, spec, spec, jax.P(samples)), out_specs=spec, check_vma=False
  )
  return local(q, k, v, key_lengths)

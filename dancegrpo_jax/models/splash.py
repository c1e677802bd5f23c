"""Splash attention, Pallas's TPU kernel: attention without its matrix of logits in memory.

The kernel is one device's, see per_device.py.
Lengths are padded to a multiple of 128, and padded keys are in a segment that no query looks at:
FLUX at 720x720 has 2025 + 512 = 2537 tokens, 2560 with padding.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from dancegrpo_jax.models import per_device

LANES = 128  # a TPU's registers: head dimensions and blocks are multiples of it
_BLOCKS = (
  512,
  256,
  128,
)  # tokens of queries and of keys that are in fast memory together; the largest that divides


def padded(length: int) -> int:
  """A length as the kernel takes it."""
  return -(-length // LANES) * LANES


def _kernel(
  heads: int, queries: int, keys: int, causal: bool, interpret: bool
) -> kernels.SplashAttentionKernel:
  """The kernel of one sample, forward and backward, for padded lengths."""
  q, kv = (next(block for block in _BLOCKS if length % block == 0) for length in (queries, keys))
  blocks = kernels.BlockSizes(
    block_q=q,
    block_kv=kv,
    block_kv_compute=kv,
    block_q_dkv=q,
    block_kv_dkv=kv,
    block_kv_dkv_compute=kv,
    block_q_dq=q,
    block_kv_dq=kv,
  )
  shape = (queries, keys)
  mask = masks.MultiHeadMask([masks.CausalMask(shape) if causal else masks.FullMask(shape)] * heads)
  return kernels.make_splash_mha_single_device(mask=mask, block_sizes=blocks, interpret=interpret)


def _local(
  q: Array, k: Array, v: Array, key_lengths: Array, *, causal: bool, interpret: bool
) -> Array:
  """Attention of one device's samples and heads, `[b, n, h, d]`; the queries are scaled."""
  queries = q.shape[1]
  q, k, v = (
    jnp.pad(x, ((0, 0), (0, padded(x.shape[1]) - x.shape[1]), (0, 0), (0, 0))) for x in (q, k, v)
  )
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  kernel = _kernel(
    heads=q.shape[1], queries=q.shape[2], keys=k.shape[2], causal=causal, interpret=interpret
  )

  def one(q: Array, k: Array, v: Array, length: Array) -> Array:
    valid = (jnp.arange(k.shape[1]) < length).astype(jnp.int32)
    segments = kernels.SegmentIds(jnp.ones(q.shape[1], jnp.int32), valid)
    return kernel(q, k, v, segment_ids=segments)  # type: ignore[return-value]  # no residuals

  return jax.vmap(one)(q, k, v, key_lengths).swapaxes(1, 2)[:, :queries]


def attention(
  q: Float[Array, "b n h d"],
  k: Float[Array, "b m h d"],
  v: Float[Array, "b m h d"],
  scale: float,
  *,
  key_lengths: Int[Array, "b"] | None = None,
  causal: bool = False,
  interpret: bool = False,
) -> Float[Array, "b n h d"]:
  """softmax(scale q k^T) v, logits and softmax in float32.

  Args:
    q, k, v: the head axis is third, d a multiple of 128.
    scale: of the products.
    key_lengths: valid keys of each sample, at least 1; they come first. None = all.
    causal: query i looks at keys 0 to i only.
    interpret: run the kernel in Pallas's interpreter, as on a CPU.
  """
  dtype, lengths = q.dtype, key_lengths
  if lengths is None:
    lengths = jnp.full((k.shape[0],), k.shape[1], jnp.int32)
  q = (q.astype(jnp.float32) * scale).astype(dtype)
  local = partial(_local, causal=causal, interpret=interpret)
  return per_device.attend(local, q, k, v, lengths).astype(dtype)

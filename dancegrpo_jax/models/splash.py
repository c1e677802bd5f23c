"""Splash attention: Pallas's TPU kernel, which keeps no matrix of logits in memory.

The kernel is made for one device; see per_device.py for meshes. The numbers of queries and keys are
padded (`padded`), and padded keys are in a segment that no query sees. FLUX at 720x720 has 2025 +
512 = 2537 tokens, and 2560 with padding. HunyuanVideo with 53 frames of 480x480 has 12600 + 256 =
12856, and 13312 with padding.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from dancegrpo_jax.models import per_device

# The lanes of a TPU's registers. The widths of heads and of blocks are multiples of it.
LANES = 128
# Numbers of queries and of keys that are in fast memory together. The first that divides is used.
_BLOCKS = (512, 256, 128)
# Sequences that are longer than this are padded to whole blocks of the largest size. That adds at
# most an eighth. Small blocks would cost more: 12856 tokens in blocks of 128 are 101 x 101
# blocks, and 13312 in blocks of 512 are 26 x 26.
_LONG = 4096


def padded(length: int) -> int:
  """The number of tokens that a sequence is padded to."""
  multiple = _BLOCKS[0] if length > _LONG else LANES
  return -(-length // multiple) * multiple


def _kernel(
  heads: int, queries: int, keys: int, causal: bool, interpret: bool
) -> kernels.SplashAttentionKernel:
  """The kernel of one sample, forward and backward, for padded numbers of queries and keys."""
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
  """The attention of one device's samples and heads, `[b, n, h, d]`, with scaled queries."""
  queries = q.shape[1]
  q, k, v = (
    jnp.pad(x, ((0, 0), (0, padded(x.shape[1]) - x.shape[1]), (0, 0), (0, 0))) for x in (q, k, v)
  )
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  kernel = _kernel(
    heads=q.shape[1], queries=q.shape[2], keys=k.shape[2], causal=causal, interpret=interpret
  )

  def attend(q: Array, k: Array, v: Array, length: Array) -> Array:
    valid = (jnp.arange(k.shape[1]) < length).astype(jnp.int32)
    segments = kernels.SegmentIds(jnp.ones(q.shape[1], jnp.int32), valid)
    return kernel(q, k, v, segment_ids=segments)  # type: ignore[return-value]  # no residuals

  return jax.vmap(attend)(q, k, v, key_lengths).swapaxes(1, 2)[:, :queries]


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
  """softmax(scale q k^T) v, with logits and softmax in float32.

  Args:
    q: queries; the head axis is the third one, and d is a multiple of 128.
    k: keys.
    v: values.
    scale: the factor of the products.
    key_lengths: the number of valid keys of each sample, at least 1; the valid keys come first.
      None means that all keys are valid.
    causal: whether query i sees the keys 0 to i only.
    interpret: whether Pallas's interpreter runs the kernel, which works on a CPU.
  """
  dtype, lengths = q.dtype, key_lengths
  if lengths is None:
    lengths = jnp.full((k.shape[0],), k.shape[1], jnp.int32)
  q = (q.astype(jnp.float32) * scale).astype(dtype)
  local = partial(_local, causal=causal, interpret=interpret)
  return per_device.attend(local, q, k, v, lengths).astype(dtype)

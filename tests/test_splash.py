"""The TPU's attention kernel against xla's, in Pallas's interpreter.

What the kernel computes on a TPU is not tested here.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dancegrpo_jax.devices import sharding
from dancegrpo_jax.models import splash
from dancegrpo_jax.models.attention import attention
from dancegrpo_jax.plan import topologies


def draw(queries: int, keys: int, batch: int = 1, heads: int = 2, dtype=jnp.float32):
  shapes = (
    (batch, queries, heads, 128),
    (batch, keys, heads, 128),
    (batch, keys, heads, 128),
    (batch, queries, heads, 128),
  )
  return [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]


def both(q, k, v, weight, kernel="splash", **options):
  """Output and gradients, by the kernel and by xla."""

  def run(impl):
    def loss(q, k, v):
      y = attention(q, k, v, impl=impl, **options)
      return jnp.sum(y.astype(jnp.float32) * weight), y

    gradients, y = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float32) for x in (y, *gradients)]

  return run(kernel), run("xla")


@pytest.mark.parametrize("queries, keys", [(150, 150), (130, 40)])
def test_equals_xla_with_its_gradients(queries, keys):
  """Round-off in float32 of sums of up to 256 terms.

  150 and 130 tokens are padded to 256, 40 keys to 128.
  """
  for mine, theirs in zip(*both(*draw(queries, keys))):
    assert np.abs(mine - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_half_precision():
  """Steps of bfloat16 are 1/256 of a value, and the kernels round weights at different points."""
  for mine, theirs in zip(*both(*draw(140, 140, dtype=jnp.bfloat16))):
    assert np.abs(mine - theirs).max() <= 2e-2 * np.abs(theirs).max()


def test_on_a_mesh_under_remat_and_scan():
  """Each device computes its samples, with the same numbers as without a mesh.

  The result's collective is the only one.
  """
  mesh = sharding.make_mesh(ConfigDict({"data": 2, "fsdp": 4, "tensor": 1}))
  q, k, v, _ = draw(130, 130, batch=8, heads=1)

  def blocks(q, k, v):
    step = jax.checkpoint(lambda x, _: (x + attention(x, k, v, impl="splash"), None))
    return jax.lax.scan(step, q, None, length=2)[0]

  def gradient(q, k, v):
    return jax.grad(lambda q: jnp.sum(blocks(q, k, v) ** 2))(q)

  alone = jax.jit(gradient)(q, k, v)
  with jax.set_mesh(mesh):
    split = sharding.batch_sharding(mesh)
    program = (
      jax.jit(gradient, out_shardings=split)
      .lower(*(jax.device_put(x, split) for x in (q, k, v)))
      .compile()
    )
    text = program.as_text()
    together = program(*(jax.device_put(x, split) for x in (q, k, v)))
  assert not any(word in text for word in ("all-gather(", "all-reduce(", "all-to-all("))
  assert (
    np.abs(np.asarray(together) - np.asarray(alone)).max() <= 1e-5 * np.abs(np.asarray(alone)).max()
  )


def test_lengths_are_padded_to_the_registers():
  assert [splash.padded(n) for n in (1, 128, 129, 2025 + 512)] == [128, 128, 256, 2560]


def test_long_sequences_are_padded_to_large_blocks():
  """HunyuanVideo's 12600 + 256 tokens would otherwise be 101 blocks of 128."""
  assert [splash.padded(n) for n in (4096, 4097, 12856)] == [4096, 4608, 13312]


def test_long_sequences_with_texts_of_their_own_lengths(monkeypatch):
  """Image tokens come first, then 60 text tokens, of which 1, 23 and all 60 are valid.

  The sequence counts as a long one here, so that 290 tokens are padded to a block of 512.
  """
  monkeypatch.setattr(splash, "_LONG", 256)
  q, k, v, weight = draw(290, 290, batch=3, heads=1)
  lengths = 230 + jnp.array([1, 23, 60])
  beyond = (jnp.arange(290)[None, :] >= lengths[:, None])[..., None, None]
  k, v = (jnp.where(beyond, 1e3, x) for x in (k, v))
  for mine, theirs in zip(*both(q, k, v, weight, key_lengths=lengths)):
    assert np.abs(mine - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("causal", [False, True])
def test_key_lengths_and_causal_masks(causal):
  """Samples have 1, 37 and all 140 valid keys.

  The keys behind them are so large that they would be noticed.
  """
  q, k, v, weight = draw(140, 140, batch=3)
  lengths = jnp.array([1, 37, 140])
  beyond = (jnp.arange(140)[None, :] >= lengths[:, None])[..., None, None]
  k, v = (jnp.where(beyond, 1e3, x) for x in (k, v))
  for mine, theirs in zip(*both(q, k, v, weight, key_lengths=lengths, causal=causal)):
    assert np.abs(mine - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed (requirements-tpu.txt)",
)
@pytest.mark.parametrize("heads, dim, kernel", [(24, 128, True), (8, 40, False)])
def test_auto_compiles_for_a_tpu(heads, dim, kernel):
  """The TPU compiler compiles forward and backward passes on this CPU.

  The attentions are those of FLUX at 720x720 and of Stable Diffusion.
  """
  mesh = sharding.make_mesh(
    ConfigDict({"data": 1, "fsdp": 4, "tensor": 1}), topologies.devices("v5e:2x2")
  )
  x = jax.ShapeDtypeStruct(
    (4, 2025 + 512, heads, dim), jnp.bfloat16, sharding=sharding.batch_sharding(mesh)
  )
  with jax.set_mesh(mesh):
    gradient = jax.grad(lambda q, k, v: attention(q, k, v).astype(jnp.float32).sum(), (0, 1, 2))
    text = jax.jit(gradient).lower(x, x, x).compile().as_text()
  assert ("tpu_custom_call" in text) == kernel

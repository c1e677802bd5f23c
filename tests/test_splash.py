"""The TPU's attention kernel against xla's, in Pallas's interpreter; what it computes on a TPU is not shown here."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dancegrpo_jax.models import attention as module
from dancegrpo_jax.models import splash
from dancegrpo_jax.models.attention import attention
from dancegrpo_jax.runtime import config as configs
from dancegrpo_jax.runtime import mesh as meshes
from dancegrpo_jax.runtime import topologies


def draw(queries: int, keys: int, batch: int = 1, heads: int = 2, dtype=jnp.float32):
  shapes = ((batch, queries, heads, 128), (batch, keys, heads, 128), (batch, keys, heads, 128), (batch, queries, heads, 128))
  return [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]


def both(q, k, v, weight, kernel="splash"):
  """Output and gradients by kernel and by xla."""

  def run(impl):
    def loss(q, k, v):
      y = attention(q, k, v, impl=impl)
      return jnp.sum(y.astype(jnp.float32) * weight), y

    gradients, y = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float32) for x in (y, *gradients)]

  return run(kernel), run("xla")


@pytest.mark.parametrize("queries, keys", [(150, 150), (130, 40)])
def test_equals_xla_with_its_gradients(queries, keys):
  """float32: round-off of sums of up to 256 terms. 150 and 130 tokens are padded to 256, 40 keys to 128."""
  for mine, theirs in zip(*both(*draw(queries, keys))):
    assert np.abs(mine - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_half_precision():
  """bfloat16 has steps of 1/256 relative to a value; the two round their weights at different points."""
  for mine, theirs in zip(*both(*draw(140, 140, dtype=jnp.bfloat16))):
    assert np.abs(mine - theirs).max() <= 2e-2 * np.abs(theirs).max()


def test_on_a_mesh_under_remat_and_scan():
  """Each device computes its own samples: the same numbers as without a mesh, and no collective but the result's."""
  mesh = meshes.make_mesh(configs.ConfigDict({"data": 2, "fsdp": 4, "tensor": 1}))
  q, k, v, _ = draw(130, 130, batch=8, heads=1)

  def blocks(q, k, v):
    step = jax.checkpoint(lambda x, _: (x + attention(x, k, v, impl="splash"), None))
    return jax.lax.scan(step, q, None, length=2)[0]

  def gradient(q, k, v):
    return jax.grad(lambda q: jnp.sum(blocks(q, k, v) ** 2))(q)

  alone = jax.jit(gradient)(q, k, v)
  with jax.set_mesh(mesh):
    split = meshes.batch_sharding(mesh)
    program = jax.jit(gradient, out_shardings=split).lower(*(jax.device_put(x, split) for x in (q, k, v))).compile()
    text = program.as_text()
    together = program(*(jax.device_put(x, split) for x in (q, k, v)))
  assert not any(word in text for word in ("all-gather(", "all-reduce(", "all-to-all("))
  assert np.abs(np.asarray(together) - np.asarray(alone)).max() <= 1e-5 * np.abs(np.asarray(alone)).max()


def test_lengths_are_padded_to_the_registers():
  assert [splash.padded(n) for n in (1, 128, 129, 2025 + 512)] == [128, 128, 256, 2560]


def test_auto_asks_the_mesh_and_shapes_that_do_not_fit_take_xla(monkeypatch, caplog):
  """A stand-in for the kernel tells whether it was called."""
  called = []
  monkeypatch.setattr(splash, "attention", lambda q, k, v, scale, interpret: called.append(q.shape[-1]) or q)
  q, k, v, _ = draw(8, 8)
  attention(q, k, v)  # a CPU
  assert called == []
  monkeypatch.setattr(module, "platform", lambda: "tpu")
  attention(q, k, v)
  attention(q[..., :40], k[..., :40], v[..., :40])  # Stable Diffusion's heads
  attention(q, k, v, mask=jnp.ones((1, 1, 8, 8), bool))
  assert called == [128]
  module._told.cache_clear()
  caplog.clear()
  for _ in range(2):
    attention(q[..., :40], k[..., :40], v[..., :40], impl="splash")
    attention(q, k, v, impl="cudnn")  # float32
  lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
  assert len(lines) == 2 and "splash for float32, heads of 40" in lines[0] and "cudnn for float32, heads of 128" in lines[1]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (requirements-tpu.txt)")
@pytest.mark.parametrize("heads, dim, kernel", [(24, 128, True), (8, 40, False)])
def test_auto_compiles_for_a_tpu(heads, dim, kernel):
  """Forward and backward of FLUX's attention at 720x720, and of Stable Diffusion's, with the TPU compiler: from this CPU."""
  mesh = meshes.make_mesh(configs.ConfigDict({"data": 1, "fsdp": 4, "tensor": 1}), topologies.devices("v5e:2x2"))
  x = jax.ShapeDtypeStruct((4, 2025 + 512, heads, dim), jnp.bfloat16, sharding=meshes.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    gradient = jax.grad(lambda q, k, v: attention(q, k, v).astype(jnp.float32).sum(), (0, 1, 2))
    text = jax.jit(gradient).lower(x, x, x).compile().as_text()
  assert ("tpu_custom_call" in text) == kernel


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cudnn needs an NVIDIA GPU (and JAX_PLATFORMS=cuda)")
@pytest.mark.parametrize("dim", [40, 64, 128])
def test_cudnn_equals_xla_with_its_gradients(dim):
  for mine, theirs in zip(*both(*(x[..., :dim] for x in draw(150, 130, dtype=jnp.bfloat16)), kernel="cudnn")):
    assert np.abs(mine - theirs).max() <= 2e-2 * np.abs(theirs).max()

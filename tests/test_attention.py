"""The choice of the attention kernel, and calls of cuDNN with a stand-in on a CPU."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dancegrpo_jax.devices import gpu_topologies, sharding
from dancegrpo_jax.models import attention as module
from dancegrpo_jax.models import splash
from dancegrpo_jax.models.attention import Place, Shape, attention, capability_of, kernel

AMPERE, HOPPER, BLACKWELL = (Place("gpu", capability) for capability in ((8, 0), (9, 0), (10, 0)))
TURING, AMD, CPU, TPU = Place("gpu", (7, 5)), Place("gpu"), Place("cpu"), Place("tpu")


@pytest.mark.parametrize(
  "impl, place, dtype, head_dim, expected",
  [
    ("auto", HOPPER, "bfloat16", 40, "cudnn"),  # Stable Diffusion v1.4, 64x64
    ("auto", HOPPER, "bfloat16", 160, "cudnn"),  # Stable Diffusion v1.4, 16x16
    ("auto", HOPPER, "float16", 256, "cudnn"),
    ("auto", HOPPER, "bfloat16", 264, "xla"),
    ("auto", HOPPER, "bfloat16", 36, "xla"),
    ("auto", HOPPER, "float32", 64, "xla"),
    ("auto", AMPERE, "bfloat16", 128, "cudnn"),
    ("auto", AMPERE, "bfloat16", 160, "xla"),  # cuDNN has no backward pass there
    ("auto", BLACKWELL, "bfloat16", 128, "cudnn"),
    ("auto", BLACKWELL, "bfloat16", 160, "xla"),  # not every version of cuDNN can
    ("auto", TURING, "float16", 64, "xla"),
    ("auto", AMD, "bfloat16", 64, "xla"),
    ("auto", CPU, "bfloat16", 128, "xla"),
    ("auto", TPU, "bfloat16", 128, "splash"),
    ("auto", TPU, "float32", 256, "splash"),
    ("auto", TPU, "bfloat16", 64, "xla"),
    ("xla", HOPPER, "bfloat16", 64, "xla"),
    ("xla", TPU, "bfloat16", 128, "xla"),
    ("cudnn", HOPPER, "bfloat16", 64, "cudnn"),
    ("cudnn", CPU, "bfloat16", 64, "xla"),
    ("splash", CPU, "float32", 128, "splash"),  # runs in Pallas's interpreter
    ("splash", HOPPER, "float32", 64, "xla"),
  ],
)
def test_the_table_of_kernels(impl, place, dtype, head_dim, expected):
  for queries, keys in ((4096, 77), (2537, 2537), (2, 1)):  # the lengths do not matter
    shape = Shape(queries=queries, keys=keys, heads=8, head_dim=head_dim, dtype=dtype)
    assert kernel(impl=impl, place=place, shape=shape, plain=True) == expected
    assert kernel(impl=impl, place=place, shape=shape, plain=False) == "xla"


def test_compute_capabilities_are_read_from_devices():
  class Device:
    def __init__(self, capability):
      if capability:
        self.compute_capability = capability

  assert [capability_of(Device(text)) for text in ("9.0", "12.1", "gfx90a", "")] == [
    (9, 0),
    (12, 1),
    (0, 0),
    (0, 0),
  ]
  assert module.place() == Place("cpu")
  for card in gpu_topologies.CARDS.values():  # the cards that plan.py compiles for
    assert capability_of(SimpleNamespace(device_kind=card.kind)) == card.capability


def draw(queries: int, keys: int, dim: int = 16, batch: int = 3, dtype=jnp.float32):
  shapes = ((batch, queries, 2, dim), (batch, keys, 2, dim), (batch, keys, 2, dim))
  return [
    jax.random.normal(jax.random.key(i), shape, jnp.float32).astype(dtype)
    for i, shape in enumerate(shapes)
  ]


def stand_in(q, k, v, *, scale, is_causal, query_seq_lengths=None, key_value_seq_lengths=None):
  """Computes what cuDNN does, as JAX documents it.

  It refuses odd lengths, and rows of queries beyond the length are undefined.
  """
  n, m = q.shape[1], k.shape[1]
  assert n % 2 == 0 and m % 2 == 0, (n, m)
  assert (query_seq_lengths is None) == (key_value_seq_lengths is None)
  logits = scale * jnp.einsum("bnhd,bmhd->bhnm", q, k, precision="highest")
  valid = jnp.ones((q.shape[0], 1, n, m), bool)
  if key_value_seq_lengths is not None:
    assert key_value_seq_lengths.dtype == jnp.int32
    valid &= jnp.arange(m)[None, None, None, :] < key_value_seq_lengths[:, None, None, None]
  if is_causal:
    valid &= (jnp.arange(m)[None, :] <= jnp.arange(n)[:, None])[None, None]
  weights = jax.nn.softmax(jnp.where(valid, logits, -jnp.inf), axis=-1)
  y = jnp.einsum("bhnm,bmhd->bnhd", weights, v, precision="highest")
  if query_seq_lengths is None:
    return y
  inside = jnp.arange(n)[None, :, None, None] < query_seq_lengths[:, None, None, None]
  return jnp.where(inside, y, 1e6)


def value_and_gradients(q, k, v, impl: str, **options):
  """The result and the gradients of a weighted sum of it, as float32 on the host."""

  def loss(q, k, v):
    y = attention(q, k, v, impl=impl, **options)
    weight = jax.random.normal(jax.random.key(9), y.shape)
    return jnp.sum(y.astype(jnp.float32) * weight), y

  gradients, y = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
  return [np.asarray(x, np.float32) for x in (y, *gradients)]


LENGTHS = [(16, 16), (17, 17), (16, 7), (9, 12), (1, 1)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries, keys", LENGTHS)
@pytest.mark.parametrize("lengths", [None, (1, 4, 7)])
def test_padding_for_cudnn_changes_nothing(monkeypatch, queries, keys, lengths, causal):
  """Values and gradients agree with xla's for odd and even lengths.

  A stand-in takes the kernel's place below `attention`.
  """
  monkeypatch.setattr(module, "_fused", stand_in)
  monkeypatch.setattr(module, "kernel", lambda impl, **_: impl)
  q, k, v = draw(queries, keys)
  key_lengths = None if lengths is None else jnp.minimum(jnp.array(lengths), keys)
  if key_lengths is not None:  # invalid keys are so large that they would be noticed
    beyond = (jnp.arange(keys)[None, :] >= key_lengths[:, None])[..., None, None]
    k, v = (jnp.where(beyond, 1e3, x) for x in (k, v))
  options = {"key_lengths": key_lengths, "causal": causal}
  for mine, theirs in zip(
    value_and_gradients(q, k, v, "cudnn", **options), value_and_gradients(q, k, v, "xla", **options)
  ):
    assert mine.shape == theirs.shape
    assert np.abs(mine - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("queries, keys", [(16, 16), (6, 12)])
def test_even_lengths_without_key_lengths_are_passed_as_they_are(monkeypatch, queries, keys):
  """No padding mask is made where none is needed, because the kernel is faster without it."""
  seen = []

  def record(q, k, v, **options):
    seen.append((q.shape[1], k.shape[1], sorted(options)))
    return stand_in(q, k, v, **options)

  monkeypatch.setattr(module, "_fused", record)
  monkeypatch.setattr(module, "kernel", lambda impl, **_: impl)
  attention(*draw(queries, keys), impl="cudnn")
  assert seen == [(queries, keys, ["is_causal", "scale"])]


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
@pytest.mark.parametrize("batch", [8, 3])
def test_a_kernel_is_called_on_each_device(monkeypatch, sizes, batch):
  """Each device computes its samples, and its heads where tensor splits them.

  3 samples do not divide, so that all devices compute them.
  """
  seen = []

  def record(q, k, v, **options):
    seen.append(q.shape)
    return stand_in(q, k, v, **options)

  monkeypatch.setattr(module, "_fused", record)
  monkeypatch.setattr(module, "kernel", lambda impl, **_: impl)
  inputs = draw(9, 7, batch=batch)
  lengths = jnp.arange(batch) % 7 + 1
  alone = value_and_gradients(*inputs, "cudnn", key_lengths=lengths)
  with jax.set_mesh(sharding.make_mesh(ConfigDict(dict(zip(sharding.AXES, sizes))))):
    seen.clear()
    together = value_and_gradients(*inputs, "cudnn", key_lengths=lengths)
  rows = batch // (sizes[0] * sizes[1]) if batch == 8 else 3
  assert set(seen) == {(rows, 10, 2 // sizes[2], 16)}
  for mine, theirs in zip(together, alone, strict=True):
    np.testing.assert_allclose(mine, theirs, atol=2e-6 * np.abs(theirs).max())


def test_key_lengths_and_causal_of_xla():
  """Compares with a softmax over the valid keys alone, sample by sample and query by query."""
  q, k, v = (np.asarray(x, np.float64) for x in draw(5, 6))
  lengths = [1, 4, 6]
  result = attention(
    *(jnp.asarray(x, jnp.float32) for x in (q, k, v)),
    key_lengths=jnp.array(lengths),
    causal=True,
    impl="xla",
  )
  for b, length in enumerate(lengths):
    for i in range(5):
      seen = min(length, i + 1)
      for h in range(2):
        logits = q[b, i, h] @ k[b, :seen, h].T / 4
        weights = np.exp(logits - logits.max())
        expected = weights / weights.sum() @ v[b, :seen, h]
        np.testing.assert_allclose(result[b, i, h], expected, atol=2e-6)


def test_auto_asks_where_it_runs_and_a_kernel_that_can_not_is_named_once(monkeypatch, caplog):
  """Stand-ins for the kernels record which of them was called."""
  called = []
  monkeypatch.setattr(splash, "attention", lambda q, *_, **__: called.append("splash") or q)
  monkeypatch.setattr(module, "_fused", lambda q, *_, **__: called.append("cudnn") or q)
  q, k, v = draw(8, 8, dim=128)
  half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
  attention(q, k, v)  # on a CPU
  assert called == []
  monkeypatch.setattr(module, "place", lambda: TPU)
  attention(q, k, v)
  attention(q[..., :40], k[..., :40], v[..., :40])  # Stable Diffusion's heads
  attention(q, k, v, mask=jnp.ones((1, 1, 8, 8), bool))
  assert called == ["splash"]
  monkeypatch.setattr(module, "place", lambda: HOPPER)
  attention(*half)
  attention(q, k, v)  # float32
  assert called == ["splash", "cudnn"]
  module._warn_once.cache_clear()
  caplog.clear()
  for _ in range(2):
    attention(q[..., :40], k[..., :40], v[..., :40], impl="splash")
    attention(q, k, v, impl="cudnn")
  lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
  assert (
    len(lines) == 2
    and "splash for float32, heads of 40" in lines[0]
    and "cudnn for float32, heads of 128" in lines[1]
  )


@pytest.mark.skipif(
  jax.default_backend() != "gpu", reason="cudnn needs an NVIDIA GPU (and JAX_PLATFORMS=cuda)"
)
@pytest.mark.parametrize("dim", [40, 64, 128, 160])
@pytest.mark.parametrize("queries, keys", [(150, 130), (151, 77), (64, 77)])
def test_cudnn_equals_xla_with_its_gradients(queries, keys, dim):
  """Steps of bfloat16 are 1/256 of a value, and the kernels round weights at different points."""
  inputs = draw(queries, keys, dim=dim, dtype=jnp.bfloat16)
  for mine, theirs in zip(
    value_and_gradients(*inputs, "cudnn"), value_and_gradients(*inputs, "xla")
  ):
    assert np.abs(mine - theirs).max() <= 2e-2 * np.abs(theirs).max()

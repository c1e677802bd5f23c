"""The FLOP counter against closed forms, and the reading of compiled text."""

import jax
import jax.numpy as jnp
import pytest

from dancegrpo_jax.devices import sharding
from dancegrpo_jax.models import splash
from dancegrpo_jax.models.attention import attention
from dancegrpo_jax.models.layers import Conv
from dancegrpo_jax.plan import flops, hlo
from dancegrpo_jax.settings import config_file


def count(f, *shapes, platform: str = "cpu", dtype=jnp.float32) -> flops.Flops:
  return flops.count(
    jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)), platform
  )


def test_dense_layer_and_its_gradient():
  """2 n k m forward; each of the two gradients is a product of the same size."""
  n, k, m = 3, 5, 7
  assert count(lambda x, w: x @ w, (n, k), (k, m)).total == 2 * n * k * m
  gradient = jax.grad(lambda x, w: jnp.sum(jnp.tanh(x @ w)), (0, 1))
  assert count(gradient, (n, k), (k, m)).total == 3 * 2 * n * k * m
  assert count(jax.vmap(lambda x, w: x @ w), (4, n, k), (4, k, m)).total == 4 * 2 * n * k * m


def test_loops_branches_and_recomputation():
  n, layers = 6, 11
  block = 2 * n**3

  def scanned(x, w):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

  assert count(scanned, (n, n), (layers, n, n)).total == layers * block
  twice = count(
    lambda x, w: jax.lax.scan(lambda x, _: (scanned(x, w), None), x, None, length=2)[0],
    (n, n),
    (layers, n, n),
  )
  assert twice.total == 2 * layers * block

  def layers_of(wrap):
    return jax.grad(lambda x, w: jnp.sum(wrap(lambda x: jnp.tanh(x @ w) @ w)(x)))

  assert count(layers_of(lambda f: f), (n, n), (n, n)).total == (2 + 2) * block
  # Rematerialisation computes x w once more.
  assert count(layers_of(jax.checkpoint), (n, n), (n, n)).total == (2 + 1 + 2) * block
  either = count(
    lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x), (n, n)
  )
  assert either.total == 2 * block  # the more expensive branch
  endless = count(lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x), (n, n))
  assert (endless.total, endless.unknown) == (block, {"while"})
  assert count(jax.jit(lambda x: x @ x), (n, n)).total == block


def test_convolution_and_its_gradient():
  """2 B H' W' k^2 i o FLOPs.

  A strided convolution's gradient has no more products than the convolution.
  """
  b, side, i, o, k = 2, 8, 3, 5, 3
  for stride in (1, 2):
    conv = Conv(o, size=k, stride=stride)
    shapes = ((b, side, side, i), (k, k, i, o))

    def apply(x, kernel, conv=conv):
      return conv.apply({"params": {"kernel": kernel, "bias": jnp.zeros(o)}}, x)

    forward = 2 * b * (side // stride) ** 2 * k**2 * i * o
    assert count(apply, *shapes).total == forward
    gradient = count(
      jax.grad(lambda x, w, apply=apply: jnp.sum(apply(x, w) ** 2), (0, 1)), *shapes, platform="tpu"
    ).total
    # The gradient with respect to x covers the padding too.
    assert gradient == pytest.approx(3 * forward, rel=0.6)


def test_attention():
  """2 n m d for the logits and as much for the values, per head; kernels compute padded lengths."""
  b, n, m, h, d = 2, 10, 12, 3, 8
  xla = count(
    lambda q, k, v: attention(q, k, v, impl="xla"), (b, n, h, d), (b, m, h, d), (b, m, h, d)
  )
  assert (xla.total, xla.kernels) == (4 * b * h * n * m * d, 0)
  kernel = count(lambda q, k, v: splash.attention(q, k, v, 1.0), *((b, 200, h, 128),) * 3)
  assert kernel.total == kernel.kernels == 4 * b * h * 256 * 256 * 128


def test_a_device_s_part_counts_for_all_devices():
  mesh = sharding.make_mesh(config_file.ConfigDict({"data": 8, "fsdp": 1, "tensor": 1}))

  def split(x, w):
    return jax.shard_map(
      lambda x, w: x @ w, mesh=mesh, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P("data")
    )(x, w)

  assert count(split, (16, 4), (4, 5)).total == 2 * 16 * 4 * 5


def test_collectives_of_a_loop_count_as_often_as_it_runs():
  """Weights are split over 8 devices and gathered one after the other: 8 * 8 * 4 bytes each."""
  mesh = sharding.make_mesh(config_file.ConfigDict({"data": 1, "fsdp": 8, "tensor": 1}))
  split, whole = jax.NamedSharding(mesh, jax.P(None, None, "fsdp")), sharding.replicated(mesh)

  def run(w, x):
    def step(x, w):
      product = x @ jax.lax.with_sharding_constraint(w, whole)
      return jax.lax.with_sharding_constraint(jnp.tanh(product), whole), None

    return jax.lax.scan(step, x, w)[0]

  arguments = (
    jax.ShapeDtypeStruct((5, 8, 8), jnp.float32, sharding=split),
    jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=whole),
  )
  summary = hlo.summary(jax.jit(run, out_shardings=whole).lower(*arguments).compile().as_text())
  gathers = [c for c in summary.collectives if c.opcode == "all-gather"]
  assert sum(c.moved for c in gathers) == 5 * 8 * 8 * 4 and summary.unknown == 0


def test_a_loop_whose_length_is_an_argument_counts_its_turns():
  """The caller gives the number of turns; by default it is 1, and the result says so.

  A loop inside it whose length is unknown does not get the turns of the outer loop.
  """

  def outer(x, w, stop):
    return jax.lax.fori_loop(0, stop, lambda _, x: x @ w, x)

  def thrice(x, w, stop):
    return jax.lax.scan(lambda x, _: (outer(x, w, stop), None), x, length=3)[0]

  def nested(x, w, stop):
    return jax.lax.fori_loop(0, stop, lambda _, x: outer(x, w, stop), x)

  one, arguments = 2 * 4 * 8 * 8, (jnp.ones((4, 8)), jnp.ones((8, 8)), 5)
  for run, plain, counted, unknown in (
    (outer, one, 7 * one, set()),
    (thrice, 3 * one, 3 * 7 * one, set()),
    (nested, one, 7 * one, {"while"}),
  ):
    jaxpr = jax.jit(run).trace(*arguments).jaxpr
    assert flops.count(jaxpr, "cpu") == flops.Flops(plain, 0.0, frozenset({"while"}))
    assert flops.count(jaxpr, "cpu", 7) == flops.Flops(counted, 0.0, frozenset(unknown))
  known = jax.jit(lambda x, w: outer(x, w, 5)).trace(*arguments[:2]).jaxpr
  assert flops.count(known, "cpu", 7).total == 5 * one  # its length is in the program


def test_collectives_of_a_loop_whose_length_is_an_argument():
  """The compiled text does not say how often the loop runs."""
  mesh = sharding.make_mesh(config_file.ConfigDict({"data": 1, "fsdp": 8, "tensor": 1}))
  split, whole = jax.NamedSharding(mesh, jax.P(None, None, "fsdp")), sharding.replicated(mesh)

  def run(w, x, stop):
    def step(i, x):
      kernel = jax.lax.with_sharding_constraint(w[i], whole)
      return jax.lax.with_sharding_constraint(jnp.tanh(x @ kernel), whole)

    return jax.lax.fori_loop(0, stop, step, x)

  arguments = (
    jax.ShapeDtypeStruct((9, 8, 8), jnp.float32, sharding=split),
    jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=whole),
    jax.ShapeDtypeStruct((), jnp.int32),
  )
  text = jax.jit(run, out_shardings=whole).lower(*arguments).compile().as_text()
  for turns, times, unknown in ((None, 1, 1), (5, 5, 0), (2.5, 2.5, 0)):
    summary = hlo.summary(text, turns)
    gathers = [c for c in summary.collectives if c.opcode == "all-gather"]
    assert sum(c.moved for c in gathers) == times * 8 * 8 * 4 and summary.unknown == unknown


TPU_TEXT = """
%fused (p: bf16[4,8]) -> bf16[4,8] {
  %all-gather.7 = bf16[4,16] all-gather(%p), channel_id=9, \
backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %all-reduce.9 = bf16[4,8]{1,0} all-reduce(%p), to_apply=%add
}

%started (p.1: bf16[4,8]) -> bf16[4,8] {
  %all-gather.8 = bf16[4,16] all-gather(%p.1), channel_id=9, \
backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
}

%body (param: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%param), index=1
  %all-gather.1 = bf16[4,32]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=3, \
metadata={op_name="jit(f)/dot_general"}
  %fusion.1 = bf16[4,8]{1,0} fusion(%all-gather.1), kind=kOutput, calls=%fused, \
backend_config={"estimated_cycles":"100"}
}

%all-reduce-scatter.4.clone (input.1: f32[16,8]) -> f32[2,8] {
  %input.1 = f32[16,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.5 = f32[16,8]{1,0:T(8,128)} all-reduce(%input.1), channel_id=4, to_apply=%add
  ROOT %dynamic-slice.1 = f32[2,8]{1,0} dynamic-slice(%all-reduce.5, %i, %zero), \
dynamic_slice_sizes={2,8}
}

%condition (param.1: (s32[], bf16[4,8])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(16)
  ROOT %lt = pred[] compare(%i, %constant.5), direction=LT
}

%dear (q: f32[2]) -> f32[2] {
  %a = f32[2] copy(%q), backend_config={"estimated_cycles":"30"}
}

%cheap (r: f32[2]) -> f32[2] {
  %b = f32[2] copy(%r), backend_config={"estimated_cycles":"3"}
}

ENTRY %main (p0: bf16[4,8]) -> bf16[4,8] {
  %while.1 = (s32[], bf16[4,8]{1,0}) while(%tuple), condition=%condition, body=%body
  %either = f32[2] conditional(%n, %u, %v), branch_computations={%dear, %cheap}
  %fusion.8 = bf16[4,8]{1,0} fusion(%p0), kind=kCustom, calls=%started
  %fusion.9 = f32[2,8]{1,0} fusion(%gradient), kind=kCustom, calls=%all-reduce-scatter.4.clone
  %kernel = f32[2] custom-call(%either), custom_call_target="tpu_custom_call"
  ROOT %copy = bf16[4,8] copy(%y), backend_config={"estimated_cycles":"7"}
}
"""


DYNAMIC_TEXT = TPU_TEXT.replace(
  "%constant.5 = s32[]{:T(128)} constant(16)", "%stop = s32[] get-tuple-element(%param.1), index=2"
).replace("%constant.5", "%stop")


def test_text_with_a_loop_whose_length_is_an_argument():
  assert "%stop" in DYNAMIC_TEXT
  once, seven = hlo.summary(DYNAMIC_TEXT), hlo.summary(DYNAMIC_TEXT, 7)
  assert (once.cycles, once.unknown) == (100 + 30 + 7, 1)
  assert (seven.cycles, seven.unknown) == (7 * 100 + 30 + 7, 0)
  assert [c.times for c in seven.collectives] == [7, 7, 1, 1]
  # A loop within the loop: its body of 30 cycles counts once in each turn.
  again = DYNAMIC_TEXT.replace(
    "  %fusion.1 =", "  %while.2 = s32[] while(%x), condition=%condition, body=%dear\n  %fusion.1 ="
  )
  nested = hlo.summary(again, 7)
  assert (nested.cycles, nested.unknown) == (7 * (100 + 30) + 30 + 7, 1)


def test_text_of_the_tpu_compiler():
  summary = hlo.summary(TPU_TEXT)
  assert (
    summary.cycles == 16 * 100 + 30 + 7
    and summary.unknown == 0
    and summary.kernels == {"tpu_custom_call": 1.0}
  )
  gather, reduce, scatter, in_parts = summary.collectives
  assert (gather.opcode, gather.bytes, gather.times, gather.source) == (
    "all-gather",
    4 * 32 * 2,
    16,
    "jit(f)/dot_general",
  )
  assert (reduce.opcode, reduce.moved) == ("all-reduce", 2 * 4 * 8 * 2 * 16)
  # Each device keeps 2 rows of the sum.
  assert (scatter.opcode, scatter.moved) == ("reduce-scatter", 16 * 8 * 4)
  # Of one collective that several fusions share, only the start counts.
  assert (in_parts.bytes, in_parts.times) == (4 * 16 * 2, 1)


@pytest.mark.parametrize(
  "line, moved",
  [
    (
      "(bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[32,8]{1,0:T(8,128)(2,1)}) all-gather-start(%p),"
      " dimensions={0}",
      32 * 8 * 2,
    ),
    (
      "((f32[4,8], f32[2,8]), (f32[32,8]{1,0:T(8,128)}, f32[16,8])) all-gather-start(%p, %q),"
      " dimensions={0}",
      (32 + 16) * 8 * 4,
    ),
    ("(f32[32,8], f32[16,8]) all-gather(%p, %q), dimensions={0}", (32 + 16) * 8 * 4),
    ("f32[4,8] reduce-scatter(%r), dimensions={0}", 32 * 8 * 4),
    ("(f32[4,8], f32[16]) all-reduce-start(%p, %s), to_apply=%add", 2 * (4 * 8 + 16) * 4),
    ("(f32[4,8], f32[4,8], u32[], u32[]) collective-permute-start(%p)", 4 * 8 * 4),
  ],
)
def test_bytes_of_a_collective(line, moved):
  """Bytes that a device sends on a ring, from the shapes of one or of several arrays."""
  head = "ENTRY %main (p: f32[4,8], r: f32[32,8]) -> f32[4,8] {\n"
  inputs = "  %p = f32[4,8] parameter(0)\n  %r = f32[32,8] parameter(1)\n"
  (found,) = hlo.summary(f"{head}{inputs}  %c = {line}\n}}").collectives
  assert found.moved == moved


GPU_TEXT = """
HloModule jit_f, is_scheduled=true, entry_computation_layout={(bf16[4,8]{1,0})->bf16[4,32]{1,0}}

%command_buffer (p.9: bf16[4,8]) -> bf16[4,8] {
  %p.9 = bf16[4,8]{1,0} parameter(0)
  ROOT %gemm = (bf16[4,8], s8[33554432]) custom-call(%p.9), custom_call_target="__cublas$gemm"
}

%body (param: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %x = bf16[4,8]{1,0} get-tuple-element(%param), index=1
  %all-gather-start.1 = (bf16[4,8]{1,0}, bf16[4,32]{1,0}) all-gather-start(%x), channel_id=3
  %all-gather-done.1 = bf16[4,32]{1,0} all-gather-done(%all-gather-start.1)
  %call.1 = bf16[4,8]{1,0} call(%x), to_apply=%command_buffer
}

ENTRY %main.5 (p0: bf16[4,8]) -> bf16[4,32] {
  %while.1 = (s32[], bf16[4,8]{1,0}) while(%tuple), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"16"},"known_init_step":{"init":"0","step":"1"}}
}
""".replace("\\\n", "")


def test_a_gpu_s_text_is_read_without_cycles():
  """In XLA's text for GPUs: 16 times a gather of 4 x 32 bf16 and a product, without cycles."""
  read = hlo.summary(GPU_TEXT)
  (gather,) = read.collectives
  assert (gather.opcode, gather.bytes, gather.times) == ("all-gather", 4 * 32 * 2, 16)
  assert read.cycles == 0 and read.unknown == 0 and read.kernels == {"__cublas$gemm": 16}


def test_a_gpu_takes_the_branch_for_cuda():
  """A product has 2 * 4 * 8 * 16 FLOPs on CUDA, and twice that elsewhere."""
  a, b = jnp.ones((4, 8)), jnp.ones((8, 16))
  once, twice = (lambda a, b: a @ b), (lambda a, b: a @ b + a @ (2 * b))

  def both(a, b):
    return jax.lax.platform_dependent(a, b, cuda=once, default=twice)

  traced = jax.jit(both).trace(a, b).jaxpr
  assert flops.count(traced, "gpu").total == 2 * 4 * 8 * 16
  assert flops.count(traced, "cpu").total == flops.count(traced, "tpu").total == 4 * 4 * 8 * 16

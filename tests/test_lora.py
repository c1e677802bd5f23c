"""Adapters in the layers.

At the start they change nothing; then the kernel is W + (alpha / rank) A B. Only they have
gradients.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_checkpoint import FLUX, UNET, draw, relative_error

from dancegrpo_jax.models import flux, lora, unet

TARGETS = r".*attn.*/(to_(q|k|v|out_0)|add_[qkv]_proj|to_add_out)/kernel"


def batch(network) -> tuple:
  """Three rows of the network's inputs; their number of tokens differs from every layer's width."""
  rng = np.random.default_rng(5)

  def normal(*shape) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  time = jnp.asarray([300.5, 500.0, 700.25])
  if isinstance(network, unet.UNet2DConditionModel):
    return normal(3, 8, 8, network.in_channels), time, normal(3, 5, network.cross_attention_dim)
  text, pooled = normal(3, 5, network.joint_attention_dim), normal(3, network.pooled_projection_dim)
  return normal(3, 6, 6, network.in_channels // 4), time, text, pooled, jnp.full(3, 3.5)


def build(kind: str, dtype: str = "float32", **options) -> tuple:
  """(network, its parameters, its arguments, settings of adapters with alpha / rank = 3)."""
  module, config = {"unet": (unet, UNET), "flux": (flux, FLUX)}[kind]
  network = module.from_json(
    config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), **options
  )
  arguments = batch(network)
  params = draw(jax.eval_shape(network.init, jax.random.key(0), *arguments)["params"], seed=1)
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  return network, params, arguments, lora.Lora(4, 12.0, TARGETS)


def apply(network, params, adapters, settings, arguments):
  """Applies the compiled network, as pipelines call it. None stands for no adapters."""
  trees = {"denoiser": params} | ({} if adapters is None else {"lora": adapters})
  return jax.jit(lambda trees: network.apply(lora.variables(trees, settings), *arguments))(trees)


FORMS = [("unet", {"remat": True}), ("flux", {}), ("flux", {"scan_blocks": True, "remat": True})]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind, options", FORMS)
def test_new_adapters_change_not_one_bit(kind, options, dtype):
  network, params, arguments, settings = build(kind, dtype, **options)
  adapters = lora.init(jax.random.key(3), lora.abstract(params, settings))
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(adapters))
  plain, new = (apply(network, params, x, settings, arguments) for x in (None, adapters))
  np.testing.assert_array_equal(np.asarray(new, np.float32), np.asarray(plain, np.float32))
  other = lora.scaled(jax.tree.map(lambda x: x + 0.1, adapters), 1.0)
  assert relative_error(apply(network, params, other, settings, arguments), plain) > 1e-2


@pytest.mark.parametrize("kind, options", FORMS)
def test_adapters_are_a_change_of_the_kernels(kind, options):
  """Against numpy's W + (alpha / rank) A B in float64, and `merged`."""
  network, params, arguments, settings = build(kind, **options)
  adapters = draw(lora.abstract(params, settings), seed=2)
  flat, factors = flatten_dict(params, sep="/"), flatten_dict(adapters, sep="/")
  for path in lora.chosen(params, TARGETS):
    a, b = (np.asarray(factors[f"{path}/{name}"], np.float64) for name in "ab")
    flat[f"{path}/kernel"] = jnp.asarray(
      np.asarray(flat[f"{path}/kernel"], np.float64) + 12.0 / 4 * a @ b, jnp.float32
    )
  whole = unflatten_dict(flat, sep="/")
  assert relative_error(lora.merged(params, adapters, settings.scale), whole) < 1e-6
  with jax.default_matmul_precision("highest"):
    ours = apply(network, params, adapters, settings, arguments)
    theirs = apply(network, whole, None, settings, arguments)
    base = apply(network, params, None, settings, arguments)
  assert relative_error(ours, theirs) < 2e-5 and relative_error(ours, base) > 1e-2


def test_stacked_adapters_are_those_of_single_blocks():
  """FLUX's scanned and looped forms, with the same factors in both."""
  loop, params, arguments, settings = build("flux")
  scan, stacked, *_ = build("flux", scan_blocks=True)
  adapters = draw(lora.abstract(stacked, settings), seed=2)
  assert adapters["transformer_blocks"]["attn"]["to_q"]["a"].shape == (2, 16, 4)

  def single(tree, like):
    flat, out = flatten_dict(tree, sep="/"), {}
    for path in flatten_dict(like, sep="/"):
      found = re.fullmatch(r"((?:single_)?transformer_blocks)_(\d+)/(.*)", path)
      out[path] = flat[f"{found[1]}/{found[3]}"][int(found[2])] if found else flat[path]
    return unflatten_dict(out, sep="/")

  with jax.default_matmul_precision("highest"):
    a = apply(scan, stacked, adapters, settings, arguments)
    b = apply(
      loop,
      single(stacked, params),
      single(adapters, lora.abstract(params, settings)),
      settings,
      arguments,
    )
  assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("kind, options", [FORMS[0], FORMS[2]])
def test_the_base_has_no_gradient(kind, options):
  """No product of the compiled gradient has the shape of a kernel, nor of W + A B.

  With a gradient of the base some products have it.
  """
  network, params, arguments, settings = build(kind, **options)
  adapters = draw(lora.abstract(params, settings), seed=2)
  flat = flatten_dict(params, sep="/")
  kernels = [
    leaf.shape[-2:] for path, leaf in flat.items() if path.endswith("kernel") and leaf.ndim < 4
  ]
  shapes = {f"{m},{n}" for shape in kernels for m, n in (shape, shape[::-1])}

  def products(trained: str) -> set[str]:
    trees = {"denoiser": params, "lora": adapters}

    def loss(tree, rest):
      return jnp.square(
        network.apply(lora.variables({**rest, trained: tree}, settings), *arguments)
      ).sum()

    rest = {name: tree for name, tree in trees.items() if name != trained}
    text = jax.jit(jax.grad(loss)).lower(trees[trained], rest).compile().as_text()
    return {
      shape
      for shape in re.findall(r"= f32\[(\d+,\d+)\]\S* (?:dot|custom-call)\(", text)
      if shape in shapes
    }

  assert not products("lora"), products("lora")
  assert products("denoiser")


def test_new_factors_are_pefts():
  """A is within +- 1 / sqrt(in), different for every layer and seed; B is 0."""
  _, params, _, settings = build("unet")
  first, again, other = (
    flatten_dict(lora.init(jax.random.key(k), lora.abstract(params, settings)), sep="/")
    for k in (3, 3, 4)
  )
  factors = [path for path in first if path.endswith("/a")]
  assert len({float(first[path][0, 0]) for path in factors}) == len(factors)
  for path, value in first.items():
    np.testing.assert_array_equal(value, again[path])
    if path.endswith("/b"):
      assert not value.any()
    else:
      bound = value.shape[0] ** -0.5
      assert 0.9 * bound < abs(value).max() <= bound and not np.array_equal(value, other[path])


def test_targets_choose_dense_kernels_alone():
  _, params, *_ = build("unet")
  assert set(lora.chosen(params, r".*attn1/to_q/kernel")) == {
    "mid_block/attentions_0/transformer_blocks_0/attn1/to_q"
  }
  everything = lora.chosen(params, ".*")
  assert "time_embedding/linear_1" in everything and not any("conv" in path for path in everything)
  with pytest.raises(
    ValueError,
    match="config.lora.targets = '.*to_k': matches no dense kernel; .* for example"
    " '.*attn1/to_k/kernel'",
  ):
    lora.chosen(params, ".*attn./to_k")

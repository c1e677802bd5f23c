"""The mesh from a config, and sharding rules for parameters.

Error messages must name parameter, shape and rule.
"""

import dataclasses
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from dancegrpo_jax.devices import sharding
from dancegrpo_jax.errors import ConfigError


def axes(data=-1, fsdp=1, tensor=1) -> ConfigDict:
  return ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor})


@pytest.fixture
def mesh():
  return sharding.make_mesh(axes(data=2, fsdp=4))


@pytest.fixture
def tree():
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
  return {
    "params": {
      "mid": {"dense": {"kernel": shape(16, 8), "bias": shape(8)}},
      "norm": {"scale": shape(6)},
    }
  }


@pytest.mark.parametrize(
  "sizes, devices, expected",
  [
    ((-1, 1, 1), 8, (8, 1, 1)),
    ((2, -1, 1), 8, (2, 4, 1)),
    ((2, 2, 2), 8, (2, 2, 2)),
    ((-1, 1, 1), 1, (1, 1, 1)),
  ],
)
def test_axis_sizes(sizes, devices, expected):
  assert sharding.axis_sizes(axes(*sizes), devices) == expected


@pytest.mark.parametrize(
  "sizes, text",
  [
    (
      (3, 1, 1),
      "config.mesh.data = 3: data=3 x fsdp=1 x tensor=1 does not use 8 devices; set mesh.data ="
      " 8 or -1",
    ),
    (
      (-1, 3, 1),
      "config.mesh.fsdp = 3: data=-1 x fsdp=3 x tensor=1 does not use 8 devices; make the"
      " product of fsdp and",
    ),
    (
      (2, -1, 3),
      "config.mesh.tensor = 3: data=2 x fsdp=-1 x tensor=3 does not use 8 devices; make the"
      " product of data and",
    ),
    (
      (1, 3, 1),
      "config.mesh.fsdp = 3: data=1 x fsdp=3 x tensor=1 does not use 8 devices; make the product"
      " of data and fsdp and",
    ),
    ((-1, -1, 1), "config.mesh.fsdp = -1: only one axis can take what is left; data does"),
    ((0, 1, 1), "config.mesh.data = 0: must be a number of devices, or -1"),
  ],
)
def test_a_mesh_that_does_not_fit_names_field_devices_and_remedy(sizes, text):
  with pytest.raises(ConfigError) as caught:
    sharding.axis_sizes(axes(*sizes), 8)
  assert text in str(caught.value)


def test_make_mesh(mesh):
  assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
  assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
  one = sharding.make_mesh(axes(), devices=jax.devices()[:1])
  assert one.size == 1


def test_batch_and_replicated(mesh):
  batch = jax.device_put(jnp.arange(16), sharding.batch_sharding(mesh))
  assert batch.addressable_shards[0].data.shape == (2,)
  assert jax.device_put(jnp.arange(16), sharding.replicated(mesh)).is_fully_replicated


@pytest.mark.parametrize(
  "second", [("fsdp", "tensor"), ("tensor", "fsdp"), (None, "tensor"), (("fsdp", "tensor"), None)]
)
@pytest.mark.parametrize(
  "first", [("fsdp", "tensor"), ("tensor", "fsdp"), (None, "tensor"), (("fsdp", "tensor"), None)]
)
def test_gradients_of_kernels_over_both_axes(first, second):
  """Were samples split over data first, the partitioner would get half of the gradient wrong.

  Two layers are enough to show it.
  """
  rng = np.random.default_rng(0)
  x, *kernels = (rng.standard_normal((16, 16)).astype(np.float32) / 4 for _ in range(3))

  def gradient(kernels, x):
    return jax.grad(lambda kernels: jnp.sum(jnp.square(jnp.tanh(x @ kernels[0]) @ kernels[1])))(
      kernels
    )

  mesh = sharding.make_mesh(axes(2, 2, 2))
  split = [jax.NamedSharding(mesh, P(*spec)) for spec in (first, second)]
  program = jax.jit(
    gradient, in_shardings=(split, sharding.batch_sharding(mesh)), out_shardings=split
  )
  hidden = np.tanh(x @ kernels[0])
  back = 2 * hidden @ kernels[1]
  expected = x.T @ (back @ kernels[1].T * (1 - hidden**2)), hidden.T @ back
  for actual, value in zip(program(kernels, x), expected, strict=True):
    np.testing.assert_allclose(actual, value, atol=1e-5)


def test_the_first_matching_rule_holds(mesh, tree):
  rules = (
    (".*/dense/kernel", (None, "fsdp")),
    (".*/kernel", ("data",)),
    (".*/bias", [["data", "fsdp"]]),
    (".*", ()),
  )
  with pytest.raises(
    ConfigError, match=r'\(".\*/kernel", \(\'data\',\)\) is the first match of no parameter'
  ):
    sharding.infer_shardings(tree, rules, mesh)
  shardings = sharding.infer_shardings(tree, (rules[0], *rules[2:]), mesh)["params"]
  assert shardings["mid"]["dense"]["kernel"].spec == P(None, "fsdp")
  assert shardings["mid"]["dense"]["bias"].spec == P(("data", "fsdp"))
  assert shardings["norm"]["scale"].spec == P()


def test_shardings_place_arrays(mesh, tree):
  shardings = sharding.infer_shardings(tree, ((".*/kernel", ("data", "fsdp")), (".*", ())), mesh)
  init = jax.jit(
    lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree),
    out_shardings=shardings,
  )
  kernel = init()["params"]["mid"]["dense"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (8, 2)


@pytest.mark.parametrize(
  "rule, text",
  [
    (
      (".*/scale", ("fsdp",)),
      "on parameter params/norm/scale (6,): dimension 0 of size 6 does not divide over 4 devices",
    ),
    (
      (".*/bias", (None, "fsdp")),
      "on parameter params/mid/dense/bias (8,): the rule names 2 dimensions, the parameter has 1",
    ),
    ((".*/bias", ("model",)), "unknown mesh axis 'model'; one of data, fsdp, tensor"),
    (
      ("dense/kernel", ("fsdp",)),
      "is the first match of no parameter; it must match the whole path",
    ),
  ],
)
def test_a_rule_that_cannot_hold_is_an_error(mesh, tree, rule, text):
  with pytest.raises(ConfigError) as caught:
    sharding.infer_shardings(tree, (rule, (".*", ())), mesh)
  assert text in str(caught.value) and rule[0] in str(caught.value)


def test_a_parameter_without_a_rule_is_an_error(mesh, tree):
  with pytest.raises(ConfigError) as caught:
    sharding.infer_shardings(tree, ((".*/kernel", ()),), mesh)
  assert len(str(caught.value).splitlines()) == 2  # bias and scale, in one message
  assert "none matches parameter params/norm/scale (6,)" in str(caught.value)


def test_the_catch_all_may_match_nothing(mesh):
  tree = {"kernel": jnp.zeros((8, 8))}
  assert sharding.infer_shardings(tree, (("kernel", ("fsdp",)), (".*", ())), mesh)[
    "kernel"
  ].spec == P("fsdp")


# Several TPU slices, and several processes


@dataclasses.dataclass
class FakeTpu:
  """The attributes of a TPU that JAX's mesh_utils reads.

  Each v5e host has 2 x 2 chips, and each of two slices has two hosts.
  """

  id: int
  coords: tuple
  slice_index: int
  process_index: int
  core_on_chip: int = 0
  platform: str = "tpu"
  device_kind: str = "TPU v5 lite"


def two_slices() -> list[FakeTpu]:
  chips = [(x, y, 0) for y in range(4) for x in range(2)]
  return [
    FakeTpu(8 * s + i, chip, s, 2 * s + i // 4) for s in (1, 0) for i, chip in enumerate(chips)
  ]


def test_a_mesh_axis_may_be_a_part_of_an_axis_of_the_slice():
  """Of 4 x 4 x 4 chips 2 lie along tensor, and they are neighbours."""
  chips = [(x, y, z) for z in range(4) for y in range(4) for x in range(4)]
  devices = [FakeTpu(i, chip, 0, i // 4, device_kind="TPU v5") for i, chip in enumerate(chips)]
  grid = sharding.in_slice((1, 32, 2), devices)
  assert grid.shape == (1, 32, 2)
  assert sorted(device.id for device in grid.reshape(-1)) == list(range(64))
  for first, second in grid[0]:
    assert np.abs(np.subtract(first.coords, second.coords)).sum() == 1


@pytest.mark.parametrize("sizes", [(2, 8, 1), (4, 2, 2), (16, 1, 1), (2, 2, 4)])
def test_only_the_data_axis_crosses_slices(sizes):
  grid = sharding.over_slices(sizes, two_slices())
  assert grid.shape == sizes and sorted(device.id for device in grid.reshape(-1)) == list(range(16))
  rows = [{device.slice_index for device in row.reshape(-1)} for row in grid]
  assert rows == [{0}] * (sizes[0] // 2) + [{1}] * (sizes[0] // 2)


def test_a_data_axis_that_slices_cannot_share_is_an_error():
  with pytest.raises(
    ConfigError, match="config.mesh.data = 1: 2 TPU slices .* set a multiple of 2"
  ):
    sharding.over_slices((1, 16, 1), two_slices())
  assert sharding.slices_of(two_slices()) == 2 and sharding.slices_of(two_slices()[:8]) == 1
  assert sharding.slices_of(jax.devices()) == 1  # no TPUs


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_each_row_falls_to_one_process(sizes):
  """Here to the only process: each row once, in order, however often the tensor axis copies it."""
  mesh, value = sharding.make_mesh(axes(*sizes)), np.arange(48.0).reshape(16, 3)
  numbers, parts = sharding.own_shards(jax.device_put(value, sharding.batch_sharding(mesh)))
  np.testing.assert_array_equal(numbers, np.arange(16))
  np.testing.assert_array_equal(np.concatenate(parts), value)


def test_shards_can_be_read_while_the_whole_is(mesh):
  """Another thread reads shards, as rewards on the host do.

  Lists of shards that both threads make are sometimes too short or too long.
  """
  double = jax.jit(lambda x: 2 * x, out_shardings=sharding.batch_sharding(mesh))
  value = np.arange(48.0, dtype=np.float32).reshape(16, 3)
  before = sys.getswitchinterval()
  sys.setswitchinterval(1e-6)
  try:
    with ThreadPoolExecutor(2) as pool:
      for _ in range(300):
        whole = double(value)
        shards = sharding.own_shards(whole)
        read = [
          pool.submit(
            lambda parts: np.concatenate([np.asarray(part) for part in parts]), shards.parts
          )
          for _ in range(2)
        ]
        np.testing.assert_array_equal(sharding.to_host(whole), 2 * value)
        for rows in read:
          np.testing.assert_array_equal(rows.result(), 2 * value)
  finally:
    sys.setswitchinterval(before)

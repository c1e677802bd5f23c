"""The conversion tables: forwards, backwards and by slices, with all mistakes named."""

import math

import ml_dtypes
import numpy as np
import pytest

from dancegrpo_jax.conversion.mapping import describe, match, plan
from dancegrpo_jax.conversion.table import Buffer, Part, Row, Spec, Table, expected_sources
from dancegrpo_jax.conversion.transfer import export_tree, import_slice, import_tree, read_slice
from dancegrpo_jax.errors import ConversionError

F32 = np.dtype(np.float32)

# One row of every kind.
TABLE = Table(
  name="Toy",
  rows=(
    Row("conv.weight", "conv/kernel", "o i h w -> h w i o"),
    Row("point.weight", "point/kernel", "o i 1 1 -> i o"),
    Row("gamma", "norm/scale", "c -> 1 c"),
    Row("layers.{i}.fc.weight", "layers/fc/kernel", "o i -> {i} i o"),
    Row("experts.{i}.{j}.weight", "experts/kernel", "o i -> {i} i {j} o"),
    *(
      Row("in_proj", f"{name}/kernel", "o i -> i o", source_part=Part("o", k, k + 1, 3))
      for k, name in enumerate("qkv")
    ),
    *(
      Row(f"linear.{k}", "fused/kernel", "o i -> i o", target_part=Part("o", *units))
      for k, units in enumerate([(0, 1, 4), (1, 4, 4)])
    ),
    Row(
      "shift_scale",
      "modulation/bias",
      "c -> c",
      source_part=Part("c", 0, 1, 2),
      target_part=Part("c", 1, 2, 2),
    ),
    Row(
      "shift_scale",
      "modulation/bias",
      "c -> c",
      source_part=Part("c", 1, 2, 2),
      target_part=Part("c", 0, 1, 2),
    ),
    Row("temperature", "temperature", "->"),
  ),
  aliases=(("old_gamma", "gamma"), ("module.{*}", "{*}")),
  buffers=(Buffer("position_ids", "arange"),),
)
SOURCES = {
  "conv.weight": (6, 4, 3, 2),
  "point.weight": (5, 4, 1, 1),
  "gamma": (7,),
  "layers.0.fc.weight": (3, 5),
  "layers.1.fc.weight": (3, 5),
  **{f"experts.{i}.{j}.weight": (4, 3) for i in range(2) for j in range(3)},
  "in_proj": (12, 5),
  "linear.0": (2, 5),
  "linear.1": (6, 5),
  "shift_scale": (8,),
  "temperature": (),
  "position_ids": (1, 9),
}
TARGETS = {
  "conv/kernel": (3, 2, 4, 6),
  "point/kernel": (4, 5),
  "norm/scale": (1, 7),
  "layers/fc/kernel": (2, 5, 3),
  "experts/kernel": (2, 3, 3, 4),
  "q/kernel": (5, 4),
  "k/kernel": (5, 4),
  "v/kernel": (5, 4),
  "fused/kernel": (5, 8),
  "modulation/bias": (8,),
  "temperature": (),
}


def tensors(dtype=F32) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  made = {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in SOURCES.items()}
  return made | {"position_ids": np.arange(9).reshape(1, 9)}


def spec_of(arrays: dict[str, np.ndarray]) -> dict[str, Spec]:
  return {name: Spec(a.shape, a.dtype) for name, a in arrays.items()}


def targets(dtype=F32) -> dict[str, Spec]:
  return {path: Spec(shape, np.dtype(dtype)) for path, shape in TARGETS.items()}


def reader(arrays):
  return lambda name, index: arrays[name][index]


def test_every_kind_of_row_moves_values_where_it_says():
  t = tensors()
  params = import_tree(plan(TABLE, spec_of(t), targets()), reader(t))
  assert {path: a.shape for path, a in params.items()} == TARGETS
  assert params["conv/kernel"][2, 1, 3, 5] == t["conv.weight"][5, 3, 2, 1]
  assert params["point/kernel"][1, 4] == t["point.weight"][4, 1, 0, 0]
  np.testing.assert_array_equal(params["norm/scale"][0], t["gamma"])
  np.testing.assert_array_equal(
    params["layers/fc/kernel"], np.stack([t[f"layers.{i}.fc.weight"].T for i in range(2)])
  )
  assert params["experts/kernel"][1, 2, 0, 3] == t["experts.1.0.weight"][3, 2]
  for part, name in zip(np.split(t["in_proj"], 3), "qkv"):
    np.testing.assert_array_equal(params[f"{name}/kernel"], part.T)
  np.testing.assert_array_equal(
    params["fused/kernel"], np.concatenate([t["linear.0"], t["linear.1"]]).T
  )
  np.testing.assert_array_equal(params["modulation/bias"], np.roll(t["shift_scale"], 4))
  assert params["temperature"] == t["temperature"] and params["temperature"].shape == ()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_export_gives_back_names_shapes_dtypes_and_bits(dtype):
  t = tensors(dtype)
  mapping = plan(TABLE, spec_of(t), targets(np.float32))
  params = import_tree(mapping, reader(t))
  assert {a.dtype for a in params.values()} == {F32}
  back = export_tree(mapping, params)
  assert list(back) == list(t)
  for name, tensor in t.items():
    assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
    assert back[name].tobytes() == tensor.tobytes(), name


def test_names_that_are_only_read_come_back_as_they_were():
  t = {("old_gamma" if name == "gamma" else f"module.{name}"): a for name, a in tensors().items()}
  mapping = plan(TABLE, spec_of(t), targets())
  assert list(export_tree(mapping, import_tree(mapping, reader(t)))) == list(t)


def test_slices_equal_the_whole_and_read_no_more():
  t = tensors()
  mapping, rng, read_elements = plan(TABLE, spec_of(t), targets()), np.random.default_rng(1), 0

  def read(name, index):
    nonlocal read_elements
    read_elements += t[name][index].size
    return t[name][index]

  whole = import_tree(mapping, reader(t))
  for path, shape in TARGETS.items():
    for _ in range(30):
      ends = [sorted(rng.integers(0, n + 1, 2)) for n in shape]
      index = tuple(slice(int(a), int(b)) for a, b in ends)
      read_elements = 0
      part = import_slice(mapping, path, index, read)
      np.testing.assert_array_equal(part, whole[path][index], err_msg=f"{path} {index}")
      assert read_elements == part.size and part.flags.c_contiguous


def test_a_slice_names_its_tensors():
  mapping = plan(TABLE, spec_of(tensors()), targets())
  (piece,) = read_slice(mapping, "k/kernel", (slice(1, 3), slice(None)))
  assert (piece.source, piece.read) == ("in_proj", (slice(4, 8), slice(1, 3)))
  pieces = read_slice(mapping, "fused/kernel", (slice(0, 5), slice(1, 4)))
  assert [(p.source, p.read, p.place) for p in pieces] == [
    ("linear.0", (slice(1, 2), slice(0, 5)), (slice(0, 5), slice(0, 1))),
    ("linear.1", (slice(0, 2), slice(0, 5)), (slice(0, 5), slice(1, 3))),
  ]
  with pytest.raises(ValueError, match="without a step"):
    read_slice(mapping, "norm/scale", (slice(0, 1), slice(0, 7, 2)))


def test_a_changed_file_is_noticed():
  t = tensors()
  mapping = plan(TABLE, spec_of(t), targets())
  with pytest.raises(ConversionError, match="temperature"):
    import_tree(mapping, reader(t | {"temperature": np.zeros(2, np.float32)}))


def test_names_of_a_file_written_from_nothing():
  wanted = {name: shape for name, shape in SOURCES.items() if name != "position_ids"}
  # The tensors' unit axes cannot be seen in the parameters, but in the rows.
  assert {name: spec.shape for name, spec in expected_sources(TABLE, targets()).items()} == wanted
  with pytest.raises(ConversionError, match="parameter other/kernel .*no row"):
    expected_sources(TABLE, targets() | {"other/kernel": Spec((1,), F32)})


def test_stacked_and_apart_come_from_one_table():
  rows = (
    Row("layers.{i}.w", "layers_{i}/w", "o i -> i o"),
    Row("layers.{i}.w", "layers/w", "o i -> {i} i o"),
  )
  table = Table("Either", rows)
  t = {f"layers.{i}.w": np.full((2, 3), i, np.float32) for i in range(4)}
  apart = plan(table, spec_of(t), {f"layers_{i}/w": Spec((3, 2), F32) for i in range(4)})
  stacked = plan(table, spec_of(t), {"layers/w": Spec((4, 3, 2), F32)})
  assert (
    import_tree(apart, reader(t))["layers_2/w"][0, 0]
    == import_tree(stacked, reader(t))["layers/w"][2, 0, 0]
    == 2
  )
  with pytest.raises(
    ConversionError, match="layers.0.w: the same elements belong to layers/w and layers_0/w"
  ):
    plan(table, spec_of(t), stacked.targets | apart.targets)


def test_every_problem_is_in_one_message():
  t = tensors()
  # A misspelt name is both unexpected and missing, and each hints at the other.
  t["conv.wieght"] = t.pop("conv.weight")
  t["point.weight"] = np.zeros((5, 9, 1, 1), np.float32)  # wrong shape
  t["gamma"] = np.zeros((7, 2), np.float32)  # wrong number of axes
  t["layers.2.fc.weight"] = np.zeros((3, 5), np.float32)  # one layer too many
  del t["experts.1.2.weight"]  # one tensor of a stack
  t["in_proj"] = np.zeros((13, 5), np.float32)  # its size does not divide
  t["module.temperature"] = t["temperature"]  # two names of one tensor
  wanted = targets()
  del wanted["fused/kernel"]  # tensors without a parameter
  wanted["extra/bias"] = Spec((3,), F32)
  _, problems = match(TABLE, spec_of(t), wanted)
  with pytest.raises(ConversionError) as caught:
    plan(TABLE, spec_of(t), wanted)
  title, *lines, last = str(caught.value).split("\n  ")
  assert title == f"Toy: {len(problems)} problems between the checkpoint and the network"
  assert lines == problems[:6] and last == f"and {len(problems) - 6} more"
  text = "\n".join(problems)
  for expected in (
    "unexpected tensor conv.wieght [6, 4, 3, 2]: unknown name (similar: conv.weight)",
    "parameter conv/kernel [3, 2, 4, 6] is not in the checkpoint: expected tensor conv.weight"
    " (similar: conv.wieght)",
    "tensor point.weight [5, 9, 1, 1] does not fit parameter point/kernel [4, 5]: it would be"
    " [9, 5]",
    "tensor gamma [7, 2] does not fit parameter norm/scale [1, 7]: expected axes 'c -> 1 c'",
    "tensor layers.2.fc.weight [3, 5] does not fit parameter layers/fc/kernel [2, 5, 3]: it"
    " would be [3, 5, 3]",
    "parameter experts/kernel [2, 3, 3, 4] is not in the checkpoint: expected tensor"
    " experts.1.2.weight",
    "tensor in_proj [13, 5] does not fit parameter q/kernel [5, 4]: an axis of 13 does not"
    " divide into 3 parts",
    "tensors temperature and module.temperature: two spellings of the same tensor temperature",
    "unexpected tensor linear.0 [2, 5]: the network has no parameter fused/kernel",
    "parameter extra/bias [3] is not in the checkpoint: no row of the table names it",
  ):
    assert expected in text, f"{expected}\n\nnot in\n\n{text}"


def test_a_tensor_used_in_part_is_a_problem():
  wanted = targets()
  del wanted["v/kernel"]
  with pytest.raises(ConversionError, match=r"tensor in_proj \[12, 5\]: only a part of it"):
    plan(TABLE, spec_of(tensors()), wanted)


def test_a_unit_axis_must_be_one():
  t = tensors() | {"point.weight": np.zeros((5, 4, 3, 3), np.float32)}
  with pytest.raises(ConversionError, match="point.weight .*'o i 1 1'"):
    plan(TABLE, spec_of(t), targets())


@pytest.mark.parametrize("axes", ["o i -> i", "o -> o i", "o i -> {k} i o"])
def test_rows_whose_axes_differ_are_refused(axes):
  table = Table("Bad", (Row("layers.{i}.w", "w", axes),))
  with pytest.raises(ValueError, match="on one side only"):
    plan(table, {"layers.0.w": Spec((2, 2), F32)}, {"w": Spec((1, 2, 2), F32)})


def test_description_names_what_goes_where():
  lines = {
    name: (shape, dtype, where)
    for name, shape, dtype, where in describe(plan(TABLE, spec_of(tensors()), targets()))
  }
  assert lines["conv.weight"] == ((6, 4, 3, 2), "float32", "conv/kernel")
  assert lines["layers.1.fc.weight"][2] == "layers/fc/kernel[1, :, :]"
  assert lines["in_proj"][2] == "q/kernel, k/kernel, v/kernel"
  assert lines["linear.1"][2] == "fused/kernel[:, 2:8]"
  assert lines["position_ids"] == ((1, 9), "int64", "(buffer: dropped, made again on export)")


def test_volumes_agree():
  """The toy file and network have the same number of elements.

  Otherwise these tests would prove less than they seem to.
  """
  elements = sum(math.prod(shape) for name, shape in SOURCES.items() if name != "position_ids")
  assert elements == sum(math.prod(shape) for shape in TARGETS.values())

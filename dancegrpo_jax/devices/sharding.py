"""The mesh of devices, and where parameters lie on it: rules from regular expressions to partition
specs, after big_vision's `sharding.py`.

The axis `data` copies the parameters and splits the samples, `fsdp` splits both, and `tensor`
splits parameters inside of a layer. Samples are split over fsdp and data together. Axis types are
Auto: the compiler chooses every sharding that is not given.
"""

import re
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from dancegrpo_jax.errors import ConfigError, listed
from dancegrpo_jax.types import SAMPLE_AXES, PyTree

AXES = ("data", "fsdp", "tensor")
CATCH_ALL = ".*"
# At the beginning of a spec: all dimensions before those that follow, none of them split.
REST = "..."


def axis_sizes(config_mesh: ConfigDict, num_devices: int) -> tuple[int, ...]:
  """The number of devices along data, fsdp and tensor.

  Args:
    config_mesh: config.mesh. A size of -1 stands for the devices that the other axes leave.
    num_devices: devices of the run.

  Raises:
    ConfigError: a size is neither -1 nor positive, more than one is -1, or the product is not the
      number of devices.
  """
  sizes = {axis: config_mesh[axis] for axis in AXES}
  text = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
  for axis, size in sizes.items():
    if size < 1 and size != -1:
      raise ConfigError(
        f"config.mesh.{axis} = {size}: must be a number of devices, or -1 for what is left"
      )
  free = [axis for axis, size in sizes.items() if size == -1]
  if len(free) > 1:
    raise ConfigError(
      f"config.mesh.{free[1]} = -1: only one axis can take what is left; {free[0]} does, so give"
      " a number"
    )
  known = prod(size for size in sizes.values() if size != -1)
  if free and num_devices % known == 0:
    sizes[free[0]] = num_devices // known
  elif free or known != num_devices:
    others = known if free else known // sizes["data"]
    if num_devices % others == 0:
      axis, remedy = "data", f"set mesh.data = {num_devices // others} or -1"
    else:
      given = [axis for axis in AXES if axis not in free]
      axis = max(given, key=lambda axis: (num_devices % sizes[axis] != 0, sizes[axis]))
      remedy = f"make the product of {' and '.join(given)} a divisor of {num_devices}"
    raise ConfigError(
      f"config.mesh.{axis} = {sizes[axis]}: {text} does not use {num_devices} devices; {remedy}"
    )
  return tuple(sizes.values())


def make_mesh(config_mesh: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh over all devices of all processes. `jax.set_mesh` enters it, once.

  Args:
    config_mesh: config.mesh.
    devices: the devices, if not all.

  Raises:
    ConfigError: as `axis_sizes`, or several TPU slices cannot share the data axis equally.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = axis_sizes(config_mesh, len(devices))
  grid = over_slices(sizes, devices) if slices_of(devices) > 1 else in_slice(sizes, devices)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slices_of(devices: Sequence[Any]) -> int:
  """The number of TPU slices that devices belong to; 1 for other devices."""
  if any(device.platform != "tpu" for device in devices):
    return 1
  return len({getattr(device, "slice_index", 0) for device in devices})


def in_slice(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
  """The devices of one TPU slice, or those of any other kind, as `[data, fsdp, tensor]`.

  An axis of the mesh may be a part of an axis of the slice, which jax.make_mesh refuses: of 4 x 4 x
  4 chips 2 may lie along tensor.
  """
  return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def over_slices(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
  """The devices of several TPU slices as `[data, fsdp, tensor]`.

  Only the data axis crosses slices, over the slow network of the data center. fsdp and tensor stay
  on the links inside of a slice.

  Raises:
    ConfigError: the slices cannot share the data axis equally.
  """
  slices = slices_of(devices)
  if sizes[0] % slices:
    raise ConfigError(
      f"config.mesh.data = {sizes[0]}: {slices} TPU slices can't share it equally, and fsdp and"
      f" tensor stay inside a slice; set a multiple of {slices}"
    )
  inside = (sizes[0] // slices, *sizes[1:])
  across = (slices, 1, 1)
  return mesh_utils.create_hybrid_device_mesh(
    inside, across, devices, allow_split_physical_axes=True
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis (samples) split over fsdp and data. A device has consecutive rows."""
  return NamedSharding(mesh, P(SAMPLE_AXES))


class Shards(NamedTuple):
  """The rows of an array that this process owns, on their devices.

  Attributes:
    numbers: the indices of the rows, `[n]`.
    parts: these rows in this order, as arrays of one device each; [] for no rows.
  """

  numbers: np.ndarray
  parts: list[jax.Array]


def own_shards(array: jax.Array) -> Shards:
  """The rows of an array, split along its first axis, that this process owns. Each row has exactly
  one owner. Does not wait for the values.

  Must be called before another thread gets the array or its shards: JAX (0.10.2) makes the list of
  an array's shards at first use, and a second thread may see only part of it meanwhile.
  """
  shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
  shards.sort(key=lambda shard: shard.index[0].start or 0)
  numbers = [np.arange(*shard.index[0].indices(len(array))) for shard in shards]
  return Shards(np.concatenate([np.zeros(0, np.int64), *numbers]), [shard.data for shard in shards])


def join_processes(values: dict[str, np.ndarray], owned: np.ndarray) -> dict[str, np.ndarray]:
  """Joins arrays of which each process has some entries. All processes must call it at the same
  point, with the same names.

  Args:
    values: `{name: [n]}`, host arrays.
    owned: bool `[n]`, the entries that this process owns. Each entry has exactly one owner.

  Returns:
    `{name: [n]}`, the same on every process.
  """
  if jax.process_count() == 1 or not values:
    return values
  rows, owners = multihost_utils.process_allgather((np.stack(list(values.values())), owned))
  joined = np.take_along_axis(rows, owners.argmax(0)[None, None], axis=0)[0]
  return dict(zip(values, joined))


def to_host(array: jax.Array) -> np.ndarray:
  """The whole array on the host of every process. All processes must call it at the same point."""
  # Where its program has run out of memory, this raises; on a CPU, NumPy would end the process.
  jax.block_until_ready(array)
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def infer_shardings(
  abstract_tree: PyTree, rules: Sequence[Sequence[Any]], mesh: Mesh, field: str = "rules"
) -> PyTree:
  """A NamedSharding for each leaf of a tree.

  Args:
    abstract_tree: arrays or `jax.ShapeDtypeStruct`s. A dict of all trees that the rules are for,
      because a rule that matches nothing is an error.
    rules: (regex, spec) pairs, of which the first holds whose regex matches the whole path, as
      `params/mid/attention/query/kernel`. A spec has at most one entry for each dimension: None, a
      mesh axis, or a tuple of axes. "..." at its beginning stands for all dimensions before those
      that follow. Only `.*` may match nothing.
    mesh: the devices.
    field: the field of config.mesh that has the rules, for messages.

  Raises:
    ConfigError: a leaf matches no rule, a rule is the first match of no leaf, or a spec does not
      fit a leaf's shape. All problems in one message.
  """
  matchers = [re.compile(pattern) for pattern, _ in rules]
  used, problems = set(), []

  def shard(path, leaf) -> NamedSharding | None:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    index = next((i for i, matcher in enumerate(matchers) if matcher.fullmatch(name)), None)
    if index is None:
      remedy = f'end with ("{CATCH_ALL}", ()) to replicate it'
      problems.append(
        f"config.mesh.{field}: none matches parameter {name} {tuple(leaf.shape)}; {remedy}"
      )
      return None
    used.add(index)
    pattern, written = rules[index]
    spec = written
    if written and written[0] == REST:
      spec = (None,) * (len(leaf.shape) + 1 - len(written)) + tuple(written[1:])
    reason = _misfit(tuple(leaf.shape), spec, mesh)
    if reason:
      problems.append(
        f'config.mesh.{field}: ("{pattern}", {tuple(written)}) on parameter {name}'
        f" {tuple(leaf.shape)}: {reason}"
      )
      return None
    return NamedSharding(
      mesh, P(*(tuple(entry) if isinstance(entry, list) else entry for entry in spec))
    )

  shardings = jax.tree_util.tree_map_with_path(shard, abstract_tree)
  for index, (pattern, spec) in enumerate(rules):
    if index not in used and pattern != CATCH_ALL:
      problems.append(
        f'config.mesh.{field}: ("{pattern}", {tuple(spec)}) is the first match of no parameter; '
        "it must match the whole path (`.*/kernel`), and stand before a broader rule"
      )
  if problems:
    raise ConfigError(listed(problems, 8, between="\n"))
  return shardings


def _misfit(shape: tuple[int, ...], spec: Sequence[Any], mesh: Mesh) -> str | None:
  """Why a spec does not fit a shape; None if it does."""
  if len(spec) > len(shape):
    return f"the rule names {len(spec)} dimensions, the parameter has {len(shape)}"
  for dimension, (size, entry) in enumerate(zip(shape, spec)):
    axes = entry if isinstance(entry, (tuple, list)) else (entry,)
    unknown = [axis for axis in axes if axis is not None and axis not in mesh.shape]
    if unknown:
      return f"unknown mesh axis {unknown[0]!r}; one of {', '.join(mesh.shape)}"
    shards = prod(mesh.shape[axis] for axis in axes if axis is not None)
    if size % shards:
      return f"dimension {dimension} of size {size} does not divide over {shards} devices ({entry})"
  return None

"""Devices as a mesh, and parameters onto it: regex -> PartitionSpec rules, after big_vision's
`sharding.py`.

Axes: `data` copies the parameters and splits the samples, `fsdp` splits both, `tensor` splits
parameters inside a layer. Samples are split over fsdp and data together. Axis types are Auto: the
compiler decides where nothing is said.
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

from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.types import SAMPLE_AXES, PyTree

AXES = ("data", "fsdp", "tensor")
CATCH_ALL = ".*"
# first in a rule's spec: as many whole dimensions as the parameter has beside those that follow
REST = "..."


def axis_sizes(config_mesh: ConfigDict, num_devices: int) -> tuple[int, ...]:
  """Devices along data, fsdp, tensor; a -1 in the config takes what the others leave.

  Raises:
    ConfigError: a size that is neither -1 nor positive, more than one -1, or a product that isn't
      the number of devices.
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
  """The mesh over all devices of all processes (or those given); enter it once with `jax.set_mesh`.

  Raises:
    ConfigError: as `axis_sizes`; a data axis that several TPU slices can't share equally.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes, kinds = axis_sizes(config_mesh, len(devices)), (AxisType.Auto,) * len(AXES)
  if slices_of(devices) > 1:
    return Mesh(over_slices(sizes, devices), AXES, axis_types=kinds)
  return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)


def slices_of(devices: Sequence[Any]) -> int:
  """TPU slices that devices belong to; 1 where they are no TPUs."""
  if any(device.platform != "tpu" for device in devices):
    return 1
  return len({getattr(device, "slice_index", 0) for device in devices})


def over_slices(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
  """The devices of several TPU slices as `[data, fsdp, tensor]`: the data axis alone crosses from
  slice to slice, over the data center's network, which is slow; fsdp and tensor stay on the links
  inside one. ConfigError where data can't be shared.
  """
  slices = slices_of(devices)
  if sizes[0] % slices:
    raise ConfigError(
      f"config.mesh.data = {sizes[0]}: {slices} TPU slices can't share it equally, and fsdp and"
      " tensor stay inside a slice;"
      f" set a multiple of {slices}"
    )
  inside, across = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
  return mesh_utils.create_hybrid_device_mesh(
    inside, across, devices, allow_split_physical_axes=True
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis (samples) split over fsdp and data; a device owns consecutive rows."""
  return NamedSharding(mesh, P(SAMPLE_AXES))


class Shards(NamedTuple):
  """The rows of an array that fall to this process, where they lie.

  Attributes:
    numbers: of the rows `[n]`.
    parts: arrays of one device each, with these rows in this order; [] for none.
  """

  numbers: np.ndarray
  parts: list[jax.Array]


def own_shards(array: jax.Array) -> Shards:
  """This process's rows of an array split along its first axis; a row falls to exactly one process.
  Does not wait for them.

  To be called by the thread that has the array, before another one gets it or its shards: JAX
  (0.10.2) makes the list of an array's shards at first use, and two threads that ask at once may
  see a part of it.
  """
  shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
  shards.sort(key=lambda shard: shard.index[0].start or 0)
  numbers = [np.arange(*shard.index[0].indices(len(array))) for shard in shards]
  return Shards(np.concatenate([np.zeros(0, np.int64), *numbers]), [shard.data for shard in shards])


def join_processes(values: dict[str, np.ndarray], own: np.ndarray) -> dict[str, np.ndarray]:
  """Puts together what each process knows of a whole; all processes call it at the same point, with
  the same names.

  Args:
    values: `{name: [n]}`, host arrays.
    own: bool `[n]`, which entries are this process's: each of exactly one process.

  Returns:
    `{name: [n]}`, the same on every process.
  """
  if jax.process_count() == 1 or not values:
    return values
  rows, owners = multihost_utils.process_allgather((np.stack(list(values.values())), own))
  joined = np.take_along_axis(rows, owners.argmax(0)[None, None], axis=0)[0]
  return dict(zip(values, joined))


def to_host(array: jax.Array) -> np.ndarray:
  """The whole array on every process, whoever's devices hold it; all processes call it at the same
  point.
  """
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def infer_shardings(
  abstract_tree: PyTree, rules: Sequence[Sequence[Any]], mesh: Mesh, field: str = "rules"
) -> PyTree:
  """A NamedSharding for each leaf of a tree of arrays or `jax.ShapeDtypeStruct`s.

  Args:
    abstract_tree: all trees that the rules speak of, as one (a dict of them): a rule that matches
      nothing is an error.
    rules: (regex, spec) pairs; the regex must match the whole path, as
      `params/mid/attention/query/kernel`, and the first that does holds. spec has an entry a
      dimension, at most: None, a mesh axis, or a tuple of axes; "..." first stands for all
      dimensions before those that follow. `.*` may match nothing.
    mesh: the devices.
    field: of config.mesh that holds the rules, for messages.

  Raises:
    ConfigError: leaves that no rule matches, rules that match no leaf (or none that an earlier rule
      has left), and specs that a leaf's shape can't take. All in one message.
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
    pattern, said = rules[index]
    spec = said
    if said and said[0] == REST:
      spec = (None,) * (len(leaf.shape) + 1 - len(said)) + tuple(said[1:])
    reason = _misfit(tuple(leaf.shape), spec, mesh)
    if reason:
      problems.append(
        f'config.mesh.{field}: ("{pattern}", {tuple(said)}) on parameter {name}'
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
    raise ConfigError("\n".join(problems))
  return shardings


def _misfit(shape: tuple[int, ...], spec: Sequence[Any], mesh: Mesh) -> str | None:
  """Why a shape can't take a spec, or None."""
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

"""Checkpoints of a training state: saved in the background, the last few kept, restored onto any
devices. Orbax v1.

`<directory>/<iteration>/` has a folder a field of the state, so that a part can be read alone, and
JSON metadata. Orbax writes into a temporary folder and renames it when all is on disk: what has a
plain number for a name is whole. It is the only module that knows Orbax, whose v1 names may still
move before its 1.0.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.types import PyTree

Directory = str | os.PathLike
_METADATA = "_CHECKPOINT_METADATA"  # Orbax's name; the last file of a save
_FIELD_FILES = ("_METADATA", "manifest.ocdbt", "d")  # what Orbax writes for each field


class CheckpointError(ConfigError):
  """A checkpoint that isn't there, isn't whole, or doesn't fit; the text says which and what to
  do.
  """


class Restored(NamedTuple):
  """What `restore` read: the iteration it was saved at, the state, and the JSON metadata given to
  `Saver.save`.
  """

  iteration: int
  state: PyTree
  meta: dict[str, Any]


class Saver:
  """Saves states into a directory, in the background, and keeps the last `keep`. A context manager;
  all processes call it.

  A failed save raises at the next `save`, at `wait` or at `close`.
  """

  def __init__(self, directory: Directory, keep: int):
    policies = ocp.training.preservation_policies
    # Orbax slices every replicated array into a part a device, each by a program that it compiles,
    # unless it is large.
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = 2**20
    with context:
      self._checkpointer = ocp.training.Checkpointer(
        epath.Path(directory).resolve(),
        preservation_policy=policies.LatestN(keep),
        cleanup_tmp_directories=True,
      )
    self._pending = None

  def save(self, iteration: int, state: PyTree, meta: Mapping[str, Any]) -> None:
    """Starts to save; returns when the arrays have been copied, so that they may be donated to the
    next step.

    Args:
      iteration: names the checkpoint. One that exists is left as it is: a run repeated from there
        would write the same.
      state: NamedTuple or dict of fields, each an array or a tree of arrays. Empty fields (None,
        {}) are left out.
      meta: JSON values (iteration, config), read back without the arrays.
    """
    self.wait()
    if iteration in steps(self._checkpointer.directory):
      return
    fields = {name: value for name, value in _fields(state).items() if jax.tree.leaves(value)}
    metadata = {
      "fields": {name: _leaves(name, value) for name, value in fields.items()},
      "meta": dict(meta),
    }
    self._pending = self._checkpointer.save_checkpointables_async(
      iteration, fields, force=True, custom_metadata=metadata
    )

  def wait(self) -> None:
    """Blocks until the last save is on disk."""
    if self._pending is not None:
      self._pending.result()
      self._pending = None

  def close(self) -> None:
    """Waits for the last save and ends Orbax's threads."""
    try:
      self.wait()
    finally:
      self._checkpointer.close()

  def __enter__(self) -> "Saver":
    return self

  def __exit__(self, *_) -> None:
    self.close()


def steps(directory: Directory) -> list[int]:
  """Iterations of the whole checkpoints in a directory, ascending; [] where there is none."""
  root = epath.Path(directory)
  if not root.is_dir():
    return []
  return sorted(
    int(path.name) for path in root.iterdir() if path.name.isdigit() and (path / _METADATA).exists()
  )


def latest(directory: Directory) -> int | None:
  """The last iteration saved, or None."""
  return max(steps(directory), default=None)


def read_meta(directory: Directory, iteration: int | None = None) -> dict[str, Any]:
  """The JSON metadata of a checkpoint (the latest by default), without its arrays. Raises
  CheckpointError.
  """
  return _read_metadata(_find(directory, iteration))["meta"]


def restore(directory: Directory, abstract_state: PyTree, iteration: int | None = None) -> Restored:
  """The whole state of a checkpoint.

  Args:
    directory: what a Saver wrote into.
    abstract_state: the state's NamedTuple or dict with `jax.ShapeDtypeStruct` leaves; their
      shardings say where to put the arrays, whatever devices they were saved from. Fields without
      leaves are returned as they are.
    iteration: the latest by default.

  Raises:
    CheckpointError: no such checkpoint, files missing or truncated, or fields, shapes or types that
      differ.
  """
  folder = _find(directory, iteration)
  abstract = _fields(abstract_state)
  wanted = {name: value for name, value in abstract.items() if jax.tree.leaves(value)}
  metadata = _read_metadata(folder)
  unwanted = [name for name in metadata["fields"] if name not in wanted]
  if unwanted:
    raise CheckpointError(
      f"checkpoint {folder}: holds {', '.join(unwanted)}, which this run's state does not have"
    )
  values = abstract | _load(folder, metadata, wanted)
  state = type(abstract_state)(**values) if hasattr(abstract_state, "_fields") else values
  return Restored(int(folder.name), state, metadata["meta"])


def restore_fields(
  directory: Directory, abstract_fields: Mapping[str, PyTree], iteration: int | None = None
) -> dict[str, PyTree]:
  """Some fields of a checkpoint, as {"trainable": abstract tree}; the others are not read. Else as
  `restore`.
  """
  folder = _find(directory, iteration)
  return _load(folder, _read_metadata(folder), dict(abstract_fields))


def _fields(state: PyTree) -> dict[str, PyTree]:
  return dict(state._asdict() if hasattr(state, "_asdict") else state)


def _find(directory: Directory, iteration: int | None) -> epath.Path:
  """The folder of a whole checkpoint."""
  root, found = epath.Path(directory).resolve(), steps(directory)
  if not found:
    unfinished = [path.name for path in root.iterdir()] if root.is_dir() else []
    what = (
      f"holds no finished checkpoint, only {', '.join(sorted(unfinished)[:4])}"
      if unfinished
      else "holds no checkpoint"
    )
    raise CheckpointError(
      f"{directory}: {what if root.is_dir() else 'no such directory'}; give the checkpoints/ of"
      " a workdir"
    )
  if iteration is None:
    return root / str(found[-1])
  if iteration not in found:
    raise CheckpointError(
      f"{directory}: no checkpoint of iteration {iteration}; it has {', '.join(map(str, found))}"
    )
  return root / str(iteration)


def _read_metadata(folder: epath.Path) -> dict[str, Any]:
  """What `save` wrote beside the arrays: {"fields": {name: {leaf: type and shape}}, "meta": ...}.
  Also finds missing files.
  """
  try:
    metadata = ocp.checkpointables_metadata(folder).custom_metadata
    names = metadata["fields"]
  except Exception as error:
    raise CheckpointError(
      f"checkpoint {folder}: {_METADATA} can't be read; {_remedy(folder)}"
    ) from error
  missing = [
    f"{name}/{file}"
    for name in names
    for file in _FIELD_FILES
    if not (folder / name / file).exists()
  ]
  if missing:
    raise CheckpointError(
      f"checkpoint {folder}: truncated, without {', '.join(missing)}; {_remedy(folder)}"
    )
  return metadata


def _load(
  folder: epath.Path, metadata: dict[str, Any], wanted: dict[str, PyTree]
) -> dict[str, PyTree]:
  absent = [name for name in wanted if name not in metadata["fields"]]
  if absent:
    raise CheckpointError(
      f"checkpoint {folder}: has no {', '.join(absent)}; it holds {', '.join(metadata['fields'])}"
    )
  misfits = [
    line
    for name in wanted
    for line in _misfits(metadata["fields"][name], _leaves(name, wanted[name]))
  ]
  if misfits:
    more = f" and {len(misfits) - 8} more" if len(misfits) > 8 else ""
    raise CheckpointError(
      f"checkpoint {folder}: does not fit this run's model: {'; '.join(misfits[:8])}{more}"
    )
  try:
    return ocp.load_checkpointables(folder, wanted)
  # Orbax and TensorStore raise many types for a file that is cut or gone; none is hidden
  except Exception as error:
    raise _unreadable(folder, error) from error


def _misfits(saved: dict[str, str], wanted: dict[str, str]) -> Iterator[str]:
  """Leaves whose shape or type differs, or that only one side has. Orbax's own message for them
  doesn't name the leaf.
  """
  for path in sorted(saved.keys() | wanted.keys()):
    if saved.get(path) != wanted.get(path):
      yield f"{path} is {saved.get(path, 'absent')} there, {wanted.get(path, 'absent')} here"


def _leaves(field: str, tree: PyTree) -> dict[str, str]:
  """Path of each leaf -> its type and shape, as {"trainable/dense/kernel": "float32[64, 32]"}."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    "/".join([field, *map(_key, path)]): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves
  }


def _key(key: Any) -> str:
  return jax.tree_util.keystr((key,), simple=True)


def _remedy(folder: epath.Path) -> str:
  others = [str(step) for step in steps(folder.parent) if str(step) != folder.name]
  return (
    f"delete that folder to use iteration {others[-1]}"
    if others
    else "no other checkpoint is there; start anew"
  )


def _unreadable(folder: epath.Path, error: Exception) -> CheckpointError:
  root: BaseException = error
  while inner := root.__cause__ or root.__context__:  # the innermost says which file is cut
    root = inner
  reason = " ".join(str(root).split())[:200]
  return CheckpointError(
    f"checkpoint {folder}: truncated or damaged ({type(root).__name__}: {reason});"
    f" {_remedy(folder)}"
  )

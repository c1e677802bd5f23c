"""Checkpoints of a training state: saved in the background by Orbax, and restored onto any devices.
The last few are kept.

`<directory>/<iteration>/` holds JSON metadata and a folder for each field of the state, so that one
field can be read without the others. Orbax writes into a temporary folder and renames it when
everything is on disk: a folder whose name is a plain number is complete. No other module uses
Orbax, because the names of its v1 API may still change before version 1.0.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from dancegrpo_jax import buckets
from dancegrpo_jax.errors import ConfigError, listed
from dancegrpo_jax.types import PyTree

Directory = str | os.PathLike
_METADATA = "_CHECKPOINT_METADATA"  # Orbax's name; the last file of a save
_COMMITTED = "commit_success.txt"  # Orbax's name, in buckets
_FIELD_FILES = ("_METADATA", "manifest.ocdbt", "d")  # what Orbax writes for each field


class CheckpointError(ConfigError):
  """A checkpoint is missing, incomplete, or doesn't fit. The message names it and the remedy."""


class Restored(NamedTuple):
  """The result of `restore`.

  Attributes:
    iteration: at which the state was saved.
    state: the arrays.
    meta: the JSON metadata that `Saver.save` was given.
  """

  iteration: int
  state: PyTree
  meta: dict[str, Any]


class Saver:
  """Saves states into a directory, in the background, and keeps the last `keep` of them.

  It is a context manager, and all processes call it. The error of a failed save is raised by the
  next `save`, `wait` or `close`.
  """

  def __init__(self, directory: Directory, keep: int):
    policies = ocp.training.preservation_policies
    # Orbax divides a replicated array among the devices that hold it, and compiles a program for
    # each slice. That is worth its time for large arrays only.
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = 2**20
    with context:
      self._checkpointer = ocp.training.Checkpointer(
        _absolute(directory),
        preservation_policy=policies.LatestN(keep),
        cleanup_tmp_directories=True,
      )
    self._pending = None

  def save(self, iteration: int, state: PyTree, meta: Mapping[str, Any]) -> None:
    """Starts to save, and returns when the arrays have been copied: they may then be donated to the
    next step.

    Args:
      iteration: names the checkpoint. A checkpoint that exists is left as it is, since a run that
        is repeated from there would write the same.
      state: NamedTuple or dict of fields, each an array or a tree of arrays. Empty fields (None,
        {}) are left out.
      meta: JSON values, as the config, which can be read back without the arrays.
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
  """The iterations of a directory's complete checkpoints, ascending; [] where there are none."""
  root = epath.Path(directory)
  if not root.is_dir():
    return []
  # In a bucket nothing can be renamed when it is complete: another file says so.
  last = _COMMITTED if buckets.is_url(str(root)) else _METADATA
  return sorted(
    int(path.name) for path in root.iterdir() if path.name.isdigit() and (path / last).exists()
  )


def latest(directory: Directory) -> int | None:
  """The iteration of the last complete checkpoint, or None."""
  return max(steps(directory), default=None)


def read_meta(directory: Directory, iteration: int | None = None) -> dict[str, Any]:
  """The JSON metadata of a checkpoint, by default the latest, without its arrays.

  Raises:
    CheckpointError: there is no such checkpoint, or files of it are missing.
  """
  return _read_metadata(_find(directory, iteration))["meta"]


def restore(directory: Directory, abstract_state: PyTree, iteration: int | None = None) -> Restored:
  """Reads the whole state of a checkpoint.

  Args:
    directory: where a `Saver` has saved.
    abstract_state: the state's NamedTuple or dict with `jax.ShapeDtypeStruct` leaves. Their
      shardings say where to put the arrays, whatever devices they were saved from. Fields without
      leaves are returned as they are.
    iteration: of the checkpoint; None takes the latest.

  Raises:
    CheckpointError: there is no such checkpoint, files of it are missing or truncated, or its
      fields, shapes or types differ from `abstract_state`.
  """
  folder = _find(directory, iteration)
  abstract = _fields(abstract_state)
  expected = {name: value for name, value in abstract.items() if jax.tree.leaves(value)}
  metadata = _read_metadata(folder)
  unexpected = [name for name in metadata["fields"] if name not in expected]
  if unexpected:
    raise CheckpointError(
      f"checkpoint {folder}: holds {listed(unexpected, 6)}, which this run's state does not have;"
      " give the config that the run was started with"
    )
  values = abstract | _load(folder, metadata, expected)
  state = type(abstract_state)(**values) if hasattr(abstract_state, "_fields") else values
  return Restored(int(folder.name), state, metadata["meta"])


def restore_fields(
  directory: Directory, abstract_fields: Mapping[str, PyTree], iteration: int | None = None
) -> dict[str, PyTree]:
  """Reads some fields of a checkpoint, as {"trainable": abstract tree}, and not the others.

  Arguments and errors are otherwise those of `restore`.
  """
  folder = _find(directory, iteration)
  return _load(folder, _read_metadata(folder), dict(abstract_fields))


def require_fitting(
  directory: Directory, abstract_fields: Mapping[str, PyTree], iteration: int | None = None
) -> None:
  """Checks that `restore_fields` will find what it is asked for, without reading the arrays.

  Arguments and errors are otherwise those of `restore`.
  """
  folder = _find(directory, iteration)
  _check_fields(folder, _read_metadata(folder), dict(abstract_fields))


def _fields(state: PyTree) -> dict[str, PyTree]:
  return dict(state._asdict() if hasattr(state, "_asdict") else state)


def _find(directory: Directory, iteration: int | None) -> epath.Path:
  """The folder of a complete checkpoint, by default of the latest."""
  return _absolute(directory) / str(require_step(directory, iteration))


def _absolute(directory: Directory) -> epath.Path:
  """The whole path of a directory. A bucket's URL is whole, and `resolve` would take it for a name
  in the working folder.
  """
  path = epath.Path(directory)
  return path if buckets.is_url(str(path)) else path.resolve()


def folder_of(workdir: Directory) -> epath.Path:
  """The folder of a run's checkpoints. Where the workdir is the local copy of a bucket's, it is in
  the bucket.
  """
  return epath.Path(buckets.behind(workdir)) / "checkpoints"


def require_step(directory: Directory, iteration: int | None = None) -> int:
  """The iteration of a complete checkpoint, by default of the latest.

  Raises:
    CheckpointError: there is none, or not this one; one line that says which there are.
  """
  iterations = steps(directory)
  if not iterations:
    content = _content(epath.Path(directory))
    raise CheckpointError(f"{directory}: {content}; give the checkpoints/ of a workdir")
  if iteration is not None and iteration not in iterations:
    numbers = [str(step) for step in iterations]
    if len(numbers) > 12:
      numbers = [*numbers[:6], "...", *numbers[-6:]]
    raise CheckpointError(
      f"{directory}: no checkpoint of iteration {iteration}; it has {', '.join(numbers)}"
    )
  return iterations[-1] if iteration is None else iteration


def _content(root: epath.Path) -> str:
  """What a directory without complete checkpoints holds, for an error message."""
  if not root.is_dir():
    return "no such directory"
  unfinished = sorted(path.name for path in root.iterdir())
  if not unfinished:
    return "holds no checkpoint"
  return f"holds no finished checkpoint, only {listed(unfinished, 4)}"


def _read_metadata(folder: epath.Path) -> dict[str, Any]:
  """What `save` wrote beside the arrays: {"fields": {name: {leaf: type and shape}}, "meta": ...}.

  Raises:
    CheckpointError: the metadata can't be read, or files of a field are missing.
  """
  try:
    metadata = ocp.checkpointables_metadata(folder).custom_metadata
    names = metadata["fields"]
  except Exception as error:  # Orbax raises many types, as in `_load`
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
      f"checkpoint {folder}: truncated, without {listed(missing, 6)}; {_remedy(folder)}"
    )
  return metadata


def _load(
  folder: epath.Path, metadata: dict[str, Any], expected: dict[str, PyTree]
) -> dict[str, PyTree]:
  """Reads the fields of an abstract state, after a check that they fit. Errors as `restore`."""
  _check_fields(folder, metadata, expected)
  try:
    return ocp.load_checkpointables(folder, expected)
  # Orbax and TensorStore raise many types for a truncated or missing file. The message names them.
  except Exception as error:
    raise _unreadable(folder, error) from error


def _check_fields(
  folder: epath.Path, metadata: dict[str, Any], expected: dict[str, PyTree]
) -> None:
  """CheckpointError where a checkpoint lacks a field, or has other shapes or types."""
  absent = [name for name in expected if name not in metadata["fields"]]
  if absent:
    raise CheckpointError(
      f"checkpoint {folder}: has no {', '.join(absent)}; it holds {', '.join(metadata['fields'])}"
    )
  misfits = [
    line
    for name in expected
    for line in _misfits(metadata["fields"][name], _leaves(name, expected[name]))
  ]
  if misfits:
    more = f" and {len(misfits) - 8} more" if len(misfits) > 8 else ""
    raise CheckpointError(
      f"checkpoint {folder}: does not fit this run's model: {'; '.join(misfits[:8])}{more}"
    )


def _misfits(saved: dict[str, str], expected: dict[str, str]) -> Iterator[str]:
  """A line for each leaf whose shape or type differs, or that only one side has.

  Orbax's message doesn't name the leaf.
  """
  for path in sorted(saved.keys() | expected.keys()):
    if saved.get(path) != expected.get(path):
      yield f"{path} is {saved.get(path, 'absent')} there, {expected.get(path, 'absent')} here"


def _leaves(field: str, tree: PyTree) -> dict[str, str]:
  """The type and shape of each leaf, by path: {"trainable/dense/kernel": "float32[64, 32]"}."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    "/".join([field, *map(_key, path)]): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves
  }


def _key(key: Any) -> str:
  return jax.tree_util.keystr((key,), simple=True)


def _remedy(folder: epath.Path) -> str:
  """What to do where this checkpoint can't be used, for an error message."""
  others = [str(step) for step in steps(folder.parent) if str(step) != folder.name]
  if not others:
    return "no other checkpoint is there; start anew"
  return f"delete that folder to use iteration {others[-1]}"


def _unreadable(folder: epath.Path, error: Exception) -> CheckpointError:
  """The error of a checkpoint whose arrays can't be read."""
  root: BaseException = error
  while inner := root.__cause__ or root.__context__:  # the innermost one names the truncated file
    root = inner
  reason = " ".join(str(root).split())[:200]
  return CheckpointError(
    f"checkpoint {folder}: truncated or damaged ({type(root).__name__}: {reason});"
    f" {_remedy(folder)}"
  )

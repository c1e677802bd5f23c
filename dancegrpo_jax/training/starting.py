"""A new run that starts from the weights of another one, see config.init_from.

Only a new run reads the other one. When it is resumed, its own checkpoints have everything. A KL
penalty holds to the model of config.model.checkpoint, wherever the run starts from.
"""

from collections.abc import Callable
from pathlib import Path

import jax
from etils import epath
from ml_collections import ConfigDict

from dancegrpo_jax import buckets
from dancegrpo_jax.assembly import sampling
from dancegrpo_jax.assembly.loading import Model
from dancegrpo_jax.checkpoints import chosen, components, store
from dancegrpo_jax.checkpoints.chosen import Checkpoint
from dancegrpo_jax.devices import processes, sharding
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.models import lora
from dancegrpo_jax.settings import stored_config
from dancegrpo_jax.types import PyTree

_SHAPING = ("model.family", "model.scan_blocks")  # fields that the names of the weights depend on
_ADAPTERS = ("lora.rank", "lora.alpha", "lora.targets")


def pinned(config: ConfigDict, workdir: Path) -> ConfigDict:
  """The config of a new run, whose init_from names the iteration, too.

  Args:
    config: of the command.
    workdir: of the new run, which holds no checkpoint yet.

  Raises:
    ConfigError: there is no such checkpoint, or it is of another kind of model; one line.
  """
  if not config.get("init_from"):
    return config
  checkpoint = _find(config, workdir)
  processes.require_same(
    checkpoint.iteration,
    f"config.init_from = {config.init_from!r}: the hosts see different checkpoints there",
    "all hosts must see the same folder, or name an iteration behind an @",
  )
  _require_like(config, checkpoint)
  return _with(config, checkpoint.pinned)


def as_pinned(config: ConfigDict, stored: dict, workdir: Path) -> ConfigDict:
  """The config of a run that goes on, whose init_from is what the run has stored.

  Where the command names no iteration, or nothing, the stored one is meant. Another run is left in
  the config, and refused like any other difference.

  Raises:
    ConfigError: init_from names the workdir itself.
  """
  before, now = stored.get("init_from", ""), config.get("init_from", "").rstrip("/")
  if now in ("", before, before.rpartition("@")[0]):
    return _with(config, before)
  if _is_own(config.init_from, workdir):
    raise _own_workdir(config)
  return config


def _with(config: ConfigDict, init_from: str) -> ConfigDict:
  with (copy := config.copy_and_resolve_references()).unlocked():
    copy.init_from = init_from
  return copy.lock()


def _find(config: ConfigDict, workdir: Path | None = None) -> Checkpoint:
  """The checkpoint of config.init_from."""
  if workdir is not None and _is_own(config.init_from, workdir):
    raise _own_workdir(config)
  try:
    return chosen.find(config.init_from)
  except ConfigError as error:
    raise ConfigError(f"config.init_from: {error}") from error


def _is_own(name: str, workdir: Path) -> bool:
  """Whether a checkpoint's name means this workdir, whether or not it holds a checkpoint."""
  if buckets.is_url(name):
    own, place = buckets.behind(workdir).rstrip("/"), name.rpartition("@")[0] or name
    return place.rstrip("/") in (own, f"{own}/checkpoints")
  own = epath.Path(workdir).resolve()
  place = epath.Path(name if epath.Path(name).exists() else name.rpartition("@")[0] or name)
  place = place.resolve()
  return own == place or own / "checkpoints" in (place, place.parent)


def _own_workdir(config: ConfigDict) -> ConfigError:
  return ConfigError(
    f"config.init_from = {config.init_from!r}: is the workdir of this run; name another --workdir"
    " for a new run, or leave --init-from out to go on with that one"
  )


def _require_like(config: ConfigDict, checkpoint: Checkpoint) -> None:
  """Raises ConfigError where the other run has another family or layout, or adapters that can't go
  on.
  """
  before = stored_config.flatten(stored_config.completed(checkpoint.meta()["config"]))
  now = stored_config.flatten(config)
  start = f"config.init_from = {config.init_from!r}: was trained with"
  for field in _SHAPING:
    if before[field] != now[field]:
      raise ConfigError(
        f"{start} {field} = {before[field]!r}; this config has {now[field]!r}; set"
        f" --config.{field}={before[field]}, or name another run"
      )
  if not before["lora.rank"] and now["lora.rank"]:
    raise ConfigError(
      f"{start} every weight, and this config trains adapters (lora.rank = {now['lora.rank']});"
      f" write it as a folder with `python -m dancegrpo_jax.convert export"
      f" --checkpoint={checkpoint.pinned} --out=DIR`, and set --config.model.checkpoint=DIR"
    )
  for field in _ADAPTERS if now["lora.rank"] else ():
    if before[field] != now[field]:
      raise ConfigError(
        f"{start} {field} = {before[field]!r}; this config has {now[field]!r}; set"
        f" --config.{field}={before[field]!r}"
      )


def _abstract(
  config: ConfigDict, checkpoint: Checkpoint, model: Model, mesh: jax.sharding.Mesh
) -> tuple[PyTree, float | None]:
  """What is read of the other run: its abstract weights, and the factor of adapters that are to be
  merged into the base; None where nothing is merged.
  """
  settings = checkpoint.meta()["config"]["lora"]
  if config.lora.rank or not settings["rank"]:
    return components.placed(model.trainable, model.shardings), None
  adapters = lora.Lora(settings["rank"], settings["alpha"], settings["targets"])
  try:
    abstract = lora.abstract(model.pipeline.components["denoiser"].abstract, adapters)
  except ValueError as error:
    raise ConfigError(f"config.init_from = {config.init_from!r}: {error}") from error
  everywhere = jax.tree.map(lambda _: sharding.replicated(mesh), abstract)
  return {lora.COLLECTION: components.placed(abstract, everywhere)}, adapters.scale


def require_fitting(config: ConfigDict, outline: Model, mesh: jax.sharding.Mesh) -> None:
  """Compares the weights of config.init_from with the model, before any are read.

  Raises:
    ConfigError: they don't fit; one line with the first parameters that differ.
  """
  if not config.init_from:
    return
  checkpoint = _find(config)
  abstract, _ = _abstract(config, checkpoint, outline, mesh)
  try:
    store.require_fitting(
      checkpoint.folder, {sampling.field_of(checkpoint, ""): abstract}, checkpoint.iteration
    )
  except ConfigError as error:
    raise ConfigError(f"config.init_from = {config.init_from!r}: {error}") from error


def weights(
  config: ConfigDict, model: Model, mesh: jax.sharding.Mesh, say: Callable[[str], object]
) -> PyTree:
  """The weights that a new run starts from.

  Args:
    config: validated.
    model: with the weights of the base. They are freed where others take their place.
    mesh: the devices.
    say: gets a line about the weights.

  Raises:
    ConfigError: the weights can't be read.
  """
  if not config.init_from:
    return model.trainable
  checkpoint = _find(config)
  abstract, scale = _abstract(config, checkpoint, model, mesh)
  if scale is None:
    jax.tree.map(lambda leaf: leaf.delete(), model.trainable)  # there may be no room for both
  read = sampling.restore_weights(checkpoint, abstract, "")
  if scale is not None:
    denoiser = model.pipeline.trainable
    read = {denoiser: lora.merged(model.trainable[denoiser], read[lora.COLLECTION], scale)}
    read = jax.device_put(read, model.shardings)
  averaged = "averaged " if sampling.is_averaged(checkpoint) else ""
  merged = ", with its adapters merged in" if scale is not None else ""
  say(f"starting from the {averaged}weights of {config.init_from}{merged}")
  before = checkpoint.meta()["config"]["model"]["checkpoint"]
  if before != config.model.checkpoint:
    say(
      f"note: {config.init_from} was trained from {before!r}; the other networks are those of"
      f" {config.model.checkpoint!r}"
    )
  return read

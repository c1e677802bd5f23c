"""Writes whole checkpoint folders: a trained model in its base's layout, which for the families of
this package is diffusers', and a base model as an Orbax tree.

A folder appears under its name when it is complete, and never replaces anything.
"""

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dancegrpo_jax.assembly import loading, sampling
from dancegrpo_jax.checkpoints import chosen, components, hub, lora_merging, store, weights
from dancegrpo_jax.checkpoints.chosen import Checkpoint
from dancegrpo_jax.convert import cards
from dancegrpo_jax.devices import interrupts, sharding
from dancegrpo_jax.errors import ConfigError, ConversionError, listed
from dancegrpo_jax.models import lora
from dancegrpo_jax.pipelines.base import Pipeline
from dancegrpo_jax.pipelines.layout import Component, Layout, is_random
from dancegrpo_jax.report.progress import phase
from dancegrpo_jax.settings import checks, command_line
from dancegrpo_jax.types import PyTree

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".safetensors.index.json")


def export(
  config: ConfigDict, name: str, out: Path, part: str, kind: str, dtype: str = "float32"
) -> None:
  """Writes a trained model as a folder in its base's layout, or as a LoRA file.

  Args:
    config: of the run.
    name: of the checkpoint, see `chosen.find`.
    out: where to write; must not exist, or be empty.
    part: one of
      - "pipeline": the trained network with the base's other files. For the families of this
        package, `from_pretrained` of a diffusers pipeline loads it.
      - "denoiser": the folder of the trained network, for the network's own `from_pretrained`.
      - "lora": the adapters as pytorch_lora_weights.safetensors, for `load_lora_weights` of the
        base's pipeline. The other parts have the adapters merged into the weights.
      - "": "lora" where the run trained adapters, else "pipeline".
    kind: "ema", "raw", or "" for the averaged weights where the checkpoint has them.
    dtype: of all weights of a pipeline or denoiser. The networks of a pipeline must have the same:
      transformers keep a file's dtype, while diffusers read float32 unless they are told otherwise.
      A LoRA file is always float32.

  Raises:
    ConfigError: `out` exists already, or a checkpoint can't be used.
  """
  check_free(out)
  checks.validate(config, num_devices=jax.device_count())
  checkpoint = chosen.find(name)
  if not part:
    part = "lora" if config.lora.rank else "pipeline"
  print(f"exporting the {part} of {name} to {out}", flush=True)
  if part == "lora" and not config.lora.rank:
    raise ConfigError(
      "--part=lora: this config trains every weight (lora.rank = 0); use pipeline or denoiser"
    )
  sampling.check_lora(config, checkpoint)
  if part == "pipeline":
    _check_index(config)
  pipeline, mesh = loading.build_pipeline(config), sharding.make_mesh(config.mesh)
  if part == "pipeline":
    _check_folders(pipeline)
  component = pipeline.components["denoiser"]
  shardings = loading.shardings_of(config, pipeline, mesh)
  _note_base(config, checkpoint)
  about = cards.facts(
    config, checkpoint, part=part, kind=kind, dtype=dtype, name=out.absolute().name
  )
  with jax.set_mesh(mesh), written(out) as folder:
    with phase("reading the checkpoint"):
      trained = _restore(checkpoint, pipeline, shardings, kind)
    if part == "lora":
      adapters = lora.scaled(trained, _scale(config))
      weights.save_lora(folder, component.table, adapters, cards.header(about))
    else:
      whole = _whole(config, pipeline, trained, shardings)
      _write(config, pipeline, shardings, folder, part, whole, dtype, cards.header(about))
    (folder / cards.FILE).write_text(cards.text(about))
  print(f"{part} of {checkpoint.pinned}: {out}")


def merge(
  config: ConfigDict, file: str, out: Path, part: str, strength: float, dtype: str = "float32"
) -> None:
  """Adds a LoRA file to the config's base model, and writes the result as a folder in the base's
  layout.

  Args:
    config: its `model` section names the base.
    file: the LoRA file, or its folder.
    out: where to write; must not exist, or be empty.
    part: "pipeline" or "denoiser", as in `export`.
    strength: 1 is the strength at which the adapters were trained.
    dtype: of all weights, as in `export`.

  Raises:
    ConfigError: `out` exists already, or the base can't be used.
    ConversionError: the file can't be used; the message names it.
  """
  check_free(out)
  checks.validate(config, num_devices=jax.device_count())
  print(f"adding {file} to {config.model.checkpoint}, into {out}", flush=True)
  if part == "pipeline":
    _check_index(config)
  pipeline, mesh = loading.build_pipeline(config), sharding.make_mesh(config.mesh)
  if part == "pipeline":
    _check_folders(pipeline)
  component = pipeline.components["denoiser"]
  shardings = loading.shardings_of(config, pipeline, mesh)
  with jax.set_mesh(mesh), written(out) as folder:
    base = _read(config, component, shardings["denoiser"])
    try:
      with phase("adding the adapters"):
        whole, notes = lora_merging.merged(base, component.table, file, strength)
    except ConversionError as error:
      raise ConversionError(f"--lora={file}: {error}") from error
    _write(config, pipeline, shardings, folder, part, whole, dtype)
  for note in notes:
    print(f"note: --lora={file}: {note}")
  print(f"{part} of {config.model.checkpoint} with {file}: {out}")


def _check_index(config: ConfigDict) -> None:
  """Raises ConfigError where the base lacks the file that names its pipeline's class."""
  base, index = loading.checkpoint_folder(config), loading.family_of(config).index_file
  if index and not (base / index).is_file():
    raise ConfigError(
      f"{base}: has no {index}, so the pipeline's class is unknown; export it with --part=denoiser"
    )


def _write(
  config: ConfigDict,
  pipeline: Pipeline,
  shardings: dict[str, PyTree],
  folder: Path,
  part: str,
  denoiser: PyTree,
  dtype: str,
  header: dict[str, str] | None = None,
) -> None:
  """Writes the part "pipeline" or "denoiser" of a model with these parameters of the denoiser, all
  in this dtype. The denoiser's file gets this metadata.
  """
  base, index = loading.checkpoint_folder(config), loading.family_of(config).index_file
  component = pipeline.components["denoiser"]
  with phase(f"writing {component.folder}"):
    weights.save(
      folder if part == "denoiser" else folder / component.folder,
      component.table,
      denoiser,
      config_json=weights.config_in(dtype, weights.read_config(base / component.folder)),
      dtype=jnp.dtype(dtype),
      header=header,
    )
  if part == "denoiser":
    return
  copy_files(loading.family_of(config).layout, base, folder)
  for key, other in pipeline.components.items():
    if key != "denoiser":
      with phase(f"writing {other.folder}"):
        _copy_network(config, base, other, shardings[key], folder / other.folder, dtype)
  if index:
    write_index(base, folder, index)


def _restore(
  checkpoint: Checkpoint, pipeline: Pipeline, shardings: dict[str, PyTree], kind: str
) -> PyTree:
  """The trained parameters of a checkpoint: the denoiser's, or its adapters."""
  abstract = pipeline.adapters
  if abstract is None:
    abstract = pipeline.components["denoiser"].abstract
  trainable = pipeline.trainable
  placed = components.placed(abstract, shardings[trainable])
  return sampling.restore_weights(checkpoint, {trainable: placed}, kind)[trainable]


def _whole(
  config: ConfigDict, pipeline: Pipeline, trained: PyTree, shardings: dict[str, PyTree]
) -> PyTree:
  """The denoiser's parameters: the trained ones, or those of the base with the trained adapters
  merged in.
  """
  if pipeline.adapters is None:
    return trained
  base = _read(config, pipeline.components["denoiser"], shardings["denoiser"])
  return lora.merged(base, trained, _scale(config))


def _read(config: ConfigDict, component: Component, sharding: PyTree) -> PyTree:
  """One network's parameters from config.model.checkpoint."""
  with phase(f"reading {component.folder}"):
    return components.read_component(
      loading.model_location(config),
      component,
      sharding,
      variant=config.model.variant,
      allow_pickle=config.model.allow_pickle,
    )


def _scale(config: ConfigDict) -> float:
  """The factor of the adapters' product, alpha / rank, in a run that trains adapters."""
  adapters = loading.lora_of(config)
  assert adapters is not None
  return adapters.scale


def import_checkpoint(config: ConfigDict, out: Path) -> None:
  """Reads config.model.checkpoint and writes all its networks as one Orbax tree beside its JSON
  files and tokenizers.

  The new folder can be used as `config.model.checkpoint`. Its dtypes are those of this config.

  Args:
    config: of a run that would start from the checkpoint.
    out: where to write; must not exist, or be empty.

  Raises:
    ConfigError: `out` exists already, or the checkpoint can't be used.
  """
  check_free(out)
  checks.validate(config, num_devices=jax.device_count())
  print(f"importing {config.model.checkpoint} into {out}", flush=True)
  pipeline, mesh = loading.build_pipeline(config), sharding.make_mesh(config.mesh)
  _check_folders(pipeline)
  shardings = loading.shardings_of(config, pipeline, mesh)
  with jax.set_mesh(mesh), written(out) as folder:
    trees = {
      component.folder: _read(config, component, shardings[key])
      for key, component in pipeline.components.items()
    }
    with phase("writing the tree"), store.Saver(folder / hub.ORBAX, keep=1) as saver:
      saver.save(0, trees, {"checkpoint": config.model.checkpoint})
    base = loading.checkpoint_folder(config)
    copy_files(loading.family_of(config).layout, base, folder)
    for component in pipeline.components.values():
      _copy(base / component.folder / "config.json", folder / component.folder / "config.json")
    index = loading.family_of(config).index_file
    if index and (base / index).is_file():
      _copy(base / index, folder / index)
  print(f"{config.model.checkpoint}: {out}; use it with --config.model.checkpoint={out}")


def _check_folders(pipeline: Pipeline) -> None:
  """Raises ConfigError where two networks share a folder: one would be written over the other."""
  owners: dict[str, str] = {}
  for name, component in pipeline.components.items():
    other = owners.setdefault(str(Path(component.folder)), name)
    if other != name:
      raise ConfigError(
        f"the networks {other} and {name} share the folder {component.folder!r} of the checkpoint,"
        " which can be read but not written; use --part=denoiser or --part=lora"
      )


def check_free(out: Path) -> None:
  """Raises ConfigError where a folder can't be written under this name."""
  if out.is_dir() and any(out.iterdir()):
    raise ConfigError(
      f"--out={out}: exists and is not empty; name a new folder, or remove it first"
    )
  if out.exists() and not out.is_dir():
    raise ConfigError(f"--out={out}: is a file; name a new folder")
  command_line.require_writable(f"--out={out}", out)


@contextlib.contextmanager
def written(out: Path) -> Iterator[Path]:
  """A temporary folder beside `out`. It gets the name `out` when the block ends without an error,
  and is removed when it does not.
  """
  temporary = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.tmp")
  remove = functools.partial(shutil.rmtree, temporary, ignore_errors=True)
  with interrupts.undone(remove):
    try:
      temporary.mkdir(parents=True)
      yield temporary
      os.replace(temporary, out)
    finally:
      remove()


def _note_base(config: ConfigDict, checkpoint: Checkpoint) -> None:
  """Prints a note where the run started from another checkpoint than the config names.

  The folders that are copied must be of the same model.
  """
  ran_with = checkpoint.meta()["config"]["model"]["checkpoint"]
  if ran_with != config.model.checkpoint:
    print(
      f"note: {checkpoint.name} was trained from {ran_with!r}; its other folders are copied from"
      f" {config.model.checkpoint!r}"
    )


def _copy(source: Path, target: Path) -> None:
  target.parent.mkdir(parents=True, exist_ok=True)
  shutil.copyfile(source, target)


def copy_files(layout: Layout, base: Path, folder: Path) -> None:
  """Copies what the base has beside its networks: the files of its layout, each with its folder, as
  scheduler and tokenizer, and the other folders that its index names, as feature_extractor.
  """
  named = [*hub.json_files(layout), *hub.tokenizer_files(layout)]
  files = [Path(file) for file in named if (base / file).is_file()]
  names = {str(file.parent) for file in files if file.parent != Path()}
  if layout.index_file and (base / layout.index_file).is_file():
    names |= {
      key for key in weights.read_config(base, layout.index_file) if not key.startswith("_")
    }
  for name in sorted(names - set(layout.networks)):
    if (base / name).is_dir():
      shutil.copytree(base / name, folder / name)  # follows the links of the hub's cache
  for file in files:
    if not (folder / file).exists():  # in the checkpoint's own folder, or in a network's
      _copy(base / file, folder / file)


def _copy_network(
  config: ConfigDict,
  base: Path,
  component: Component,
  sharding: PyTree,
  target: Path,
  dtype: str,
) -> None:
  """Writes a frozen network in this dtype: from its weight files, or where it has none (an Orbax
  tree, random weights) from its parameters.
  """
  source, network_dtype = base / component.folder, jnp.dtype(dtype)
  has_files = not (base / hub.ORBAX).is_dir() and not is_random(loading.model_location(config))
  if has_files:
    model = config.model
    weights.copy(
      source,
      target,
      component.table,
      component.abstract,
      network_dtype,
      model.variant,
      model.allow_pickle,
      unread=component.unread,
    )
  else:
    parameters = _read(config, component, sharding)
    weights.save(target, component.table, parameters, dtype=network_dtype)
    if component.unread:
      print(
        f"note: {component.folder}: {listed(component.unread, 4)} are not in {base}, and this model"
        " does not use them; transformers draw them at random when they load the folder"
      )
  copy_beside(source, target, dtype)


def copy_beside(source: Path, target: Path, dtype: str) -> None:
  """Copies what a network's folder has beside its weights. Its config.json gets the dtype."""
  for path in source.iterdir():
    if path.name == "config.json":
      named = weights.config_in(dtype, weights.read_config(source))
      (target / path.name).write_text(json.dumps(named, indent=2) + "\n")
    elif path.is_file() and not path.name.endswith(_WEIGHTS) and ".index." not in path.name:
      _copy(path, target / path.name)


def write_index(base: Path, folder: Path, name: str) -> None:
  """Writes model_index.json without the parts whose folders aren't there.

  The hub's safety checker, for example, is not fetched.
  """
  index = weights.read_config(base, name)
  for part, value in index.items():
    if isinstance(value, list) and not (folder / part).is_dir():
      index[part] = [None, None]
  if "requires_safety_checker" in index or "safety_checker" in index:
    index["requires_safety_checker"] = (folder / "safety_checker").is_dir()
  (folder / name).write_text(json.dumps(index, indent=2) + "\n")

"""Whole checkpoint folders: a trained model written in its base's layout, which for the families of
this package is diffusers', and a base model written once as an Orbax tree.

Both appear under their name when they are complete, and neither ever replaces anything.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from dancegrpo_jax.assembly import loading, sampling
from dancegrpo_jax.checkpoints import components, hub, store, weights
from dancegrpo_jax.checkpoints.safetensors_io import find_files
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.models import lora
from dancegrpo_jax.pipelines.base import Pipeline
from dancegrpo_jax.pipelines.layout import Component, is_random
from dancegrpo_jax.settings import checks, command_line
from dancegrpo_jax.types import PyTree

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".safetensors.index.json")


def export(config: ConfigDict, name: str, out: Path, part: str, kind: str) -> None:
  """Writes a trained model as a folder in its base's layout, or as a LoRA file, float32.

  Args:
    config: of the run.
    name: a workdir, or a folder of checkpoints; the last one is taken.
    out: where to; must not exist, or be empty.
    part: "pipeline": the trained network with the base's other files, which of the families of this
      package diffusers' `from_pretrained` takes; "denoiser": its folder alone, for the network's
      own `from_pretrained`;
      "lora": the adapters as pytorch_lora_weights.safetensors, for `load_lora_weights` on the
      base's pipeline; "": "lora" where the run trained adapters, which the others merge into the
      weights, else "pipeline".
    kind: "ema", "raw", or "" for the averaged weights where the checkpoint has them.

  Raises:
    ConfigError: `out` exists already, or a checkpoint can't be used.
  """
  check_free(out)
  checks.validate(config, num_devices=jax.device_count())
  part = part or ("lora" if config.lora.rank else "pipeline")
  if part == "lora" and not config.lora.rank:
    raise ConfigError(
      "--part=lora: this config trains every weight (lora.rank = 0); use pipeline or denoiser"
    )
  sampling.check_lora(config, name)
  base, index = loading.checkpoint_folder(config), loading.family_of(config).index
  if part == "pipeline" and index and not (base / index).is_file():
    raise ConfigError(
      f"{base}: has no {index}, so the pipeline's class is unknown; export it with --part=denoiser"
    )
  pipeline, mesh = loading.build_pipeline(config), sharding.make_mesh(config.mesh)
  if part == "pipeline":
    _check_folders(pipeline)
  component = pipeline.components["denoiser"]
  shardings = loading.shardings_of(config, pipeline, mesh)
  trainable = pipeline.trainable
  abstract = component.abstract if pipeline.adapters is None else pipeline.adapters
  _note_base(config, name)
  with jax.set_mesh(mesh), written(out) as folder:
    trained = sampling.restore_weights(
      name, {trainable: components.placed(abstract, shardings[trainable])}, kind
    )[trainable]
    if part == "lora":
      weights.save_lora(folder, component.table, lora.scaled(trained, _scale(config)))
    else:
      target = folder if part == "denoiser" else folder / component.folder
      whole = _whole(config, pipeline, trained, shardings)
      weights.save(
        target,
        component.table,
        whole,
        weights.read_config(base / component.folder),
        dtype="float32",
      )
    if part == "pipeline":
      _copy_files(config, base, folder)
      for key, other in pipeline.components.items():
        if key != "denoiser":
          _copy_network(config, base, other, shardings[key], folder / other.folder)
      if index:
        _write_index(base, folder, index)
  print(f"{part} of {name}: {out}")


def _whole(
  config: ConfigDict, pipeline: Pipeline, trained: PyTree, shardings: dict[str, PyTree]
) -> PyTree:
  """The denoiser's parameters: the trained ones, or those of the base with the trained adapters
  merged in.
  """
  if pipeline.adapters is None:
    return trained
  base = components.read_component(
    loading.model_location(config),
    pipeline.components["denoiser"],
    shardings["denoiser"],
    variant=config.model.variant,
    allow_pickle=config.model.allow_pickle,
  )
  return lora.merged(base, trained, _scale(config))


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
  pipeline, mesh = loading.build_pipeline(config), sharding.make_mesh(config.mesh)
  _check_folders(pipeline)
  shardings, location = loading.shardings_of(config, pipeline, mesh), loading.model_location(config)
  with jax.set_mesh(mesh), written(out) as folder:
    trees = {
      component.folder: components.read_component(
        location, component, shardings[key], config.model.variant, config.model.allow_pickle
      )
      for key, component in pipeline.components.items()
    }
    with store.Saver(folder / hub.ORBAX, keep=1) as saver:
      saver.save(0, trees, {"checkpoint": config.model.checkpoint})
    base = loading.checkpoint_folder(config)
    _copy_files(config, base, folder)
    for component in pipeline.components.values():
      _copy(base / component.folder / "config.json", folder / component.folder / "config.json")
    index = loading.family_of(config).index
    if index and (base / index).is_file():
      _copy(base / index, folder / index)
  print(f"{config.model.checkpoint}: {out}; use it with --config.model.checkpoint={out}")


def _check_folders(pipeline: Pipeline) -> None:
  """ConfigError where two networks lie in one folder: one would be written over the other."""
  owners: dict[str, str] = {}
  for name, component in pipeline.components.items():
    other = owners.setdefault(str(Path(component.folder)), name)
    if other != name:
      raise ConfigError(
        f"the networks {other} and {name} share the folder {component.folder!r} of the checkpoint,"
        " which can be read and not written; --part=denoiser and --part=lora are possible"
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
  temporary.mkdir(parents=True)
  try:
    yield temporary
    os.replace(temporary, out)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _note_base(config: ConfigDict, name: str) -> None:
  """Prints a note where the run started from another checkpoint than the config names.

  The folders that are copied must be of the same model.
  """
  ran_with = store.read_meta(sampling.checkpoints(name))["config"]["model"]["checkpoint"]
  if ran_with != config.model.checkpoint:
    print(
      f"note: {name} was trained from {ran_with!r}; its other folders are copied from"
      f" {config.model.checkpoint!r}"
    )


def _copy(source: Path, target: Path) -> None:
  target.parent.mkdir(parents=True, exist_ok=True)
  shutil.copyfile(source, target)


def _copy_files(config: ConfigDict, base: Path, folder: Path) -> None:
  """What the base has beside networks of ours: the files of its layout, each with its folder, as
  scheduler and tokenizer, and what else its index names (as feature_extractor).
  """
  layout = loading.family_of(config).layout
  files = [Path(file) for file in (*layout.files.values(), *hub.tokenizer_files(layout))]
  names = {str(file.parent) for file in files if file.parent != Path()}
  if layout.index and (base / layout.index).is_file():
    names |= {key for key in weights.read_config(base, layout.index) if not key.startswith("_")}
  for name in sorted(names - set(layout.networks)):
    if (base / name).is_dir():
      shutil.copytree(base / name, folder / name)  # follows the links of the hub's cache
  for file in files:
    if not (folder / file).exists():  # in the checkpoint's own folder, or in a network's
      _copy(base / file, folder / file)


def _copy_network(
  config: ConfigDict, base: Path, component: Component, sharding, target: Path
) -> None:
  """Copies a frozen network. A single weight file is copied as it is, under the plain name; weights
  in any other form are read and written anew.
  """
  location = loading.model_location(config)
  stored = not is_random(location) and any((base / component.folder).glob("*.safetensors"))
  place, variant, stem = base / component.folder, config.model.variant, component.table.file
  files = find_files(place, variant, stem) if stored else []
  if len(files) == 1:
    _copy(files[0], target / f"{component.table.file}.safetensors")
  else:  # shards, pickles, an Orbax tree, random weights
    tree = components.read_component(
      location, component, sharding, config.model.variant, config.model.allow_pickle
    )
    weights.save(target, component.table, tree)
  for path in (base / component.folder).iterdir():
    if path.is_file() and not path.name.endswith(_WEIGHTS) and ".index." not in path.name:
      _copy(path, target / path.name)


def _write_index(base: Path, folder: Path, name: str) -> None:
  """model_index.json without the parts whose folders aren't there: the hub's safety checker isn't
  fetched, for example.
  """
  index = weights.read_config(base, name)
  for part, value in index.items():
    if isinstance(value, list) and not (folder / part).is_dir():
      index[part] = [None, None]
  if "requires_safety_checker" in index or "safety_checker" in index:
    index["requires_safety_checker"] = (folder / "safety_checker").is_dir()
  (folder / name).write_text(json.dumps(index, indent=2) + "\n")

"""From a checkpoint's name in a config to a network's parameters on the devices: models and rewards
alike.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax

from dancegrpo_jax.checkpoints import hub, store, weights
from dancegrpo_jax.data.t5_tokenizer import load_t5_tokenizer
from dancegrpo_jax.data.tokenizer import load_tokenizer
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.pipelines.base import Component
from dancegrpo_jax.types import PyTree


def folder_of(field: str, name: str, module: ModuleType, variant: str = "") -> Path:
  """The local folder of a checkpoint, which is fetched from the hub where it must be. ConfigError
  where that fails.
  """
  return hub.folder(field, name, hub.layout_of(module), variant)


def location_of(name: str, folder: Path) -> str:
  """A checkpoint's folder as `read_component` takes it: random weights stay marked as such."""
  return f"{hub.RANDOM}{folder}" if hub.is_random(name) else str(folder)


def read_jsons(folder: Path, module: ModuleType) -> dict[str, dict]:
  """The JSON files that a family or a reward names."""
  return {
    name: weights.read_config(folder / Path(file).parent, Path(file).name)
    for name, file in module.FILES.items()
  }


def read_files(folder: Path, module: ModuleType) -> tuple[dict[str, dict], dict[str, Callable]]:
  """The JSON files and tokenizers that a family names."""
  layout = hub.layout_of(module)
  tokenizers = {name: load_tokenizer(str(folder / name)) for name in layout.tokenizers}
  tokenizers |= {name: load_t5_tokenizer(str(folder / name)) for name in layout.t5_tokenizers}
  return read_jsons(folder, module), tokenizers


def placed(tree: PyTree, shardings: PyTree) -> PyTree:
  """`jax.ShapeDtypeStruct`s of a tree's shapes and dtypes with shardings, as
  `checkpoint.restore_fields` wants them.
  """
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
  )


def identity(location: str, component: Component, variant: str = "") -> dict:
  """What tells one network from another: its config.json and its weights' fingerprint. ConfigError
  where they are missing.

  Of an imported Orbax tree, all networks together: another denoiser then counts as another encoder.
  """
  folder = Path(location.removeprefix(hub.RANDOM))
  try:
    described = {"config": weights.read_config(folder / component.folder)}
    if hub.is_random(location):
      return described | {"weights": "random"}
    if (folder / hub.ORBAX).is_dir():
      files = sorted(file for file in (folder / hub.ORBAX).rglob("*") if file.is_file())
    else:
      files = weights.files(folder / component.folder, variant)
    return described | {"weights": weights.fingerprint(files)}
  except weights.ConversionError as error:
    raise ConfigError(str(error)) from error


def read_component(
  location: str,
  component: Component,
  sharding: PyTree | jax.sharding.Sharding,
  variant: str = "",
  allow_pickle: bool = False,
) -> PyTree:
  """One network's parameters, each device its share.

  Args:
    location: the checkpoint's folder: of weight files, of an imported Orbax tree, or
      "random:FOLDER".
    component: what to read.
    sharding: one for all, or a tree of them.
    variant: which weight files to prefer, as "fp16".
    allow_pickle: whether torch's weights_only loader may read pickled ones.

  Raises:
    ConfigError: missing, truncated or misfitting weights, all of them named.
  """
  folder = Path(location)
  if hub.is_random(location):
    return weights.draw(component.abstract, sharding)
  if (folder / hub.ORBAX).is_dir():
    one = isinstance(sharding, jax.sharding.Sharding)
    abstract = placed(
      component.abstract, jax.tree.map(lambda _: sharding, component.abstract) if one else sharding
    )
    return store.restore_fields(folder / hub.ORBAX, {component.folder: abstract})[component.folder]
  try:
    return weights.load(
      folder / component.folder,
      component.table,
      component.abstract,
      sharding,
      variant=variant,
      allow_pickle=allow_pickle,
    )
  except weights.ConversionError as error:
    raise ConfigError(str(error)) from error

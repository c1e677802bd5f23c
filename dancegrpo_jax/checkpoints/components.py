"""From a checkpoint's name in a config to a network's parameters on the devices: models and rewards
alike.
"""

from collections.abc import Callable
from pathlib import Path

import jax

from dancegrpo_jax.checkpoints import hub, store, weights
from dancegrpo_jax.data.tokenizers import kind_of
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.pipelines.layout import RANDOM, Component, Layout, is_random
from dancegrpo_jax.types import PyTree


def read_jsons(folder: Path, layout: Layout) -> dict[str, dict]:
  """The JSON files of a layout, by their names there."""
  return {
    name: weights.read_config(folder / Path(file).parent, Path(file).name)
    for name, file in layout.files.items()
  }


def read_tokenizers(folder: Path, layout: Layout) -> dict[str, Callable]:
  """The tokenizers of a layout, by their folders."""
  return {
    place: kind_of(named).load(str(folder / place)) for place, named in layout.tokenizers.items()
  }


def placed(tree: PyTree, shardings: PyTree) -> PyTree:
  """`jax.ShapeDtypeStruct`s of a tree's shapes and dtypes with shardings, as
  `store.restore_fields` wants them.
  """
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
  )


def identity(location: str, component: Component, variant: str = "") -> dict:
  """What tells one network from another: its config.json and its weights' fingerprint. ConfigError
  where they are missing.

  Of an imported Orbax tree, all networks together: another denoiser then counts as another encoder.
  """
  folder = Path(location.removeprefix(RANDOM))
  try:
    described = {"config": weights.read_config(folder / component.folder)}
    if is_random(location):
      return described | {"weights": "random"}
    if (folder / hub.ORBAX).is_dir():
      files = sorted(file for file in (folder / hub.ORBAX).rglob("*") if file.is_file())
    else:
      files = weights.files(folder / component.folder, variant, component.table.file)
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
  if is_random(location):
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

"""Reads the parts of a checkpoint that a config names, for models and for rewards: JSON files,
tokenizers, and each network's parameters onto the devices.
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
  """The contents of the JSON files of a layout, by the names that the layout gives them."""
  return {
    name: weights.read_config(folder / Path(file).parent, Path(file).name)
    for name, file in layout.files.items()
  }


def read_tokenizers(folder: Path, layout: Layout) -> dict[str, Callable]:
  """The tokenizers of a layout, by the folders that they lie in."""
  return {
    place: kind_of(kind).load(str(folder / place)) for place, kind in layout.tokenizers.items()
  }


def placed(tree: PyTree, shardings: PyTree) -> PyTree:
  """A tree's shapes and dtypes with shardings, as `jax.ShapeDtypeStruct`s for
  `store.restore_fields`.
  """
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
  )


def identity(location: str, component: Component, variant: str = "") -> dict:
  """What tells one network from another: its config.json and a fingerprint of its weights.

  The fingerprint of an imported Orbax tree is of all its networks together, so that another
  denoiser counts as another encoder too.

  Args:
    location: as in `read_component`.
    component: the network.
    variant: which weight files to prefer, as "fp16".

  Returns:
    JSON values.

  Raises:
    ConfigError: the files are missing.
  """
  folder = Path(location.removeprefix(RANDOM))
  try:
    config = weights.read_config(folder / component.folder)
    if is_random(location):
      return {"config": config, "weights": "random"}
    if (folder / hub.ORBAX).is_dir():
      files = sorted(file for file in (folder / hub.ORBAX).rglob("*") if file.is_file())
    else:
      files = weights.files(folder / component.folder, variant, component.table.file)
    return {"config": config, "weights": weights.fingerprint(files)}
  except weights.ConversionError as error:
    raise ConfigError(str(error)) from error


def read_component(
  location: str,
  component: Component,
  sharding: PyTree | jax.sharding.Sharding,
  variant: str = "",
  allow_pickle: bool = False,
) -> PyTree:
  """Reads one network's parameters; each device gets its share.

  Args:
    location: the checkpoint's folder, with weight files or with an imported Orbax tree; or
      "random:FOLDER".
    component: the network.
    sharding: one for all parameters, or a tree of them.
    variant: which weight files to prefer, as "fp16".
    allow_pickle: whether torch's weights_only loader may read pickled weight files.

  Raises:
    ConfigError: weights are missing, truncated or do not fit; the message names all of them.
  """
  folder = Path(location)
  if is_random(location):
    return weights.draw(component.abstract, sharding, table=component.table)
  if (folder / hub.ORBAX).is_dir():
    if isinstance(sharding, jax.sharding.Sharding):
      sharding = jax.tree.map(lambda _: sharding, component.abstract)
    fields = {component.folder: placed(component.abstract, sharding)}
    return store.restore_fields(folder / hub.ORBAX, fields)[component.folder]
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

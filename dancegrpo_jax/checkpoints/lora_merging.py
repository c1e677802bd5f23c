"""Adds the adapters of a LoRA file to the weights of their network."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dancegrpo_jax.checkpoints import lora_files, lora_names, weights
from dancegrpo_jax.checkpoints.networks import table_of
from dancegrpo_jax.checkpoints.safetensors_io import Reader
from dancegrpo_jax.conversion.mapping import plan
from dancegrpo_jax.conversion.table import Table, expected_sources
from dancegrpo_jax.conversion.transfer import Slices, import_slice
from dancegrpo_jax.types import PyTree


def merged(
  params: PyTree, table: Table | str, path: str | Path, strength: float = 1.0
) -> tuple[PyTree, tuple[str, ...]]:
  """A network's parameters with a LoRA file added: W + strength * scale * B A for every dense layer
  and every convolution that the file adapts.

  Each layer may have a rank and an alpha of its own.

  Args:
    params: tree of arrays.
    table: the network's table, or its name.
    path: a LoRA file, or its folder.
    strength: 1 is the strength at which the adapters were trained.

  Returns:
    The tree, in which changed parameters are float32, and lines for the user about the file.

  Raises:
    ConversionError: one line: the file holds no adapters, those of another model, or adapters of a
      kind that is not implemented.
  """
  network, file = table_of(table), lora_files.find(path)
  targets = weights.specs(params)
  mapping = plan(network, expected_sources(network, targets), targets)
  layers, flat = lora_names.layers_of(network, targets), flatten_dict(params, sep="/")
  with Reader([file]) as reader:
    content = lora_files.read(file, layers, reader)

    def change(name: str, index: Slices) -> np.ndarray:
      """A part of what is added to the tensor of this name."""
      adapter = content.adapters.get(name.removesuffix(".weight"))
      shape = mapping.sources[name].shape
      if adapter is None:
        return np.zeros(shape, np.float32)[index]
      down, up = lora_files.factors(reader, adapter)
      return (np.float32(strength * adapter.scale) * (up @ down)).reshape(shape)[index]

    for target, spec in targets.items():
      modules = {block.source.removesuffix(".weight") for block in mapping.by_target[target]}
      if modules & content.adapters.keys():
        whole = (slice(None),) * len(spec.shape)
        added = import_slice(mapping, target, whole, change, np.float32)
        flat[target] = flat[target].astype(jnp.float32) + added
  return unflatten_dict(flat, sep="/"), content.notes

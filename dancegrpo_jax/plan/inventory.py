"""A run's calls for a model without weights: what plan compiles.

Everything is as in train: the same pipeline, the same `programs.build`, the same list of calls, the
same shardings; only that every array is a `jax.ShapeDtypeStruct` and the tokenizers are stand-ins
of the right length.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax import installation, programs
from dancegrpo_jax.assembly import loading, reward_builders
from dancegrpo_jax.assembly.loading import Model
from dancegrpo_jax.checkpoints import components, hub
from dancegrpo_jax.compilation.calls import Call, of_run
from dancegrpo_jax.pipelines.layout import Layout, local_path
from dancegrpo_jax.rewards import kinds
from dancegrpo_jax.types import PyTree

# JSON files of hub ids that the configs name
PUBLISHED = installation.ROOT / "assets" / "published"


class Inventory(NamedTuple):
  """What a run compiles and what it keeps.

  Attributes:
    calls: in the order of an iteration.
    kept: by name, the arrays that stay in memory while programs run, as they stand when the last
      chunk has been scored.
    model: its functions and abstract parameters.
  """

  calls: list[Call]
  kept: dict[str, PyTree]
  model: Model


def without_weights(config: ConfigDict) -> ConfigDict:
  """The config with "random:FOLDER" in the place of each checkpoint: nothing but JSON files is
  read.

  Raises:
    ConfigError: they are not there.
  """
  layout = loading.family_of(config).layout

  def describe(field: str, name: str, layout: Layout) -> str:
    return hub.described(field, name, layout, PUBLISHED)

  with (config := config.copy_and_resolve_references()).unlocked():
    config.model.checkpoint = describe("model.checkpoint", config.model.checkpoint, layout)
    for term, _ in config.reward.terms:
      kind = reward_builders.kind_of(kinds.reward_of(term))
      if kind.section:
        section = config.reward[kind.section]
        section.update(kind.blank(section, describe, PUBLISHED))
  return config.lock()


def blank(length: int) -> Callable:
  """A tokenizer's stand-in: the right shapes, no text."""
  return lambda texts, count=length: np.zeros((len(texts), count), np.int32)


def outline(config: ConfigDict, mesh: jax.sharding.Mesh) -> Model:
  """The model and rewards of a config that `without_weights` made.

  Raises:
    ConfigError: as `loading.build_pipeline` and `load`.
  """
  family = loading.family_of(config)
  folder, layout = local_path(config.model.checkpoint), family.layout
  jsons = components.read_jsons(folder, layout)
  if hub.missing(folder, layout._replace(networks=())):  # published files have no tokenizers
    tokenizers = dict.fromkeys(layout.tokenizers, blank(family.text_length(jsons)))
  else:
    tokenizers = components.read_tokenizers(folder, layout)
  pipeline = loading.pipeline_of(config, jsons, tokenizers)
  stand_in = reward_builders.FILES._replace(
    tokenizer=lambda field, source, network: blank(text_length(network))
  )
  rewards = reward_builders.build_rewards(config, stand_in)
  return loading.outline(config, pipeline, rewards, mesh)


def text_length(network: dict) -> int:
  """Tokens that a CLIP's text tower takes."""
  return network.get("text_config", {}).get("max_position_embeddings", 77)


def take(config: ConfigDict, mesh: jax.sharding.Mesh, examples: int, held_out: int) -> Inventory:
  """All programs of a run.

  Args:
    config: validated; see `without_weights`.
    mesh: the devices; enter it to trace or compile the programs.
    examples: prompts in the data set.
    held_out: prompts in data.held_out.
  """
  # Before the mesh is entered: keys and zeros are computed on the way, which devices that aren't
  # there can't.
  model = outline(config, mesh)
  state = loading.abstract_state(config, model, mesh, examples)
  with jax.set_mesh(mesh):
    run = programs.build(
      config, model.pipeline, model.rewards, mesh, jax.tree.map(lambda x: x.sharding, state)
    )
    return Inventory(*of_run(config, model, state, run, examples, held_out), model)


def kept_bytes(inventory: Inventory, call: Call | None = None) -> int:
  """What stays in a device's memory beside a program's own arguments; all that is kept without
  one.
  """
  own = {id(leaf) for leaf in jax.tree.leaves(call.arguments)} if call else set()
  freed, extra = (call.freed, call.extra) if call else ((), ())
  there = {name: tree for name, tree in inventory.kept.items() if name not in freed}
  kept = [leaf for leaf in jax.tree.leaves((there, extra)) if id(leaf) not in own]
  return sum(map(loading.device_bytes, kept))

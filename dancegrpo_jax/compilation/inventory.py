"""The program calls of a run whose model has no weights. `plan` compiles them.

Pipeline, programs, calls and shardings are those of `train`. Only the arrays are
`jax.ShapeDtypeStruct`s, and the tokenizers are stand-ins that return tokens of the right shape.
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

# The config.json files of the hub ids that the recipes name.
PUBLISHED = installation.ROOT / "assets" / "published"


class Inventory(NamedTuple):
  """What a run compiles, and what it keeps in memory.

  Attributes:
    calls: the program calls, in the order of an iteration.
    kept: the arrays that stay in memory while programs run, by name, as of the moment when the last
      chunk has been scored.
    model: the model, with abstract parameters.
  """

  calls: list[Call]
  kept: dict[str, PyTree]
  model: Model


def without_weights(config: ConfigDict) -> ConfigDict:
  """The config with "random:FOLDER" in place of each checkpoint, so that only JSON files are read.

  Raises:
    ConfigError: a checkpoint's JSON files cannot be found.
  """
  layout = loading.family_of(config).layout

  def describe(field: str, name: str, layout: Layout) -> str:
    return hub.described(field, name, layout, PUBLISHED)

  with (config := config.copy_and_resolve_references()).unlocked():
    config.model.checkpoint = describe("model.checkpoint", config.model.checkpoint, layout)
    for term in kinds.scored(config):
      kind = reward_builders.kind_of(kinds.reward_of(term))
      if kind.section:
        section = config.reward[kind.section]
        section.update(kind.blank(section, describe, PUBLISHED))
  return config.lock()


def blank(length: int) -> Callable:
  """A stand-in for a tokenizer that returns `length` tokens of each text, all 0."""
  return lambda texts, count=length: np.zeros((len(texts), count), np.int32)


def outline(config: ConfigDict, mesh: jax.sharding.Mesh) -> Model:
  """The model and rewards with abstract parameters.

  Args:
    config: the result of `without_weights`.
    mesh: the devices.

  Raises:
    ConfigError: as `loading.build_pipeline` and `loading.load`.
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
  reward_builders.require_scorable(rewards, pipeline.sample_shape)
  return loading.outline(config, pipeline, rewards, mesh)


def text_length(network: dict) -> int:
  """Tokens that the text encoder of a CLIP takes, from its config.json."""
  return network.get("text_config", {}).get("max_position_embeddings", 77)


def take(config: ConfigDict, mesh: jax.sharding.Mesh, examples: int, held_out: int) -> Inventory:
  """All programs of a run.

  Args:
    config: the result of `without_weights`, validated.
    mesh: the devices. Programs are traced and compiled inside of it.
    examples: prompts in the data set.
    held_out: prompts in data.held_out.
  """
  # The model is made before the mesh is entered, because keys and zeros are computed for it, which
  # the devices of a topology cannot do.
  model = outline(config, mesh)
  state = loading.abstract_state(config, model, mesh, examples)
  with jax.set_mesh(mesh):
    run = programs.build(
      config, model.pipeline, model.rewards, mesh, jax.tree.map(lambda x: x.sharding, state)
    )
    return Inventory(*of_run(config, model, state, run, examples, held_out), model)


def kept_bytes(inventory: Inventory, call: Call | None = None) -> int:
  """Bytes that stay in a device's memory while a program runs, beside the program's arguments.

  Args:
    inventory: of the run.
    call: the program; None for all that is kept between programs.
  """
  arguments = {id(leaf) for leaf in jax.tree.leaves(call.arguments)} if call else set()
  freed, extra = (call.freed, call.extra) if call else ((), ())
  kept = {name: tree for name, tree in inventory.kept.items() if name not in freed}
  leaves = [leaf for leaf in jax.tree.leaves((kept, extra)) if id(leaf) not in arguments]
  return sum(map(loading.device_bytes, leaves))

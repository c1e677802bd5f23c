"""A run's calls for a model without weights: what plan compiles.

Everything is as in train: the same pipeline, the same `programs.build`, the same list of calls, the
same shardings; only that every array is a `jax.ShapeDtypeStruct` and the tokenizers are stand-ins
of the right length.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax import programs
from dancegrpo_jax.assembly import loading, reward_builders
from dancegrpo_jax.assembly.loading import Model
from dancegrpo_jax.checkpoints import components, hub
from dancegrpo_jax.compilation.calls import Call, of_run
from dancegrpo_jax.rewards import clip, pickscore
from dancegrpo_jax.types import PyTree

PUBLISHED = (
  Path(__file__).parents[2] / "assets" / "published"
)  # JSON files of hub ids that the configs name


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
  read. ConfigError: not there.
  """
  family, reward = loading.FAMILIES[config.model.family], config.reward
  terms = {term.split("/")[0] for term, _ in reward.terms}
  with (config := config.copy_and_resolve_references()).unlocked():
    config.model.checkpoint = hub.described(
      "model.checkpoint", config.model.checkpoint, hub.layout_of(family), PUBLISHED
    )
    if "clip" in terms:
      config.reward.clip.checkpoint = _clip("reward.clip.checkpoint", reward.clip.checkpoint)
    if "aesthetic" in terms:
      checkpoint = _clip("reward.aesthetic.checkpoint", reward.aesthetic.checkpoint)
      config.reward.aesthetic.update(checkpoint=checkpoint, head=hub.RANDOM)
    if "pickscore" in terms:
      name, layout = reward.pickscore.checkpoint, hub.layout_of(pickscore)
      config.reward.pickscore.checkpoint = hub.described(
        "reward.pickscore.checkpoint", name, layout, PUBLISHED
      )
    if (
      "hps" in terms
    ):  # a file of weights alone: the network is the published one unless a folder says otherwise
      path = Path(reward.hps.checkpoint.removeprefix(hub.RANDOM))
      config.reward.hps.checkpoint = f"{hub.RANDOM}{path if path.exists() else PUBLISHED}"
  return config.lock()


def _clip(field: str, name: str) -> str:
  """A CLIP in transformers' layout, or a folder in open_clip's."""
  if (Path(name.removeprefix(hub.RANDOM)) / clip.OPEN_CLIP_FILE).is_file():
    return f"{hub.RANDOM}{name.removeprefix(hub.RANDOM)}"
  return hub.described(field, name, hub.layout_of(clip), PUBLISHED)


def blank(length: int) -> Callable:
  """A tokenizer's stand-in: the right shapes, no text."""
  return lambda texts, count=length: np.zeros((len(texts), count), np.int32)


def outline(config: ConfigDict, mesh: jax.sharding.Mesh) -> Model:
  """The model and rewards of a config that `without_weights` made. ConfigError as
  `loading.build_pipeline` and `load`.
  """
  family = loading.FAMILIES[config.model.family]
  jsons = components.read_jsons(Path(config.model.checkpoint.removeprefix(hub.RANDOM)), family)
  layout = hub.layout_of(family)
  tokenizer = blank(
    jsons["text_encoder"].get("max_position_embeddings", 77)
  )  # transformers' default
  pipeline = loading.pipeline_of(
    config, jsons, dict.fromkeys([*layout.tokenizers, *layout.t5_tokenizers], tokenizer)
  )
  rewards = reward_builders.build_rewards(
    config, lambda field, name, network: blank(text_length(network))
  )
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

"""The programs of an iteration with the shapes that they are called with, for a model without weights: what plan compiles.

Everything is as in train: the same pipeline, the same `programs.build`, the same shardings; only that every array is a
`jax.ShapeDtypeStruct` and the tokenizers are stand-ins of the right length. What a program returns, shapes and shardings, goes
into the next one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax import components, loading, programs, scoring
from dancegrpo_jax.loading import Model
from dancegrpo_jax.rewards import clip, pickscore
from dancegrpo_jax.rl.state import TrainState
from dancegrpo_jax.runtime import hub
from dancegrpo_jax.train import deal
from dancegrpo_jax.types import Conditioning, Example, PyTree

PUBLISHED = Path(__file__).parent.parent / "assets" / "published"  # JSON files of hub ids that the configs name


class Call(NamedTuple):
  """A program as an iteration calls it.

  Attributes:
    name: of the program.
    program: jitted.
    arguments: abstract.
    times: calls in the run.
  """

  name: str
  program: Callable
  arguments: tuple
  times: float | int


class Inventory(NamedTuple):
  """What a run compiles and what it keeps.

  Attributes:
    calls: in the order of an iteration.
    kept: by name, the arrays that stay in memory while programs run: those of the last chunk's end.
    model: its functions and abstract parameters.
  """

  calls: list[Call]
  kept: dict[str, PyTree]
  model: Model


def without_weights(config: ConfigDict) -> ConfigDict:
  """The config with "random:FOLDER" in the place of each checkpoint: nothing but JSON files is read. ConfigError: not there."""
  family, reward = loading.FAMILIES[config.model.family], config.reward
  terms = {term.split("/")[0] for term, _ in reward.terms}
  with (config := config.copy_and_resolve_references()).unlocked():
    config.model.checkpoint = hub.described("model.checkpoint", config.model.checkpoint, hub.layout_of(family), PUBLISHED)
    if "clip" in terms:
      config.reward.clip.checkpoint = _clip("reward.clip.checkpoint", reward.clip.checkpoint)
    if "aesthetic" in terms:
      checkpoint = _clip("reward.aesthetic.checkpoint", reward.aesthetic.checkpoint)
      config.reward.aesthetic.update(checkpoint=checkpoint, head=hub.RANDOM)
    if "pickscore" in terms:
      name, layout = reward.pickscore.checkpoint, hub.layout_of(pickscore)
      config.reward.pickscore.checkpoint = hub.described("reward.pickscore.checkpoint", name, layout, PUBLISHED)
    if "hps" in terms:  # a file of weights alone: the network is the published one unless a folder says otherwise
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
  """The model and rewards of a config that `without_weights` made. ConfigError as `loading.build_pipeline` and `load`."""
  family = loading.FAMILIES[config.model.family]
  jsons = components.read_jsons(Path(config.model.checkpoint.removeprefix(hub.RANDOM)), family)
  layout = hub.layout_of(family)
  tokenizer = blank(jsons["text_encoder"].get("max_position_embeddings", 77))  # transformers' default
  pipeline = loading.pipeline_of(config, jsons, dict.fromkeys([*layout.tokenizers, *layout.t5_tokenizers], tokenizer))
  rewards = scoring.build_rewards(config, lambda field, name, network: blank(_text_length(network)))
  return loading.outline(config, pipeline, rewards, mesh)


def _text_length(network: dict) -> int:
  return network.get("text_config", {}).get("max_position_embeddings", 77)


def abstract(tree: PyTree, sharding: jax.sharding.Sharding | None = None) -> PyTree:
  """Shapes and dtypes; host arrays have no sharding, as when train passes them."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.result_type(x), sharding=sharding), tree)


def take(config: ConfigDict, mesh: jax.sharding.Mesh, examples: int, held_out: int) -> Inventory:
  """All programs of a run.

  Args:
    config: validated; see `without_weights`.
    mesh: the devices; enter it to trace or compile the programs.
    examples: prompts in the data set.
    held_out: prompts in data.held_out.
  """
  # Before the mesh is entered: keys and zeros are computed on the way, which devices that aren't there can't.
  model = outline(config, mesh)
  state = loading.abstract_state(config, model, mesh, examples)
  with jax.set_mesh(mesh):
    return _take(config, model, state, mesh, examples, held_out)


def _take(
  config: ConfigDict, model: Model, state: TrainState, mesh: jax.sharding.Mesh, examples: int, held_out: int
) -> Inventory:
  run = programs.build(config, model.pipeline, model.rewards, mesh, jax.tree.map(lambda x: x.sharding, state))
  prompts, group, lanes = config.data.prompts_per_iteration, config.rollout.samples_per_prompt, config.mesh.lanes
  chunks = deal(prompts * group, config.rollout.chunk, lanes)
  shown = min(config.evaluation.prompts, examples) + min(config.evaluation.prompts, held_out)
  shown = abstract(np.zeros(-(-shown // lanes) * lanes, np.int32))
  shows = config.iterations // config.evaluation.every + 1 if config.evaluation.every else 2
  ids, number, chunk = (abstract(x) for x in (np.zeros(prompts, np.int32), np.int32(0), chunks[0]))

  cached, pipeline = config.data.cache_embeddings, model.pipeline
  encoders = {name: model.frozen[name] for name in pipeline.encoders}
  frozen = {name: tree for name, tree in model.frozen.items() if not (cached and name in encoders)}
  calls, texts = [], 1 + (config.sampler.guidance_scale != 1.0)
  reading = (encoders if cached else model.frozen, abstract(pipeline.tokenize([""] * prompts)))
  calls.append(Call("encode", run.encode, reading, texts * (examples / prompts if cached else config.iterations)))

  def conditioning(rows: int) -> Conditioning:
    branches = [jax.eval_shape(run.encode, reading[0], abstract(pipeline.tokenize([""] * rows))) for _ in range(texts)]
    return Conditioning(*branches, *(None,) * (2 - texts))

  rows = conditioning(prompts)
  trainable, every_chunk = state.trainable, len(chunks) * config.iterations
  arguments = (trainable, frozen, rows, ids, chunk, number)
  calls.append(Call("rollout", run.rollout, arguments, every_chunk))
  rollouts = tuple(_copy(jax.eval_shape(run.rollout, *arguments)) for _ in chunks)
  calls.append(Call("decode", run.decode, (frozen, rollouts[-1].sample), every_chunk))
  pixels = jax.eval_shape(run.decode, *calls[-1].arguments)
  calls += _scoring(config, model, run, pixels, examples, chunk, every_chunk)
  parts = [jax.eval_shape(call.program, *call.arguments) for call in calls if call.name.startswith("score ")]
  on_device = {term: [score] * len(chunks) for scores in parts for term, score in scores.items()}
  on_host = abstract([np.zeros(prompts * group, np.float32)])  # of all chunks, see scoring.from_host
  scores = {term: on_device.get(term, on_host) for term, _ in config.reward.terms}
  calls.append(Call("join", run.join, (scores, abstract(np.zeros(prompts * group, np.int32))), config.iterations))
  scores = jax.eval_shape(run.join, *calls[-1].arguments)
  calls.append(Call("advantages", run.advantages, (scores, ids, state.prompt_stats), config.iterations))
  advantage, weight, chosen, _, _ = jax.eval_shape(run.advantages, *calls[-1].arguments)
  reference = None
  if config.objective.kl.weight:
    reference = {} if config.lora.rank else _copy(trainable)
  arguments = (state, frozen, reference, rows, ids, rollouts, advantage, weight, chosen, number)
  calls.append(Call("update", run.update, arguments, config.iterations))
  arguments = (trainable, frozen, conditioning(shown.shape[0]), shown, shown, number)
  calls.append(Call("sample", run.sample, arguments, shows))
  kept = {
    "trained weights": state.trainable, "optimizer": state.opt_state, "average": state.ema, "frozen weights": frozen,
    "reference": reference, "rewards": model.reward_params, "conditioning": rows, "trajectories": rollouts, "pixels": pixels,
  }  # fmt: skip
  return Inventory(calls, kept, model)


def _scoring(
  config: ConfigDict, model: Model, run: programs.Programs, pixels: Any, examples: int, chunk: Any, times: int
) -> list[Call]:
  """The programs of the rewards that are networks."""
  calls, prompts = [], config.data.prompts_per_iteration
  for name, program in run.features.items():
    prepared = abstract(model.rewards[name].prepare([Example(0, "")] * prompts))
    calls.append(Call(f"features {name}", program, (model.reward_params[name], prepared), -(-examples // prompts)))
    features = abstract(jax.eval_shape(program, *calls[-1].arguments))
    calls.append(Call(f"score {name}", run.score[name], (model.reward_params[name], pixels, features, chunk), times))
  return calls


def _copy(tree: PyTree) -> PyTree:
  """The same shapes as arrays of their own."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def kept_bytes(inventory: Inventory, call: Call | None = None) -> int:
  """What stays in a device's memory beside a program's own arguments; all that is kept without one."""
  own = {id(leaf) for leaf in jax.tree.leaves(call.arguments)} if call else set()
  kept = [leaf for leaf in jax.tree.leaves(inventory.kept) if id(leaf) not in own]
  return sum(map(loading.device_bytes, kept))

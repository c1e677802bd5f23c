"""From a config to a model and its rewards in memory: what train, sample and evaluate have in common."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from dancegrpo_jax import programs
from dancegrpo_jax.data.t5_tokenizer import load_t5_tokenizer
from dancegrpo_jax.data.tokenizer import load_tokenizer
from dancegrpo_jax.pipelines import flux, stable_diffusion
from dancegrpo_jax.pipelines.base import Component, Pipeline
from dancegrpo_jax.rewards import aesthetic, clip, compressibility, hps, pickscore, remote
from dancegrpo_jax.rewards import callable as python_function
from dancegrpo_jax.rewards.base import Reward
from dancegrpo_jax.rl.state import TrainState
from dancegrpo_jax.runtime import checkpoint, hub, weights
from dancegrpo_jax.runtime import mesh as meshes
from dancegrpo_jax.runtime.config import ConfigError
from dancegrpo_jax.types import Conditioning, Example, PyTree

FAMILIES = {"stable_diffusion": stable_diffusion, "flux": flux}


class Model(NamedTuple):
  """A pipeline and rewards with their weights.

  Attributes:
    pipeline: functions.
    frozen: parameters by component, without the trained one.
    trainable: `{component: parameters}`, float32: the base model's.
    rewards: by name.
    reward_params: by reward, {} where it has none.
    shardings: of `trainable`.
  """

  pipeline: Pipeline
  frozen: PyTree
  trainable: PyTree
  rewards: dict[str, Reward]
  reward_params: dict[str, PyTree]
  shardings: PyTree


def _folder(field: str, name: str, module: ModuleType, variant: str = "") -> Path:
  """The local folder of a checkpoint, which is fetched from the hub where it must be. ConfigError where that fails."""
  return hub.folder(field, name, hub.layout_of(module), variant)


def _location(name: str, folder: Path) -> str:
  """A checkpoint's folder as `read_component` takes it: random weights stay marked as such."""
  return f"{hub.RANDOM}{folder}" if hub.is_random(name) else str(folder)


def _jsons(folder: Path, module: ModuleType) -> dict[str, dict]:
  """The JSON files that a family or a reward names."""
  return {name: weights.read_config(folder / Path(file).parent, Path(file).name) for name, file in module.FILES.items()}


def _read(folder: Path, module: ModuleType) -> tuple[dict[str, dict], dict[str, Callable]]:
  """The JSON files and tokenizers that a family names."""
  layout = hub.layout_of(module)
  tokenizers = {name: load_tokenizer(str(folder / name)) for name in layout.tokenizers}
  return _jsons(folder, module), tokenizers | {name: load_t5_tokenizer(str(folder / name)) for name in layout.t5_tokenizers}


def _family_options(config: ConfigDict) -> dict:
  """What the family's `build` takes besides the common values."""
  if config.model.family == "flux":
    m, guidance = config.model, config.sampler.embedded_guidance
    return {"scan_blocks": m.scan_blocks, "text_length": m.text_length, "guidance": guidance}
  return {}


def checkpoint_folder(config: ConfigDict) -> Path:
  """The local folder of config.model.checkpoint, whatever it names. ConfigError as `hub.folder`."""
  return _folder("model.checkpoint", config.model.checkpoint, FAMILIES[config.model.family], config.model.variant)


def model_location(config: ConfigDict) -> str:
  """config.model.checkpoint as `read_component` takes it."""
  return _location(config.model.checkpoint, checkpoint_folder(config))


def build_pipeline(config: ConfigDict) -> Pipeline:
  """The functions and abstract parameters of config.model, without its weights.

  Raises:
    ConfigError: a folder or file that is missing, or a network that is not implemented.
  """
  m = config.model
  folder, family = checkpoint_folder(config), FAMILIES[m.family]
  try:
    jsons, tokenizers = _read(folder, family)
    return family.build(
      jsons, tokenizers, size=m.size, dtype=m.dtype, frozen_dtype=m.frozen_dtype, remat=m.remat, attention=m.attention,
      **_family_options(config),
    )  # fmt: skip
  except (ValueError, FileNotFoundError) as error:
    raise ConfigError(str(error)) from error


def _is_open_clip(source: str) -> bool:
  """Whether a local folder is in open_clip's layout. LAION's are in both: transformers' then, where its weights are there."""
  folder = Path(source.removeprefix(hub.RANDOM))
  whole = (folder / clip.FILES["clip"]).is_file() and (hub.is_random(source) or any(folder.glob("model*.safetensors*")))
  return (folder / clip.OPEN_CLIP_FILE).is_file() and not whole


def _clip_checkpoint(field: str, source: str) -> clip.Checkpoint:
  """A CLIP in transformers' layout, or a local one in open_clip's."""
  if not _is_open_clip(source):
    folder = hub.folder(field, source, hub.layout_of(clip)._replace(tokenizers=()))
    return clip.transformers_checkpoint(_location(source, folder), _jsons(folder, clip))
  folder = hub.folder(field, source, hub.Layout((clip.OPEN_CLIP_FILE,), (), ("",)))
  # its own file: beside it may lie the same weights with transformers' names
  names = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
  place = next((folder / name for name in names if (folder / name).is_file()), folder)
  return clip.open_clip_checkpoint(_location(source, place), weights.read_config(folder, clip.OPEN_CLIP_FILE))


def _tokenizer(field: str, source: str) -> Callable:
  """The CLIP tokenizer of a folder or a hub id."""
  return load_tokenizer(str(hub.folder(field, source.removeprefix(hub.RANDOM), hub.Layout((), ("",), ()))))


def _weight_file(field: str, source: str) -> Path:
  """A weight file, or a folder with one. ConfigError where there is none."""
  path = Path(source.removeprefix(hub.RANDOM))
  if not path.exists():
    raise ConfigError(f"config.{field} = {source!r}: no such file (from {Path.cwd()}); configs/common.py says where to get it")
  return path


def _clip(config: ConfigDict) -> Reward:
  c = config.reward.clip
  checkpoint = _clip_checkpoint("reward.clip.checkpoint", c.checkpoint)
  tokenize = _tokenizer("reward.clip.tokenizer", c.tokenizer or c.checkpoint)
  return clip.build("clip", checkpoint, tokenize, config.model.frozen_dtype)


def _hps(config: ConfigDict) -> Reward:
  c = config.reward.hps
  place = _weight_file("reward.hps.checkpoint", c.checkpoint)
  folder = place if place.is_dir() else place.parent
  said = weights.read_config(folder, clip.OPEN_CLIP_FILE) if (folder / clip.OPEN_CLIP_FILE).is_file() else None
  tokenize = _tokenizer("reward.hps.tokenizer", c.tokenizer or str(folder))
  return clip.build("hps", hps.checkpoint(_location(c.checkpoint, place), said), tokenize, config.model.frozen_dtype)


def _pickscore(config: ConfigDict) -> Reward:
  c = config.reward.pickscore
  folder = _folder("reward.pickscore.checkpoint", c.checkpoint, pickscore)
  checkpoint = pickscore.checkpoint(_location(c.checkpoint, folder), _jsons(folder, pickscore)["clip"])
  tokenize = _tokenizer("reward.pickscore.tokenizer", c.tokenizer or c.checkpoint)
  return clip.build("pickscore", checkpoint, tokenize, config.model.frozen_dtype)


def _aesthetic(config: ConfigDict) -> Reward:
  c = config.reward.aesthetic
  checkpoint = _clip_checkpoint("reward.aesthetic.checkpoint", c.checkpoint)
  head = c.head if hub.is_random(c.head) else str(_weight_file("reward.aesthetic.head", c.head))
  return aesthetic.build(checkpoint, head, config.model.frozen_dtype)


REWARDS = {
  "clip": _clip,
  "hps": _hps,
  "pickscore": _pickscore,
  "aesthetic": _aesthetic,
  "compressibility": lambda config: compressibility.build(**config.reward.compressibility),
  "remote": lambda config: remote.build(**config.reward.remote),
}


def build_rewards(config: ConfigDict) -> dict[str, Reward]:
  """The rewards that config.reward.terms names, without weights; no other's files are looked at.

  Raises:
    ConfigError: a file that is missing, or a value in one that is not implemented.
  """
  rewards = {}
  for term, _ in config.reward.terms:
    name = term if ":" in term else term.split("/")[0]
    try:
      rewards[name] = REWARDS[name](config) if name in REWARDS else python_function.build(name)
    except (ValueError, FileNotFoundError) as error:
      raise ConfigError(str(error)) from error
  return rewards


def shardings_of(config: ConfigDict, pipeline: Pipeline, mesh: jax.sharding.Mesh) -> dict[str, PyTree]:
  """Where the parameters of each component go. ConfigError: a rule that does not fit."""
  abstract = {name: component.abstract for name, component in pipeline.components.items()}
  return meshes.infer_shardings(abstract, config.mesh.rules, mesh)


def placed(tree: PyTree, shardings: PyTree) -> PyTree:
  """`jax.ShapeDtypeStruct`s of a tree's shapes and dtypes with shardings, as `checkpoint.restore_fields` wants them."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def read_component(
  location: str,
  component: Component,
  sharding: PyTree | jax.sharding.Sharding,
  variant: str = "",
  allow_pickle: bool = False,
) -> PyTree:
  """One network's parameters, each device its share.

  Args:
    location: the checkpoint's folder: of weight files, of an imported Orbax tree, or "random:FOLDER".
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
    abstract = placed(component.abstract, jax.tree.map(lambda _: sharding, component.abstract) if one else sharding)
    return checkpoint.restore_fields(folder / hub.ORBAX, {component.folder: abstract})[component.folder]
  try:
    return weights.load(
      folder / component.folder, component.table, component.abstract, sharding, variant=variant, allow_pickle=allow_pickle
    )
  except weights.ConversionError as error:
    raise ConfigError(str(error)) from error


def read_reward(reward: Reward, sharding: jax.sharding.Sharding | None, allow_pickle: bool = False) -> dict[str, PyTree]:
  """A reward's parameters by component, {} where it has none. Arguments and errors are `read_component`'s."""
  return {
    name: read_component(component.folder, component._replace(folder=""), sharding, allow_pickle=allow_pickle)
    for name, component in reward.components.items()
  }


def load(config: ConfigDict, pipeline: Pipeline, rewards: dict[str, Reward], mesh: jax.sharding.Mesh) -> Model:
  """Reads every weight, each device its share.

  Raises:
    ConfigError: a checkpoint that is missing, truncated or does not fit; a sharding rule that does not.
  """
  shardings, whole = shardings_of(config, pipeline, mesh), meshes.replicated(mesh)
  location = model_location(config)
  params = {
    name: read_component(location, component, shardings[name], config.model.variant, config.model.allow_pickle)
    for name, component in pipeline.components.items()
  }
  reward_params = {name: read_reward(reward, whole, config.model.allow_pickle) for name, reward in rewards.items()}
  name = pipeline.trainable
  frozen = {key: value for key, value in params.items() if key != name}
  return Model(pipeline, frozen, {name: params[name]}, rewards, reward_params, {name: shardings[name]})


def state_shardings(config: ConfigDict, model: Model, num_prompts: int, mesh: jax.sharding.Mesh) -> TrainState:
  """Shardings of the TrainState: optimizer and EMA follow their parameters."""
  whole = meshes.replicated(mesh)
  abstract = jax.eval_shape(programs.init_state(config, num_prompts, None), model.trainable)
  everywhere = jax.tree.map(lambda _: whole, abstract)
  optimizer = optax.tree.map_params(
    programs.optimizer_of(config), lambda _, sharding: sharding, abstract.opt_state, model.shardings,
    transform_non_params=lambda _: whole,
  )  # fmt: skip
  ema = None if abstract.ema is None else model.shardings
  return everywhere._replace(trainable=model.shardings, opt_state=optimizer, ema=ema)


def conditioning(config: ConfigDict, model: Model, encode: Callable, examples: list[Example]) -> Conditioning:
  """One row an example; the negative branch only where guidance needs it."""
  positive = encode(model.frozen, model.pipeline.tokenize([e.prompt for e in examples]))
  if config.sampler.guidance_scale == 1.0:
    return Conditioning(positive, None)
  return Conditioning(positive, encode(model.frozen, model.pipeline.tokenize([e.negative_prompt for e in examples])))


def reward_features(model: Model, features: dict[str, Callable], examples: list[Example], rows: int) -> dict[str, PyTree]:
  """Every device reward's features of all prompts, computed once, `rows` prompts a call.

  Args:
    model: with rewards.
    features: compiled, from `Programs`.
    examples: the data set.
    rows: prompts of one call.

  Returns:
    By reward, a pytree of host arrays with one row an example.
  """
  padded = examples + [examples[-1]] * (-len(examples) % rows)
  result = {}
  for name, compute in features.items():
    prepared = model.rewards[name].prepare(padded)
    parts = [
      jax.device_get(compute(model.reward_params[name], jax.tree.map(lambda x, i=i: x[i : i + rows], prepared)))
      for i in range(0, len(padded), rows)
    ]
    result[name] = jax.tree.map(lambda *x: np.concatenate(x)[: len(examples)], *parts)
  return result



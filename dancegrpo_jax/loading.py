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
from dancegrpo_jax.data.tokenizer import load_tokenizer
from dancegrpo_jax.pipelines import stable_diffusion
from dancegrpo_jax.pipelines.base import Component, Pipeline
from dancegrpo_jax.rewards import callable as python_function
from dancegrpo_jax.rewards import clip, compressibility
from dancegrpo_jax.rewards.base import Reward
from dancegrpo_jax.rl.state import TrainState
from dancegrpo_jax.runtime import mesh as meshes
from dancegrpo_jax.runtime import weights
from dancegrpo_jax.runtime.config import ConfigError
from dancegrpo_jax.types import Conditioning, Example, PyTree

FAMILIES = {"stable_diffusion": stable_diffusion}


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


def _folder(field: str, path: str) -> Path:
  """A checkpoint's folder. ConfigError where it is none."""
  folder = Path(path)
  if not folder.is_dir():
    raise ConfigError(
      f"config.{field} = {path!r}: no such folder (from {Path.cwd()}); accepted is a local folder in diffusers or"
      f" transformers layout: `hf download <hub id> --local-dir {path}`"
    )
  return folder


def _read(folder: Path, module: ModuleType) -> tuple[dict[str, dict], dict[str, Callable]]:
  """The JSON files and tokenizers that a family or a reward names."""
  jsons = {name: weights.read_config(folder / Path(file).parent, Path(file).name) for name, file in module.FILES.items()}
  return jsons, {name: load_tokenizer(str(folder / name)) for name in module.TOKENIZERS}


def build_pipeline(config: ConfigDict) -> Pipeline:
  """The functions and abstract parameters of config.model, without its weights.

  Raises:
    ConfigError: a folder or file that is missing, or a network that is not implemented.
  """
  m = config.model
  folder, family = _folder("model.checkpoint", m.checkpoint), FAMILIES[m.family]
  try:
    jsons, tokenizers = _read(folder, family)
    return family.build(
      jsons, tokenizers, size=m.size, dtype=m.dtype, frozen_dtype=m.frozen_dtype, remat=m.remat, attention=m.attention
    )
  except (ValueError, FileNotFoundError) as error:
    raise ConfigError(str(error)) from error


def build_rewards(config: ConfigDict) -> dict[str, Reward]:
  """The rewards that config.reward.terms names, without weights. ConfigError as `build_pipeline`."""
  rewards = {}
  for term, _ in config.reward.terms:
    name = term if ":" in term else term.split("/")[0]
    try:
      if name == "clip":
        folder = _folder("reward.clip.checkpoint", config.reward.clip.checkpoint)
        rewards[name] = clip.build(str(folder), *_read(folder, clip), config.model.frozen_dtype)
      elif name == "compressibility":
        rewards[name] = compressibility.build(config.reward.compressibility.quality, config.reward.compressibility.sign)
      else:
        rewards[name] = python_function.build(name)
    except (ValueError, FileNotFoundError) as error:
      raise ConfigError(str(error)) from error
  return rewards


def load(config: ConfigDict, pipeline: Pipeline, rewards: dict[str, Reward], mesh: jax.sharding.Mesh) -> Model:
  """Reads every weight, each device its share.

  Raises:
    ConfigError: a checkpoint that is missing, truncated or does not fit; a sharding rule that does not.
  """
  abstract = {name: component.abstract for name, component in pipeline.components.items()}
  shardings = meshes.infer_shardings(abstract, config.mesh.rules, mesh)
  whole = meshes.replicated(mesh)

  def read(folder: str, component: Component, sharding) -> PyTree:
    return weights.load(Path(folder) / component.folder, component.table, component.abstract, sharding)

  try:
    params = {
      name: read(config.model.checkpoint, component, shardings[name]) for name, component in pipeline.components.items()
    }
    reward_params = {
      name: read(reward.folder, reward.component, whole) if reward.component else {} for name, reward in rewards.items()
    }
  except weights.ConversionError as error:
    raise ConfigError(str(error)) from error
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



"""From a config to a model in memory, for the commands train, sample and evaluate."""

from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from dancegrpo_jax import programs
from dancegrpo_jax.assembly import reward_builders
from dancegrpo_jax.checkpoints import components, hub, weights
from dancegrpo_jax.data import cut_texts
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.models.lora import Lora
from dancegrpo_jax.pipelines import families
from dancegrpo_jax.pipelines.base import Family, ModelSettings, Pipeline
from dancegrpo_jax.pipelines.layout import location_of
from dancegrpo_jax.rewards.base import Reward
from dancegrpo_jax.rl.state import TrainState, init_state, optimizer_of
from dancegrpo_jax.types import PyTree


class Model(NamedTuple):
  """A pipeline and rewards with their weights.

  Attributes:
    pipeline: the model family's functions.
    frozen: parameters by component, without those that are trained.
    trainable: `{name: tree}`, float32, as training starts: the parameters of the denoiser, or
      adapters named "lora".
    rewards: by name.
    reward_params: by reward, {} for a reward without a network.
    shardings: of `trainable`.
  """

  pipeline: Pipeline
  frozen: PyTree
  trainable: PyTree
  rewards: dict[str, Reward]
  reward_params: dict[str, PyTree]
  shardings: PyTree


def lora_of(config: ConfigDict) -> Lora | None:
  """The adapters that a config asks for; None where every weight is trained."""
  c = config.lora
  return Lora(c.rank, c.alpha, c.targets) if c.rank else None


def family_of(config: ConfigDict) -> Family:
  """The model family of a config. Raises ConfigError where there is none of its name."""
  try:
    return families.family_of(config.model.family)
  except ValueError as error:
    raise ConfigError(str(error)) from error


def checkpoint_folder(config: ConfigDict) -> Path:
  """The local folder of config.model.checkpoint, see `hub.folder`, whose errors it raises."""
  layout, model = family_of(config).layout, config.model
  return hub.folder("model.checkpoint", model.checkpoint, layout, model.variant)


def model_location(config: ConfigDict) -> str:
  """config.model.checkpoint in the form that `components.read_component` takes."""
  return location_of(config.model.checkpoint, checkpoint_folder(config))


def build_pipeline(config: ConfigDict) -> Pipeline:
  """The functions and abstract parameters of config.model, without its weights.

  Raises:
    ConfigError: a folder or file that is missing, a network that is not implemented, or LoRA
      targets that match nothing.
  """
  return pipeline_of(config, *read_files(config))


def read_files(config: ConfigDict) -> tuple[dict[str, dict], dict[str, Callable]]:
  """The JSON files and the tokenizers of config.model.checkpoint, as the family's `build` takes
  them.

  Raises:
    ConfigError: a folder or file that is missing, or a tokenizer of another model.
  """
  folder, layout = checkpoint_folder(config), family_of(config).layout
  try:
    jsons = components.read_jsons(folder, layout)
    tokenizers = components.read_tokenizers(folder, layout)
    for place, tokenizer in tokenizers.items():
      # diffusers name the folders of a tokenizer and its encoder alike, but for this word.
      network = jsons.get(place.replace("tokenizer", "text_encoder"), {})
      cut_texts.require_fit(
        f"{folder / place}", tokenizer, network, length=layout.tokenizers[place] == "clip"
      )
  except (ValueError, FileNotFoundError) as error:
    raise ConfigError(str(error)) from error
  return jsons, tokenizers


def pipeline_of(
  config: ConfigDict, jsons: dict[str, dict], tokenizers: dict[str, Callable]
) -> Pipeline:
  """The pipeline of a checkpoint, given its JSON files and tokenizers.

  Raises:
    ConfigError: a network that is not implemented, or LoRA targets that match nothing.
  """
  model, family = config.model, family_of(config)
  settings = ModelSettings(
    size=model.size,
    dtype=model.dtype,
    frozen_dtype=model.frozen_dtype,
    remat=model.remat,
    attention=model.attention,
    scan_blocks=model.scan_blocks,
    lora=lora_of(config),
  )
  try:
    pipeline = family.build(jsons, tokenizers, settings, **family.options(config))
  except ValueError as error:
    raise ConfigError(str(error)) from error
  _check_first_step(config, pipeline)
  _check_whole_times(config, pipeline)
  return pipeline


def _check_first_step(config: ConfigDict, pipeline: Pipeline) -> None:
  """Raises ConfigError where the sampler's first step has no finite density.

  DanceGRPO's step of a diffusion model divides by alpha, which is 0 at the start of a grid with
  zero terminal SNR.
  """
  if config.sampler.kind != "dance" or pipeline.prediction == "velocity":
    return
  if pipeline.schedule(config.sampler.steps, config.sampler.shift).alpha[0] == 0:
    raise ConfigError(
      "config.sampler.kind = 'dance': the checkpoint's grid starts from pure noise"
      " (rescale_betas_zero_snr), where this step is infinite; use ddim or cps"
    )


def _check_whole_times(config: ConfigDict, pipeline: Pipeline) -> None:
  """Raises ConfigError where two steps of the sampler would have the same whole number as their
  time, as in a model whose times lie between 0 and 1.
  """
  steps = config.sampler.steps
  times = np.floor(pipeline.schedule(steps, config.sampler.shift).model_time[:-1])
  if config.sampler.whole_times and len(np.unique(times)) < steps:
    raise ConfigError(
      f"config.sampler.whole_times = True: two of the {steps} steps get the same time; use False"
    )


def shardings_of(
  config: ConfigDict, pipeline: Pipeline, mesh: jax.sharding.Mesh
) -> dict[str, PyTree]:
  """Shardings of the parameters by component, and of the adapters.

  Raises:
    ConfigError: a rule of config.mesh.rules that does not fit.
  """
  abstract = {name: component.abstract for name, component in pipeline.components.items()}
  if pipeline.adapters is not None:
    abstract[pipeline.trainable] = pipeline.adapters
  return sharding.infer_shardings(abstract, config.mesh.rules, mesh)


def reward_shardings(
  config: ConfigDict, rewards: dict[str, Reward], mesh: jax.sharding.Mesh
) -> dict[str, PyTree]:
  """Shardings of the parameters of rewards, by reward and component.

  Raises:
    ConfigError: a rule of config.mesh.reward_rules that does not fit.
  """
  abstract = {
    name: {part: c.abstract for part, c in reward.components.items()}
    for name, reward in rewards.items()
  }
  if not jax.tree.leaves(abstract):
    return abstract  # no reward has a network, so there is nothing that a rule could match
  return sharding.infer_shardings(abstract, config.mesh.reward_rules, mesh, "reward_rules")


def read(
  config: ConfigDict, pipeline: Pipeline, names: Iterable[str], mesh: jax.sharding.Mesh
) -> dict[str, PyTree]:
  """Reads the parameters of some components. Each device receives only its own share.

  Raises:
    ConfigError: a checkpoint that is missing, truncated or does not fit; a sharding rule that does
      not fit.
  """
  shardings, location = shardings_of(config, pipeline, mesh), model_location(config)
  variant, allow_pickle = config.model.variant, config.model.allow_pickle
  return {
    name: components.read_component(
      location, pipeline.components[name], shardings[name], variant, allow_pickle
    )
    for name in names
  }


def load(
  config: ConfigDict,
  pipeline: Pipeline,
  rewards: dict[str, Reward],
  mesh: jax.sharding.Mesh,
  without: tuple[str, ...] = (),
) -> Model:
  """Reads all weights. Each device receives only its own share.

  Args:
    config: validated.
    pipeline: the model family's functions.
    rewards: by name.
    mesh: the devices.
    without: components that are not read.

  Raises:
    ConfigError: a checkpoint or LoRA that is missing, truncated or does not fit; a sharding rule
      that does not fit.
  """
  shardings = shardings_of(config, pipeline, mesh)
  of_rewards = reward_shardings(config, rewards, mesh)
  adapters = None
  if pipeline.adapters is not None:  # They are small, so a mistake in them shows at once.
    adapters = load_adapters(config, pipeline, shardings[pipeline.trainable])
  names = [component for component in pipeline.components if component not in without]
  params = read(config, pipeline, names, mesh)
  reward_params = {
    name: reward_builders.read_reward(reward, of_rewards[name], config.model.allow_pickle)
    for name, reward in rewards.items()
  }
  if adapters is not None:
    params[pipeline.trainable] = adapters
  return _model(pipeline, params, shardings, rewards, reward_params)


def _model(
  pipeline: Pipeline,
  params: dict[str, PyTree],
  shardings: dict[str, PyTree],
  rewards: dict[str, Reward],
  reward_params: dict[str, PyTree],
) -> Model:
  """Tells the trained parameters from the frozen ones."""
  name = pipeline.trainable
  return Model(
    pipeline=pipeline,
    frozen={key: value for key, value in params.items() if key != name},
    trainable={name: params[name]},
    rewards=rewards,
    reward_params=reward_params,
    shardings={name: shardings[name]},
  )


def load_adapters(config: ConfigDict, pipeline: Pipeline, shardings: PyTree) -> PyTree:
  """The adapters that training starts from: new ones, or those of config.lora.checkpoint.

  The latter are rescaled, so that with the alpha of this config they change the model as much as
  with their own. What is left out or changed of them is said in a line each.

  Raises:
    ConfigError: config.lora.checkpoint has no adapters, or not those that this config asks for.
  """
  component, name = pipeline.components["denoiser"], config.lora.checkpoint
  if not name:
    return programs.init_adapters(config, pipeline.adapters, shardings)
  settings = Lora(config.lora.rank, config.lora.alpha, config.lora.targets)
  try:
    adapters, notes = weights.load_lora(
      name, component.table, pipeline.adapters, component.abstract, settings.scale, shardings
    )
  except weights.ConversionError as error:
    raise ConfigError(f"config.lora.checkpoint = {name!r}: {error}") from error
  if jax.process_index() == 0:
    for note in notes:
      print(f"note: config.lora.checkpoint = {name!r}: {note}")
  return adapters


def outline(
  config: ConfigDict, pipeline: Pipeline, rewards: dict[str, Reward], mesh: jax.sharding.Mesh
) -> Model:
  """What `load` returns, with `jax.ShapeDtypeStruct`s in place of the weights.

  Raises:
    ConfigError: a sharding rule that does not fit, or a selection among videos whose groups lie on
      several devices.
  """
  _check_selection(config, pipeline, mesh)
  shardings = shardings_of(config, pipeline, mesh)
  of_rewards = reward_shardings(config, rewards, mesh)
  params = {
    key: components.placed(part.abstract, shardings[key])
    for key, part in pipeline.components.items()
  }
  if pipeline.adapters is not None:
    name = pipeline.trainable
    params[name] = components.placed(pipeline.adapters, shardings[name])
  reward_params = {
    key: {
      part: components.placed(c.abstract, of_rewards[key][part])
      for part, c in reward.components.items()
    }
    for key, reward in rewards.items()
  }
  return _model(pipeline, params, shardings, rewards, reward_params)


def _check_selection(config: ConfigDict, pipeline: Pipeline, mesh: jax.sharding.Mesh) -> None:
  """Raises ConfigError where best_of would select videos in groups that lie on several devices.

  The devices would send each other the selected trajectories, for which only images are small
  enough.
  """
  prompts, shards = config.data.prompts_per_iteration, mesh.shape["data"] * mesh.shape["fsdp"]
  is_video = len(pipeline.latent_shape) == 4
  if not is_video or not config.advantage.best_of or prompts % shards == 0:
    return
  above = prompts + -prompts % shards
  numbers = f"{above - shards} or {above}" if above > shards else f"{above}"
  raise ConfigError(
    f"config.data.prompts_per_iteration = {prompts}: must be a multiple of data x fsdp = {shards}"
    f" where advantage.best_of = {config.advantage.best_of} selects among videos, so that each"
    f" prompt's samples lie on one device; use {numbers}, or advantage.best_of = 0"
  )


def state_shardings(
  config: ConfigDict, model: Model, num_prompts: int, mesh: jax.sharding.Mesh
) -> TrainState:
  """A TrainState of shardings. The optimizer's state and the average lie as their parameters do."""
  whole = sharding.replicated(mesh)
  abstract = jax.eval_shape(init_state(config, num_prompts, None), model.trainable)
  everywhere = jax.tree.map(lambda _: whole, abstract)
  optimizer = optax.tree.map_params(
    optimizer_of(config),
    lambda _, sharding: sharding,
    abstract.opt_state,
    model.shardings,
    transform_non_params=lambda _: whole,
  )
  ema = None if abstract.ema is None else model.shardings
  return everywhere._replace(trainable=model.shardings, opt_state=optimizer, ema=ema)


def abstract_state(
  config: ConfigDict, model: Model, mesh: jax.sharding.Mesh, num_prompts: int
) -> TrainState:
  """The state before the first iteration, of `jax.ShapeDtypeStruct`s.

  Args:
    config: validated.
    model: of `outline`.
    mesh: the devices.
    num_prompts: in the data set.
  """
  shapes = jax.eval_shape(init_state(config, num_prompts, None), model.trainable)
  return components.placed(shapes, state_shardings(config, model, num_prompts, mesh))


def device_bytes(leaf: jax.ShapeDtypeStruct) -> int:
  """Bytes that an array takes on each device, without padding."""
  shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
  return prod(shape) * leaf.dtype.itemsize

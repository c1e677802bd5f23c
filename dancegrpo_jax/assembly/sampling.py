"""A model that is loaded to draw samples from it, for sample.py and evaluate.py."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax import programs, scoring
from dancegrpo_jax.assembly import cut_prompts, encoding, loading, reward_builders, reward_trial
from dancegrpo_jax.assembly.loading import Model
from dancegrpo_jax.checkpoints import components, store
from dancegrpo_jax.devices import out_of_memory, program_cache, sharding
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.types import Example, Media, PyTree


class Opened(NamedTuple):
  """A loaded model.

  Attributes:
    config: of `opened`.
    model: with the weights that training starts from.
    programs: compiled functions.
    weights: the trained weights of the checkpoint, averaged ones where it has an average.
    limits: tokenizers by name, with the number of tokens that they cut texts to.
  """

  config: ConfigDict
  model: Model
  programs: programs.Programs
  weights: PyTree
  limits: dict[str, cut_prompts.Limit]


@contextlib.contextmanager
def opened(config: ConfigDict, name: str, tried: Sequence[Example] = ()) -> Iterator[Opened]:
  """Loads the model of a config, and the weights of a checkpoint. Inside, the mesh is entered.

  Args:
    config: validated.
    name: a workdir, a folder of checkpoints, or "base" for the weights that training starts from,
      which includes the adapters of config.lora.checkpoint.
    tried: prompts with which host rewards are tried before anything is loaded; () tries none.

  Raises:
    ConfigError: a checkpoint that is missing or damaged, or has other adapters; a host reward that
      can't be used.
    OutOfMemory: the model, or what is done with it inside, is too large for the devices.
  """
  if name != "base":
    check_lora(config, name)
  program_cache.use(config.logging.compilation_cache)
  mesh = sharding.make_mesh(config.mesh)
  with out_of_memory.explained(config), jax.set_mesh(mesh):
    limits = cut_prompts.of_model(config)
    pipeline = loading.build_pipeline(config)
    rewards = reward_builders.build_rewards(config, cut_prompts.noting_files(limits))
    if tried:
      reward_trial.require_usable(rewards, pipeline, tried)
    with out_of_memory.named("loading"):
      model = loading.load(config, pipeline, rewards, mesh)
      weights = model.trainable if name == "base" else restore(config, model, name)
    shardings = loading.state_shardings(config, model, 1, mesh)
    compiled = out_of_memory.guarded(programs.build(config, pipeline, rewards, mesh, shardings))
    yield Opened(config, model, compiled, weights, limits)


def restore(config: ConfigDict, model: Model, name: str) -> PyTree:
  """The trained weights of a checkpoint, averaged ones where it has an average.

  Raises:
    ConfigError: it can't be read, or does not fit.
  """
  return restore_weights(name, components.placed(model.trainable, model.shardings), "")


def check_lora(config: ConfigDict, name: str) -> None:
  """Compares the adapters of a checkpoint with those of the config.

  Those with another alpha would fit, and change the model by another amount.

  Raises:
    ConfigError: rank, alpha or targets differ.
  """
  ran_with = store.read_meta(checkpoints(name))["config"]["lora"]
  for field in ("rank", "alpha", "targets"):
    if ran_with[field] != config.lora[field]:
      raise ConfigError(
        f"{name}: was trained with lora.{field} = {ran_with[field]!r}; this config has"
        f" {config.lora[field]!r}; give the config of the run, or set"
        f" --config.lora.{field}={ran_with[field]!r}"
      )


def checkpoints(name: str) -> Path:
  """The folder of checkpoints of a workdir, or the folder itself if it is one of checkpoints."""
  inside = Path(name) / "checkpoints"
  return inside if inside.is_dir() else Path(name)


def restore_weights(name: str, abstract: PyTree, kind: str) -> PyTree:
  """The trained weights of the last checkpoint of a workdir.

  Args:
    name: a workdir, or a folder of checkpoints.
    abstract: by component, trees of `jax.ShapeDtypeStruct`s with shardings.
    kind: "raw", "ema", or "": averaged weights where the checkpoint has an average, else raw ones.

  Raises:
    ConfigError: it can't be read, does not fit, or has no average.
  """
  folder = checkpoints(name)
  averaged = bool(store.read_meta(folder)["config"]["ema"]["decay"])
  if kind == "ema" and not averaged:
    raise ConfigError(
      f"{name}: keeps no averaged weights (it ran with ema.decay = 0); take the raw ones"
    )
  field = "ema" if averaged and kind != "raw" else "trainable"
  return store.restore_fields(folder, {field: abstract})[field]


def draw(
  opened: Opened, weights: PyTree, examples: list[Example], samples: int, seed: int
) -> Media:
  """Draws samples with the deterministic sampler, chunk by chunk.

  Args:
    opened: the model.
    weights: in the place of the trained weights.
    examples: prompts. The noise of sample s of prompt p is a function of (seed, p, s).
    samples: of each prompt.
    seed: of the noise, which is never that of training.

  Returns:
    Media of NumPy pixels `[prompts, samples, (frames,) height, width, 3]` in [0, 1].
  """
  config, model, compiled = opened.config, opened.model, opened.programs
  conditioning = encoding.conditioning(config, encoding.encoder(model, compiled.encode), examples)
  total = len(examples) * samples
  parts, fps = [], None
  for row in scoring.chunks(total, config.rollout.chunk, config.mesh.lanes):
    prompt = row // samples
    latents = compiled.sample(weights, model.frozen, conditioning, row, prompt, np.int32(seed))
    media = compiled.decode(model.frozen, latents)
    parts.append(np.asarray(media.pixels))
    fps = media.fps
  pixels = np.concatenate(parts)[:total]
  return Media(pixels.reshape(len(examples), samples, *pixels.shape[1:]), fps)

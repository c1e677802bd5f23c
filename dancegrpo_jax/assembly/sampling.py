"""A model that is loaded to draw samples from it, for sample.py and evaluate.py."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax import programs, scoring
from dancegrpo_jax.assembly import cut_prompts, encoding, loading, reward_builders, reward_trial
from dancegrpo_jax.assembly.loading import Model
from dancegrpo_jax.checkpoints import chosen, components, store
from dancegrpo_jax.checkpoints.chosen import Checkpoint
from dancegrpo_jax.devices import out_of_memory, program_cache, sharding
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.report.progress import phase, steps
from dancegrpo_jax.types import Example, Media, PyTree


class Opened(NamedTuple):
  """A loaded model.

  Attributes:
    config: of `opened`.
    model: with the weights that training starts from.
    programs: compiled functions.
    weights: the trained weights of the checkpoint, averaged ones where it has an average.
    limits: tokenizers by name, with the number of tokens that they cut texts to.
    iteration: of the checkpoint; 0 for the base.
  """

  config: ConfigDict
  model: Model
  programs: programs.Programs
  weights: PyTree
  limits: dict[str, cut_prompts.Limit]
  iteration: int


@contextlib.contextmanager
def opened(config: ConfigDict, name: str, tried: Sequence[Example] = ()) -> Iterator[Opened]:
  """Loads the model of a config, and the weights of a checkpoint. Inside, the mesh is entered.

  Args:
    config: validated.
    name: of a checkpoint, see `chosen.find`; or "base" for the model before training, which
      includes the adapters of config.lora.checkpoint.
    tried: prompts with which host rewards are tried before anything is loaded; () tries none.

  Raises:
    ConfigError: a checkpoint that is missing or damaged, or has other adapters; a host reward that
      can't be used.
    OutOfMemory: the model, or what is done with it inside, is too large for the devices.
  """
  checkpoint = None if name == chosen.BASE else chosen.find(name)
  if checkpoint:
    check_lora(config, checkpoint)
  program_cache.use(config.logging.compilation_cache)
  mesh = sharding.make_mesh(config.mesh)
  with out_of_memory.explained(config), jax.set_mesh(mesh):
    with phase("finding the files of the model and of the rewards"):
      limits = cut_prompts.of_model(config)
      pipeline = loading.build_pipeline(config)
      rewards = reward_builders.build_rewards(config, cut_prompts.noting_files(limits))
      reward_builders.require_scorable(rewards, pipeline.sample_shape)
    if tried:
      with phase("trying the rewards on two blank pictures"):
        reward_trial.require_usable(rewards, pipeline, tried)
    with phase("reading the weights"), out_of_memory.named("loading"):
      model = loading.load(config, pipeline, rewards, mesh)
      weights = restore(config, model, checkpoint) if checkpoint else model.trainable
    shardings = loading.state_shardings(config, model, 1, mesh)
    compiled = out_of_memory.guarded(programs.build(config, pipeline, rewards, mesh, shardings))
    yield Opened(
      config=config,
      model=model,
      programs=compiled,
      weights=weights,
      limits=limits,
      iteration=checkpoint.iteration if checkpoint else 0,
    )


def restore(config: ConfigDict, model: Model, checkpoint: Checkpoint) -> PyTree:
  """The trained weights of a checkpoint, averaged ones where it has an average.

  Raises:
    ConfigError: it can't be read, or does not fit.
  """
  return restore_weights(checkpoint, components.placed(model.trainable, model.shardings), "")


def check_lora(config: ConfigDict, checkpoint: Checkpoint) -> None:
  """Compares the adapters of a checkpoint with those of the config.

  Those with another alpha would fit, and change the model by another amount.

  Raises:
    ConfigError: rank, alpha or targets differ.
  """
  ran_with = checkpoint.meta()["config"]["lora"]
  for field in ("rank", "alpha", "targets"):
    if ran_with[field] != config.lora[field]:
      raise ConfigError(
        f"{checkpoint.name}: was trained with lora.{field} = {ran_with[field]!r}; this config has"
        f" {config.lora[field]!r}; leave out --config, or set"
        f" --config.lora.{field}={ran_with[field]!r}"
      )


def is_averaged(checkpoint: Checkpoint) -> bool:
  """Whether a checkpoint has an average of the weights."""
  return bool(checkpoint.meta()["config"]["ema"]["decay"])


def field_of(checkpoint: Checkpoint, kind: str) -> str:
  """The field of a checkpoint with these weights, for a kind of `restore_weights`."""
  return "ema" if is_averaged(checkpoint) and kind != "raw" else "trainable"


def restore_weights(checkpoint: Checkpoint, abstract: PyTree, kind: str) -> PyTree:
  """The trained weights of a checkpoint.

  Args:
    checkpoint: of a run.
    abstract: by component, trees of `jax.ShapeDtypeStruct`s with shardings.
    kind: "raw", "ema", or "": averaged weights where the checkpoint has an average, else raw ones.

  Raises:
    ConfigError: it can't be read, does not fit, or has no average.
  """
  if kind == "ema" and not is_averaged(checkpoint):
    raise ConfigError(
      f"{checkpoint.name}: keeps no averaged weights (it ran with ema.decay = 0); take the raw ones"
    )
  field = field_of(checkpoint, kind)
  return store.restore_fields(checkpoint.folder, {field: abstract}, checkpoint.iteration)[field]


class Part(NamedTuple):
  """Some of the samples of `parts`.

  Attributes:
    numbers: of the samples: number p * samples + s is sample s of prompt p.
    media: of NumPy pixels `[n, (frames,) height, width, 3]` in [0, 1].
  """

  numbers: range
  media: Media


def parts(
  opened: Opened, weights: PyTree, examples: list[Example], samples: int, seed: int
) -> Iterator[Part]:
  """Draws samples with the deterministic sampler, as many at a time as a chunk of the rollout has.

  Only the prompts of these samples are encoded, and nothing is kept, so that the memory doesn't
  grow with the number of prompts. Arguments are those of `draw`.
  """
  config, model, compiled = opened.config, opened.model, opened.programs
  encode = encoding.encoder(model, compiled.encode)
  total = len(examples) * samples
  rows = scoring.chunks(total, config.rollout.chunk, config.mesh.lanes)
  # Every chunk has as many rows of conditioning, so that each program is compiled once.
  needed = max(int(row[-1]) // samples - int(row[0]) // samples + 1 for row in rows)
  done = 0
  for row in steps("compiling and sampling", rows):
    prompt = row // samples
    first = min(int(prompt[0]), len(examples) - needed)
    conditioning = encoding.conditioning(config, encode, examples[first : first + needed])
    latents = compiled.sample(
      weights, model.frozen, conditioning, row, prompt - np.int32(first), np.int32(seed)
    )
    media = compiled.decode(model.frozen, latents)
    numbers = range(done, min(done + len(row), total))
    pixels = np.asarray(jax.block_until_ready(media.pixels))  # which raises what has failed
    yield Part(numbers, Media(pixels[: len(numbers)], media.fps))
    done = numbers.stop


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
  drawn = list(parts(opened, weights, examples, samples, seed))
  pixels = np.concatenate([part.media.pixels for part in drawn])
  return Media(pixels.reshape(len(examples), samples, *pixels.shape[1:]), drawn[0].media.fps)

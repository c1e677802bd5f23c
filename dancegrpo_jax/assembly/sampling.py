"""A model with its weights, opened for looking at: what sample.py and evaluate.py have in
common.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax import programs, scoring
from dancegrpo_jax.assembly import encoding, loading, reward_builders
from dancegrpo_jax.assembly.loading import Model
from dancegrpo_jax.checkpoints import components, store
from dancegrpo_jax.devices import out_of_memory, program_cache, sharding
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.types import Example, Media, PyTree


class Opened(NamedTuple):
  """A loaded model.

  Attributes:
    config: as asked.
    model: with the base weights.
    programs: compiled functions.
    weights: the checkpoint's trainable tree, the averaged one where it keeps an average.
  """

  config: ConfigDict
  model: Model
  programs: programs.Programs
  weights: PyTree


@contextlib.contextmanager
def opened(config: ConfigDict, name: str) -> Iterator[Opened]:
  """Loads the config's model, and a checkpoint over it; the mesh is entered meanwhile.

  Args:
    config: validated.
    name: "base" (what training starts from: with the adapters of config.lora.checkpoint), a
      workdir, or a folder of checkpoints.

  Raises:
    ConfigError: a missing or damaged checkpoint, or one of other adapters.
    OutOfMemory: the model, or what is done with it inside, is too large for the devices.
  """
  if name != "base":
    check_lora(config, name)
  program_cache.use(config.logging.compilation_cache)
  mesh = sharding.make_mesh(config.mesh)
  with out_of_memory.explained(config), jax.set_mesh(mesh):
    pipeline, rewards = loading.build_pipeline(config), reward_builders.build_rewards(config)
    with out_of_memory.named("loading"):
      model = loading.load(config, pipeline, rewards, mesh)
      weights = model.trainable if name == "base" else restore(config, model, name)
    shardings = loading.state_shardings(config, model, 1, mesh)
    compiled = out_of_memory.guarded(programs.build(config, pipeline, rewards, mesh, shardings))
    yield Opened(config, model, compiled, weights)


def restore(config: ConfigDict, model: Model, name: str) -> PyTree:
  """A checkpoint's weights, the averaged ones where it keeps an average. ConfigError where it can't
  be read.
  """
  return restore_weights(name, components.placed(model.trainable, model.shardings), "")


def check_lora(config: ConfigDict, name: str) -> None:
  """ConfigError where a checkpoint's adapters aren't those of the config: of another alpha they
  would fit and be wrong.
  """
  ran_with = store.read_meta(checkpoints(name))["config"]["lora"]
  for field in ("rank", "alpha", "targets"):
    if ran_with[field] != config.lora[field]:
      raise ConfigError(
        f"{name}: was trained with lora.{field} = {ran_with[field]!r}; this config has"
        f" {config.lora[field]!r}; give the config"
        f" of the run, or set --config.lora.{field}={ran_with[field]!r}"
      )


def checkpoints(name: str) -> Path:
  """The folder of checkpoints that a workdir, or such a folder itself, names."""
  return Path(name) / "checkpoints" if (Path(name) / "checkpoints").is_dir() else Path(name)


def restore_weights(name: str, abstract: PyTree, kind: str) -> PyTree:
  """The trained weights of a workdir's last checkpoint.

  Args:
    name: a workdir, or a folder of checkpoints.
    abstract: tree of `jax.ShapeDtypeStruct` with shardings, by component.
    kind: "raw", "ema", or "" for the averaged ones where the checkpoint keeps an average.

  Raises:
    ConfigError: it can't be read, does not fit, or keeps no average.
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
  """Deterministic samples, chunk by chunk.

  Args:
    opened: the model.
    weights: trainable tree.
    examples: prompts; sample s of prompt p has noise of its own, a function of (seed, p, s).
    samples: of one prompt.
    seed: of the noise; training never sees it.

  Returns:
    Media of NumPy pixels `[prompts, samples, (frames,) height, width, 3]`.
  """
  config, model, run = opened.config, opened.model, opened.programs
  conditioning = encoding.conditioning(config, encoding.encoder(model, run.encode), examples)
  total = len(examples) * samples
  parts, fps = [], None
  for row in scoring.chunks(total, config.rollout.chunk, config.mesh.lanes):
    latents = run.sample(weights, model.frozen, conditioning, row, row // samples, np.int32(seed))
    media = run.decode(model.frozen, latents)
    parts.append(np.asarray(media.pixels))
    fps = media.fps
  pixels = np.concatenate(parts)[:total]
  return Media(pixels.reshape(len(examples), samples, *pixels.shape[1:]), fps)

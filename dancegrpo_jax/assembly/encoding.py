"""Prompts to the rows that a denoiser is conditioned on.

The rows come from the model's own text encoders, or from disk: a run's prompts can be encoded once
and read back, so that no text encoder is on the devices while it trains.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dancegrpo_jax import programs
from dancegrpo_jax.assembly import loading
from dancegrpo_jax.assembly.loading import Model
from dancegrpo_jax.checkpoints import components
from dancegrpo_jax.data import prompt_embeddings as disk
from dancegrpo_jax.devices import out_of_memory, sharding
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.pipelines.base import Pipeline
from dancegrpo_jax.types import Conditioning, Example, PyTree

Encode = Callable[[list[Example]], PyTree]  # examples -> rows


def encoder(model: Model, encode: Callable) -> Encode:
  """`examples -> rows` by the model's own encoders; `encode` is the compiled program."""
  return lambda examples: encode(model.frozen, model.pipeline.prepare(examples))


def conditioning(config: ConfigDict, encode: Encode, examples: list[Example]) -> Conditioning:
  """One row an example; the negative branch only where guidance needs it."""
  positive = encode(examples)
  if config.sampler.guidance_scale == 1.0:
    return Conditioning(positive=positive, negative=None)
  negative = [example._replace(prompt=example.negative_prompt) for example in examples]
  return Conditioning(positive=positive, negative=encode(negative))


def as_examples(texts: list[str]) -> list[Example]:
  """Texts alone, as a pipeline reads them."""
  return [Example(number, text) for number, text in enumerate(texts)]


def cached_encoder(
  config: ConfigDict,
  workdir: Path,
  pipeline: Pipeline,
  examples: list[Example],
  mesh: jax.sharding.Mesh,
) -> Encode:
  """`examples -> rows`, on every device, read from config.data.cache_folder; what isn't there yet
  is encoded first.

  The text encoders are loaded only where something is missing, and let go of before this returns.

  Args:
    config: validated.
    workdir: of the run; the cache is in it unless the config names a folder.
    pipeline: whose `encode` is cached.
    examples: every prompt that will be asked for; negative prompts are taken from them too.
    mesh: the devices.

  Raises:
    ConfigError: the folder belongs to other prompts or another encoder, or can't be written; before
      any weights are loaded.
  """
  folder = Path(config.data.cache_folder or workdir / "embeddings")
  texts = texts_of(config, examples)
  abstract = abstract_rows(pipeline)
  leaves = {name: disk.Leaf(leaf.shape[1:], leaf.dtype) for name, leaf in named(abstract).items()}
  try:
    disk.claim(folder, identity(config, pipeline, texts), write=jax.process_index() == 0)
    missing = disk.missing(folder, leaves, texts)
    synchronise("prompt embeddings: what is missing")  # before process 0 writes any
    if missing:
      fill(config, folder, pipeline, leaves, texts, missing, mesh)
    synchronise("prompt embeddings: all written")
    table = disk.Table(folder, leaves, texts)
  except (ValueError, OSError) as error:
    if isinstance(error, ConfigError):
      raise
    raise ConfigError(f"config.data.cache_folder = {str(folder)!r}: {error}") from error
  structure, everywhere = jax.tree.structure(abstract), sharding.replicated(mesh)

  def encode(examples: list[Example]) -> PyTree:
    rows = table.rows([example.prompt for example in examples])
    return jax.device_put(
      jax.tree.unflatten(structure, [rows[name] for name in leaves]), everywhere
    )

  return encode


def texts_of(config: ConfigDict, examples: list[Example]) -> list[str]:
  """Every text that these examples are conditioned on, once, in order."""
  guided = config.sampler.guidance_scale != 1.0
  return list(
    dict.fromkeys([e.prompt for e in examples] + [e.negative_prompt for e in examples if guided])
  )


def abstract_rows(pipeline: Pipeline) -> PyTree:
  """Shapes and dtypes of what `encode` makes of one text."""
  params = {name: pipeline.components[name].abstract for name in pipeline.encoders}
  return jax.eval_shape(pipeline.encode, params, pipeline.prepare(as_examples([""])))


def named(rows: PyTree) -> dict[str, Any]:
  """The leaves of a pytree of rows, in its order, by names that a data set can have."""
  keys = {
    jax.tree_util.keystr(path, simple=True, separator="_"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(rows)
  }
  return {f"embedding_{key}" if key else "embedding": leaf for key, leaf in keys.items()}


def identity(config: ConfigDict, pipeline: Pipeline, texts: list[str]) -> disk.Identity:
  """What the embeddings of these texts depend on."""
  location, variant = loading.model_location(config), config.model.variant
  encoders = {
    name: components.identity(location, pipeline.components[name], variant)
    for name in pipeline.encoders
  }
  encoder = {"family": config.model.family, "dtype": config.model.frozen_dtype, **encoders}
  if (
    config.model.matmul_precision != "default"
  ):  # left out else, so that caches without the field stay valid
    encoder["matmul_precision"] = config.model.matmul_precision
  tokens = b"".join(
    np.asarray(ids).tobytes() for ids in jax.tree.leaves(pipeline.prepare(as_examples(texts)))
  )
  return disk.Identity(
    digest(json.dumps(texts).encode()),
    digest(json.dumps(encoder, sort_keys=True).encode()),
    digest(tokens),
    len(texts),
    config.model.checkpoint,
  )


def digest(data: bytes) -> str:
  """16 hexadecimal digits."""
  return hashlib.sha256(data).hexdigest()[:16]


def fill(
  config: ConfigDict,
  folder: Path,
  pipeline: Pipeline,
  leaves: dict[str, disk.Leaf],
  texts: list[str],
  missing: list[int],
  mesh: jax.sharding.Mesh,
) -> None:
  """Loads the encoders and writes the missing parts. Every process encodes, the first one
  writes.
  """
  params = loading.read(config, pipeline, pipeline.encoders, mesh)
  program = out_of_memory.Guarded("encode", programs.encoder(config, pipeline, mesh))
  size, parts = config.data.prompts_per_iteration, disk.parts(texts)

  def encode(texts: list[str]) -> dict[str, np.ndarray]:
    """As many at once as training would, which is one program."""
    padded = texts + [texts[-1]] * (-len(texts) % size)
    starts = range(0, len(padded), size)
    rows = [
      jax.device_get(named(program(params, pipeline.prepare(as_examples(padded[i : i + size])))))
      for i in starts
    ]
    return {name: np.concatenate([row[name] for row in rows])[: len(texts)] for name in leaves}

  for part in missing:
    arrays = encode(parts[part])
    if jax.process_index() == 0:
      disk.write(folder, leaves, part, parts[part], arrays)
      print(f"{folder}: {min((part + 1) * disk.PART, len(texts))} of {len(texts)} texts encoded")


def synchronise(what: str) -> None:
  """Waits for all processes."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)

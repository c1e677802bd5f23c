"""From prompts to the rows that a denoiser is conditioned on.

The rows come from the text encoders of the model, or from disk: the prompts of a run can be encoded
once and read back, so that no text encoder is on the devices while it trains.
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
from dancegrpo_jax.data import prompt_embeddings
from dancegrpo_jax.devices import out_of_memory, sharding
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.pipelines.base import Pipeline
from dancegrpo_jax.types import Conditioning, Example, PyTree

Encode = Callable[[list[Example]], PyTree]  # examples -> rows


def encoder(model: Model, encode: Callable) -> Encode:
  """`examples -> rows` by the encoders of the model.

  Args:
    model: with its encoders.
    encode: compiled, `Programs.encode`.
  """
  return lambda examples: encode(model.frozen, model.pipeline.prepare(examples))


def conditioning(config: ConfigDict, encode: Encode, examples: list[Example]) -> Conditioning:
  """What the denoiser is conditioned on: one row for each example.

  The negative branch is None where guidance does not need it.
  """
  positive = encode(examples)
  if config.sampler.guidance_scale == 1.0:
    return Conditioning(positive=positive, negative=None)
  negative = [example._replace(prompt=example.negative_prompt) for example in examples]
  return Conditioning(positive=positive, negative=encode(negative))


def as_examples(texts: list[str]) -> list[Example]:
  """Examples that have a text and nothing else."""
  return [Example(number, text) for number, text in enumerate(texts)]


def cached_encoder(
  config: ConfigDict,
  workdir: Path,
  pipeline: Pipeline,
  examples: list[Example],
  mesh: jax.sharding.Mesh,
) -> Encode:
  """`examples -> rows`, whole on every device, read from config.data.cache_folder.

  What is missing in the folder is encoded first. The text encoders are loaded only then, and freed
  before this returns.

  Args:
    config: validated.
    workdir: of the run; the cache is in it unless the config names a folder.
    pipeline: whose `encode` is cached.
    examples: every example whose rows will be asked for. Their negative prompts are cached too.
    mesh: the devices.

  Raises:
    ConfigError: the folder belongs to other prompts or another encoder, or can't be written. This
      is found before any weights are loaded.
  """
  folder = Path(config.data.cache_folder or workdir / "embeddings")
  texts = texts_of(config, examples)
  abstract = abstract_rows(pipeline)
  leaves = {
    name: prompt_embeddings.Leaf(leaf.shape[1:], leaf.dtype)
    for name, leaf in named(abstract).items()
  }
  try:
    expected = identity(config, pipeline, texts)
    prompt_embeddings.claim(folder, expected, write=jax.process_index() == 0)
    missing = prompt_embeddings.missing(folder, leaves, texts)
    # All processes have to see the same parts missing, so process 0 may not write one before.
    synchronise("prompt embeddings: what is missing")
    if missing:
      fill(config, folder, pipeline, leaves, texts, missing, mesh)
    synchronise("prompt embeddings: all written")
    table = prompt_embeddings.Table(folder, leaves, texts)
  except (ValueError, OSError) as error:
    if isinstance(error, ConfigError):
      raise
    raise ConfigError(f"config.data.cache_folder = {str(folder)!r}: {error}") from error
  structure, everywhere = jax.tree.structure(abstract), sharding.replicated(mesh)

  def encode(examples: list[Example]) -> PyTree:
    rows = table.rows([example.prompt for example in examples])
    tree = jax.tree.unflatten(structure, [rows[name] for name in leaves])
    return jax.device_put(tree, everywhere)

  return encode


def texts_of(config: ConfigDict, examples: list[Example]) -> list[str]:
  """Every text that these examples are conditioned on, in order and without repetitions."""
  texts = [example.prompt for example in examples]
  if config.sampler.guidance_scale != 1.0:
    texts += [example.negative_prompt for example in examples]
  return list(dict.fromkeys(texts))


def abstract_rows(pipeline: Pipeline) -> PyTree:
  """Shapes and dtypes of the row that `Pipeline.encode` makes of one text."""
  params = {name: pipeline.components[name].abstract for name in pipeline.encoders}
  return jax.eval_shape(pipeline.encode, params, pipeline.prepare(as_examples([""])))


def named(rows: PyTree) -> dict[str, Any]:
  """The leaves of a pytree of rows in its order, with names that a field of a data set may have."""
  leaves = {
    jax.tree_util.keystr(path, simple=True, separator="_"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(rows)
  }
  return {f"embedding_{key}" if key else "embedding": leaf for key, leaf in leaves.items()}


def identity(
  config: ConfigDict, pipeline: Pipeline, texts: list[str]
) -> prompt_embeddings.Identity:
  """Digests of everything that the embeddings of these texts depend on."""
  location, variant = loading.model_location(config), config.model.variant
  encoders = {
    name: components.identity(location, pipeline.components[name], variant)
    for name in pipeline.encoders
  }
  encoder = {"family": config.model.family, "dtype": config.model.frozen_dtype, **encoders}
  # The default is left out, so that caches from before this field existed stay valid.
  if config.model.matmul_precision != "default":
    encoder["matmul_precision"] = config.model.matmul_precision
  tokens = b"".join(
    np.asarray(ids).tobytes() for ids in jax.tree.leaves(pipeline.prepare(as_examples(texts)))
  )
  return prompt_embeddings.Identity(
    prompts=digest(json.dumps(texts).encode()),
    encoder=digest(json.dumps(encoder, sort_keys=True).encode()),
    tokens=digest(tokens),
    count=len(texts),
    checkpoint=config.model.checkpoint,
  )


def digest(data: bytes) -> str:
  """The first 16 hexadecimal digits of the SHA-256 hash."""
  return hashlib.sha256(data).hexdigest()[:16]


def fill(
  config: ConfigDict,
  folder: Path,
  pipeline: Pipeline,
  leaves: dict[str, prompt_embeddings.Leaf],
  texts: list[str],
  missing: list[int],
  mesh: jax.sharding.Mesh,
) -> None:
  """Loads the encoders and writes the missing parts. All processes encode, and process 0 writes.

  Args:
    config: validated.
    folder: of the cache.
    pipeline: whose encoders are loaded.
    leaves: shapes and dtypes of a row.
    texts: all that are cached.
    missing: numbers of the parts that are to be written.
    mesh: the devices.
  """
  params = loading.read(config, pipeline, pipeline.encoders, mesh)
  program = out_of_memory.Guarded("encode", programs.encoder(config, pipeline, mesh))
  size, parts = config.data.prompts_per_iteration, prompt_embeddings.parts(texts)

  def encode(texts: list[str]) -> dict[str, np.ndarray]:
    """Encodes as many texts in a call as training would, so that one program is compiled."""
    padded = texts + [texts[-1]] * (-len(texts) % size)
    rows = []
    for start in range(0, len(padded), size):
      inputs = pipeline.prepare(as_examples(padded[start : start + size]))
      rows.append(jax.device_get(named(program(params, inputs))))
    return {name: np.concatenate([row[name] for row in rows])[: len(texts)] for name in leaves}

  for part in missing:
    arrays = encode(parts[part])
    if jax.process_index() == 0:
      prompt_embeddings.write(folder, leaves, part, parts[part], arrays)
      encoded = min((part + 1) * prompt_embeddings.PART, len(texts))
      print(f"{folder}: {encoded} of {len(texts)} texts encoded")


def synchronise(name: str) -> None:
  """Waits until all processes have come to this point, which has the same name in all of them."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)

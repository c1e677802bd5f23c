"""The CLIP score: the cosine between the embeddings of image and prompt.

Checkpoints are in the layout of transformers or of open_clip. `cosine` builds HPS-v2.1 (hps.py) and
PickScore (pickscore.py) too, which differ in weights and preprocessing only.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dancegrpo_jax.conversion.table import Table
from dancegrpo_jax.conversion.tables import clip as tables
from dancegrpo_jax.models.clip import Clip
from dancegrpo_jax.pipelines import networks as shared
from dancegrpo_jax.pipelines.layout import (
  RANDOM,
  Component,
  Layout,
  is_random,
  layout_of,
  local_path,
  location_of,
)
from dancegrpo_jax.rewards import open_clip
from dancegrpo_jax.rewards.base import Describe, Files, Networks, Reward, RewardKind, images
from dancegrpo_jax.rewards.preprocess import Preprocessing, from_transformers, preprocess
from dancegrpo_jax.types import Example, Media, PyTree

OPEN_CLIP_FILE = open_clip.FILE
# The folder may hold the same weights with transformers' names too, so open_clip's come first.
OPEN_CLIP_WEIGHTS = (
  "open_clip_model.safetensors",
  "open_clip_pytorch_model.safetensors",
  "open_clip_pytorch_model.bin",
)
FILES = {"clip": "config.json", "preprocessor": "preprocessor_config.json"}
TRANSFORMERS = layout_of(FILES, {})  # without a tokenizer, which may come from another place
OPEN_CLIP_LAYOUT = Layout(files={"clip": OPEN_CLIP_FILE}, tokenizers={}, networks=("",))


class Checkpoint(NamedTuple):
  """A checkpoint with two towers, before its weights are read.

  Attributes:
    location: where its weights are: a folder, a file, or "random:..." for random ones.
    table: the parameters that the tensors of the files become.
    config: the network, in the form of a CLIPModel's config.json.
    preprocessing: how its images are prepared.
  """

  location: str
  table: Table
  config: dict[str, Any]
  preprocessing: Preprocessing


def transformers_checkpoint(location: str, jsons: dict[str, dict]) -> Checkpoint:
  """A checkpoint like openai/clip-vit-large-patch14.

  Raises:
    ValueError: its preprocessing is not implemented.
  """
  config = jsons["clip"]
  size = Clip.from_json(config).vision_model.image_size
  return Checkpoint(
    location=location,
    table=tables.CLIP,
    config=config,
    preprocessing=from_transformers(jsons["preprocessor"], size),
  )


def open_clip_checkpoint(location: str, config: dict[str, Any]) -> Checkpoint:
  """A checkpoint like DFN5B's and LAION's, from its open_clip_config.json.

  Raises:
    ValueError: its network or its preprocessing is not implemented.
  """
  return Checkpoint(
    location=location,
    table=tables.OPEN_CLIP,
    config=open_clip.clip_config(config.get("model_cfg")),
    preprocessing=open_clip.preprocessing(config),
  )


def normalise(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
  """Scales every row to length 1, in float32."""
  x = x.astype(jnp.float32)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def network_of(checkpoint: Checkpoint, networks: Networks) -> tuple[Clip, Component]:
  """The towers, and the weights to load for them."""
  dtype = jnp.dtype(networks.dtype)
  network = Clip.from_json(
    checkpoint.config,
    dtype=dtype,
    param_dtype=dtype,
    scan_layers=networks.scan_layers,
    impl=networks.attention,
  )
  size = checkpoint.preprocessing.size
  tokens = jax.ShapeDtypeStruct((1, network.text_model.max_position_embeddings), jnp.int32)
  pixels = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  abstract = shared.abstract_of(network, tokens, pixels)
  component = Component(folder=checkpoint.location, table=checkpoint.table, abstract=abstract)
  return network, component


def cosine(
  name: str,
  checkpoint: Checkpoint,
  tokenize: Callable[[list[str]], np.ndarray],
  networks: Networks,
) -> Reward:
  """The cosine between the embeddings of two towers as a reward with one term.

  Args:
    name: the name of the reward and of its term.
    checkpoint: from `transformers_checkpoint`, `open_clip_checkpoint`, hps.py or pickscore.py.
    tokenize: a function from texts to ids.
    networks: how the towers are built. Images are prepared in float32 whatever the dtype is.
  """
  network, component = network_of(checkpoint, networks)

  def prepare(examples: list[Example]) -> np.ndarray:
    return tokenize([example.prompt for example in examples])

  def features(params: PyTree, tokens: Array) -> Float[Array, "n d"]:
    return normalise(network.apply({"params": params["clip"]}, tokens, method="text_features"))

  def embed(params: PyTree, media: Media) -> Float[Array, "b d"]:
    pixels = preprocess(images(name, media), checkpoint.preprocessing)
    return normalise(network.apply({"params": params["clip"]}, pixels, method="image_features"))

  def score(
    params: PyTree, media: Media, text: Float[Array, "b d"]
  ) -> dict[str, Float[Array, "b"]]:
    return {name: jnp.sum(embed(params, media) * text, axis=-1)}

  return Reward(
    name=name,
    kind="device",
    terms=(name,),
    score=score,
    prepare=prepare,
    features=features,
    components={"clip": component},
    embed=embed,
  )


def is_open_clip(source: str) -> bool:
  """Whether a local folder is in open_clip's layout.

  LAION's folders are in both layouts. They count as transformers' if they have its weights.
  """
  folder = local_path(source)
  has_weights = is_random(source) or any(folder.glob("model*.safetensors*"))
  is_transformers = (folder / FILES["clip"]).is_file() and has_weights
  return (folder / OPEN_CLIP_FILE).is_file() and not is_transformers


def find_checkpoint(field: str, source: str, files: Files) -> Checkpoint:
  """A CLIP in transformers' layout, or a local one in open_clip's.

  Args:
    field: the field of the config, for messages.
    source: a folder, a hub id, or "random:FOLDER".
    files: the functions that read its files.
  """
  if not is_open_clip(source):
    folder = files.folder(field, source, TRANSFORMERS)
    jsons = {name: files.json(folder, file) for name, file in FILES.items()}
    return transformers_checkpoint(location_of(source, folder), jsons)
  folder = files.folder(field, source, OPEN_CLIP_LAYOUT)
  weights = (folder / name for name in OPEN_CLIP_WEIGHTS)
  path = next((file for file in weights if file.is_file()), folder)
  return open_clip_checkpoint(location_of(source, path), files.json(folder, OPEN_CLIP_FILE))


def describe_checkpoint(field: str, source: str, describe: Describe) -> str:
  """The location of a CLIP checkpoint with random weights, for `RewardKind.blank`."""
  if (local_path(source) / OPEN_CLIP_FILE).is_file():
    return f"{RANDOM}{local_path(source)}"
  return describe(field, source, TRANSFORMERS)


def build(name: str, section: ConfigDict, files: Files, networks: Networks) -> Reward:
  """The CLIP score; its section has `checkpoint` and `tokenizer`."""
  checkpoint = find_checkpoint("reward.clip.checkpoint", section.checkpoint, files)
  source = section.tokenizer or section.checkpoint
  tokenize = files.tokenizer("reward.clip.tokenizer", source, checkpoint.config)
  return cosine(name, checkpoint, tokenize, networks)


def blank(section: ConfigDict, describe: Describe, published: Path) -> dict[str, Any]:
  """The fields with which weights are random."""
  del published
  location = describe_checkpoint("reward.clip.checkpoint", section.checkpoint, describe)
  return {"checkpoint": location}


KIND = RewardKind(
  build=build,
  of_images=True,
  section="clip",
  blank=blank,
  networks={"CLIPModel": shared.CLIP, "CLIPVisionModel": shared.CLIP_VISION},
)

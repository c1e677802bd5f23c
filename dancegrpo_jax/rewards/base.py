"""The protocol of a reward: prompts become features once, then media and features become scores."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dancegrpo_jax.pipelines.layout import Component, Layout, Network
from dancegrpo_jax.types import Media, PyTree


class Reward(NamedTuple):
  """A reward. One row a sample everywhere; a score is NaN where it failed.

  Attributes:
    name: as the config names it.
    kind: "device" (traced into a program, sharded over the batch) or "host" (NumPy, called in a
      thread).
    terms: names of its scores: its own name, or "name/part" each. A host reward that fails is NaN
      in all of them.
    score: device: `(params, media, features) -> {term: f32[b]}`; host: `(media of NumPy, examples)
      -> {term: f32[b]}`.
    prepare: device rewards: `(examples) -> NumPy pytree` with one row an example, on the host. It
      gets blank examples too (prompt "", no metadata), from whose shapes programs are compiled.
    features: device rewards: `(params, prepared) -> pytree` with one row an example, computed once
      a prompt.
    components: what `params` consists of, {} for nothing; a `Component.folder` here is the whole
      location.
    embed: `(params, media) -> f32[b, d]` of length 1, where the reward has an embedding of samples:
      `evaluate` measures retrieval and diversity with it.
  """

  name: str
  kind: str
  terms: tuple[str, ...]
  score: Callable
  prepare: Callable | None = None
  features: Callable | None = None
  components: dict[str, Component] = {}
  embed: Callable | None = None


class Files(NamedTuple):
  """How a reward gets at its files; the assembly fetches and reads them.

  Attributes:
    folder: `(field, source, layout) -> Path`: the local folder of a checkpoint, fetched from the
      hub where it must be. `field` is that of the config, for messages.
    file: `(field, source) -> Path`: a local weight file, or a folder with one.
    json: `(folder, name) -> dict` of a JSON file.
    tokenizer: `(field, source, network's config.json) -> tokenizer`, texts -> ids.
  """

  folder: Callable[[str, str, Layout], Path]
  file: Callable[[str, str], Path]
  json: Callable[[Path, str], dict[str, Any]]
  tokenizer: Callable[[str, str, dict[str, Any]], Callable]


class Networks(NamedTuple):
  """How the rewards' networks are built, which config.model says for all networks.

  Attributes:
    dtype: stored and computed.
    attention: see `models.attention.attention`.
    scan_layers: stack the layers.
  """

  dtype: str
  attention: str = "auto"
  scan_layers: bool = False


Describe = Callable[[str, str, Layout], str]  # (field, source, layout) -> "random:FOLDER"


def nothing_to_blank(section: ConfigDict, describe: Describe, published: Path) -> dict[str, Any]:
  """For rewards without weights."""
  del section, describe, published
  return {}


class RewardKind(NamedTuple):
  """A kind of reward. rewards/kinds.py lists those of this package; a config may name another one
  as "module:object" in reward.terms.

  Attributes:
    build: `(name, section, files, networks) -> Reward`. ValueError or FileNotFoundError where a
      file or a value can't be used.
    section: the section of config.reward that it reads; "" for none, and `build` then gets an empty
      one.
    blank: `(section, describe, published) -> fields` of the section with which nothing but JSON
      files is read and weights are random: what `plan` compiles. `describe` finds the JSON files of
      a checkpoint, `published` is the folder of those that this package brings.
    networks: its networks by their class in PyTorch.
  """

  build: Callable[[str, ConfigDict, Files, Networks], Reward]
  section: str = ""
  blank: Callable[[ConfigDict, Describe, Path], dict[str, Any]] = nothing_to_blank
  networks: dict[str, Network] = {}


def no_features(params: PyTree, prepared: PyTree) -> PyTree:
  """For rewards that need nothing of the prompt."""
  del params
  return prepared


def images(name: str, media: Media) -> Float[Array | np.ndarray, "b h w 3"]:
  """The pixels of a reward of single images. ValueError: a video."""
  if media.pixels.ndim != 4:
    raise ValueError(
      f"reward {name} scores images, not video: its pixels are {list(media.pixels.shape)}"
    )
  return media.pixels

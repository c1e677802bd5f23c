"""The interface of a reward: from prompts to features, and from media and features to scores."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dancegrpo_jax.pipelines.layout import Component, Layout, Network
from dancegrpo_jax.types import Media, PyTree


class Reward(NamedTuple):
  """A reward. All arrays have one row a sample; a score that could not be computed is NaN.

  Attributes:
    name: its name in the config.
    kind: "device" (traced into a program, sharded over the batch) or "host" (NumPy, called in a
      thread).
    terms: the names of its scores: `name`, or "name/part" each. If a host reward fails, all of them
      are NaN.
    score: for a device reward, `(params, media, features) -> {term: f32[b]}`; for a host reward,
      `(media of NumPy, examples) -> {term: f32[b]}`.
    prepare: for a device reward, `(examples) -> NumPy pytree` with one row an example, on the host.
      It gets blank examples too (prompt "", no metadata), from whose shapes programs are compiled.
    features: for a device reward, `(params, prepared) -> pytree` with one row an example, computed
      once a prompt.
    components: the networks whose parameters `params` holds; {} for none. `Component.folder` is the
      whole location here.
    embed: `(params, media) -> f32[b, d]`, embeddings of length 1, or None. `evaluate` measures
      retrieval and diversity with them.
    refusal: `(shape of a sample) -> text`, one line on why it can't score samples of this shape,
      with field and remedy; "" where it can. None where it scores all.
    any_part: whether its terms are known only when it's called. `build_rewards` then takes for
      `terms` those that the config asks for.
  """

  name: str
  kind: str
  terms: tuple[str, ...]
  score: Callable
  prepare: Callable | None = None
  features: Callable | None = None
  components: dict[str, Component] = {}
  embed: Callable | None = None
  refusal: Callable[[tuple[int, ...]], str] | None = None
  any_part: bool = False


class Files(NamedTuple):
  """The functions with which a reward reads its files. The assembly provides them.

  `field` below is the field of the config, for messages, and `source` its value.

  Attributes:
    folder: `(field, source, layout) -> Path`, the local folder of a checkpoint, which is fetched
      from the hub if necessary.
    file: `(field, source) -> Path`, a local weight file, or a folder with one.
    json: `(folder, name) -> dict`, a parsed JSON file.
    tokenizer: `(field, source, network's config.json) -> tokenizer`, a function from texts to ids.
  """

  folder: Callable[[str, str, Layout], Path]
  file: Callable[[str, str], Path]
  json: Callable[[Path, str], dict[str, Any]]
  tokenizer: Callable[[str, str, dict[str, Any]], Callable]


class Networks(NamedTuple):
  """How the networks of rewards are built, from the config's section `model`.

  Attributes:
    dtype: the dtype that they are stored and computed in.
    attention: the implementation, see `models.attention.attention`.
    scan_layers: whether the weights of the layers are stacked.
  """

  dtype: str
  attention: str = "auto"
  scan_layers: bool = False


Describe = Callable[[str, str, Layout], str]  # (field, source, layout) -> "random:FOLDER"


def nothing_to_blank(section: ConfigDict, describe: Describe, published: Path) -> dict[str, Any]:
  """`RewardKind.blank` of rewards without weights."""
  del section, describe, published
  return {}


class RewardKind(NamedTuple):
  """A kind of reward.

  rewards/kinds.py lists the kinds of this package. A config may name another one as "module:object"
  in reward.terms.

  Attributes:
    build: `(name, section, files, networks) -> Reward`. It raises ValueError or FileNotFoundError
      where a file or a value can't be used.
    section: the section of config.reward that it reads. "" means none, and `build` then gets an
      empty section.
    blank: `(section, describe, published) -> fields`. `plan` sets these fields of the section,
      after which weights are random and only JSON files are read. `describe` finds the JSON files
      of a checkpoint; `published` is the folder with those that come with this package.
    networks: its networks, by their class in PyTorch.
    of_images: whether it scores single images. On videos the field `frames` of its section then
      says which frames are scored, see rewards/frames.py.
  """

  build: Callable[[str, ConfigDict, Files, Networks], Reward]
  section: str = ""
  blank: Callable[[ConfigDict, Describe, Path], dict[str, Any]] = nothing_to_blank
  networks: dict[str, Network] = {}
  of_images: bool = False


def no_features(params: PyTree, prepared: PyTree) -> PyTree:
  """`Reward.features` of rewards that don't depend on the prompt."""
  del params
  return prepared


def images(name: str, media: Media) -> Float[Array | np.ndarray, "b h w 3"]:
  """The pixels, for a reward of single images.

  Raises:
    ValueError: the media are videos.
  """
  if media.pixels.ndim != 4:
    raise ValueError(
      f"reward {name} scores images, not video: its pixels are {list(media.pixels.shape)}"
    )
  return media.pixels

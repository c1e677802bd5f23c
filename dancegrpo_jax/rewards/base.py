"""The protocol of a reward: prompts become features once, then media and features become scores."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float

from dancegrpo_jax.pipelines.base import Component
from dancegrpo_jax.types import Media, PyTree


class Reward(NamedTuple):
  """A reward. One row a sample everywhere; a score is NaN where it failed.

  Attributes:
    name: its term is this name, or its terms are "name/part".
    kind: "device" (traced into a program, sharded over the batch) or "host" (numpy, called in a
      thread).
    prepare: `(examples) -> numpy pytree` with one row an example; host.
    features: device rewards: `(params, prepared) -> pytree` with one row an example, computed once
      a prompt.
    score: device: `(params, media, features) -> {term: f32[b]}`; host: `(media of numpy, examples)
      -> {term: f32[b]}`.
    components: what `params` consists of, {} for nothing; a `Component.folder` here is the whole
      location.
    embed: `(params, pixels) -> f32[b, d]` of length 1, where the reward has an image embedding:
      evaluate.py measures retrieval and diversity with it.
  """

  name: str
  kind: str
  prepare: Callable | None
  features: Callable | None
  score: Callable
  components: dict[str, Component] = {}
  embed: Callable | None = None


def no_features(params: PyTree, prepared: PyTree) -> PyTree:
  """For rewards that need nothing of the prompt."""
  del params
  return prepared


def images(name: str, media: Media) -> Float[Array, "b h w 3"]:
  """The pixels of a reward of single images. ValueError: a video."""
  if media.pixels.ndim != 4:
    raise ValueError(
      f"reward {name} scores images, not video: its pixels are {list(media.pixels.shape)}"
    )
  return media.pixels

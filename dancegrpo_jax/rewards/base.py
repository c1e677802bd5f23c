"""The protocol of a reward: prompts become features once, then media and features become scores."""

from collections.abc import Callable
from typing import NamedTuple

from dancegrpo_jax.pipelines.base import Component
from dancegrpo_jax.types import PyTree


class Reward(NamedTuple):
  """A reward. One row a sample everywhere; a score is NaN where it failed.

  Attributes:
    name: its term is this name, or its terms are "name/part".
    kind: "device" (traced into a program, sharded over the batch) or "host" (numpy, called in a thread).
    prepare: `(examples) -> numpy pytree` with one row an example; host.
    features: device rewards: `(params, prepared) -> pytree` with one row an example, computed once a prompt.
    score: device: `(params, media, features) -> {term: f32[b]}`; host: `(media of numpy, examples) -> {term: f32[b]}`.
    folder: of the weights, "" for none.
    component: what to load from it.
    embed: `(params, pixels) -> f32[b, d]` of length 1, where the reward has an image embedding: evaluate.py measures
      retrieval and diversity with it.
  """

  name: str
  kind: str
  prepare: Callable | None
  features: Callable | None
  score: Callable
  folder: str = ""
  component: Component | None = None
  embed: Callable | None = None


def no_features(params: PyTree, prepared: PyTree) -> PyTree:
  """For rewards that need nothing of the prompt."""
  del params
  return prepared

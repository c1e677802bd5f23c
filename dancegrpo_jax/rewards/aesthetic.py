"""LAION's aesthetic predictor v2: a linear score of CLIP ViT-L/14's image embedding, about 1 to 10,
not clipped.

Published as sac+logos+ava1-l14-linearMSE.pth
(https://github.com/christophschuhmann/improved-aesthetic-predictor).
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dancegrpo_jax.conversion.tables import clip as tables
from dancegrpo_jax.models.aesthetic import Head
from dancegrpo_jax.pipelines.layout import RANDOM, Component, is_random
from dancegrpo_jax.rewards.base import (
  Describe,
  Files,
  Networks,
  Reward,
  RewardKind,
  images,
  no_features,
)
from dancegrpo_jax.rewards.clip import (
  Checkpoint,
  describe_checkpoint,
  find_checkpoint,
  network_of,
  normalise,
)
from dancegrpo_jax.rewards.preprocess import preprocess
from dancegrpo_jax.types import Media, PyTree


def points(name: str, checkpoint: Checkpoint, head: str, networks: Networks) -> Reward:
  """The predictor as the term `name`.

  Args:
    name: of the reward and its one term.
    checkpoint: the CLIP whose image embeddings the head was trained on: openai's ViT-L/14.
    head: location of the head's weights.
    networks: how the towers are built. The head, of which a mean squared error in points is asked,
      is float32.
  """
  network, clip = network_of(checkpoint, networks)
  width = jax.ShapeDtypeStruct((1, network.projection_dim), jnp.float32)
  abstract = jax.eval_shape(Head().init, jax.random.key(0), width)["params"]

  def score(params: PyTree, media: Media, features: PyTree) -> dict[str, Float[Array, "b"]]:
    del features
    ready = preprocess(images(name, media), checkpoint.preprocessing)
    embedding = normalise(network.apply({"params": params["clip"]}, ready, method="image_features"))
    return {name: Head().apply({"params": params["head"]}, embedding)}

  return Reward(
    name=name,
    kind="device",
    terms=(name,),
    score=score,
    prepare=lambda examples: (),
    features=no_features,
    components={
      "clip": clip,
      "head": Component(folder=head, table=tables.AESTHETIC, abstract=abstract),
    },
  )


def build(name: str, section: ConfigDict, files: Files, networks: Networks) -> Reward:
  """The predictor as the term `name`; the section has `checkpoint` and `head`."""
  checkpoint = find_checkpoint("reward.aesthetic.checkpoint", section.checkpoint, files)
  head = section.head
  if not is_random(head):
    head = str(files.file("reward.aesthetic.head", head))
  return points(name, checkpoint, head, networks)


def blank(section: ConfigDict, describe: Describe, published: Path) -> dict[str, Any]:
  """The section with random weights."""
  del published
  place = describe_checkpoint("reward.aesthetic.checkpoint", section.checkpoint, describe)
  return {"checkpoint": place, "head": RANDOM}


KIND = RewardKind(build=build, section="aesthetic", blank=blank)

"""LAION's aesthetic predictor v2: a linear score of the image embedding of CLIP ViT-L/14.

The score is from about 1 to 10 and is not clipped. The head is published as
sac+logos+ava1-l14-linearMSE.pth (https://github.com/christophschuhmann/improved-aesthetic-predictor).
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
  """The predictor as a reward with one term.

  Args:
    name: the name of the reward and of its term.
    checkpoint: the CLIP whose image embeddings the head was trained on, which is openai's ViT-L/14.
    head: the location of the head's weights.
    networks: how CLIP's towers are built. The head is always float32, because the points that it
      computes must be exact.
  """
  network, clip = network_of(checkpoint, networks)
  width = jax.ShapeDtypeStruct((1, network.projection_dim), jnp.float32)
  abstract = jax.eval_shape(Head().init, jax.random.key(0), width)["params"]

  def score(params: PyTree, media: Media, features: PyTree) -> dict[str, Float[Array, "b"]]:
    del features
    pixels = preprocess(images(name, media), checkpoint.preprocessing)
    embedding = network.apply({"params": params["clip"]}, pixels, method="image_features")
    embedding = normalise(embedding)
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
  """The predictor; its section has `checkpoint` and `head`."""
  checkpoint = find_checkpoint("reward.aesthetic.checkpoint", section.checkpoint, files)
  head = section.head
  if not is_random(head):
    head = str(files.file("reward.aesthetic.head", head))
  return points(name, checkpoint, head, networks)


def blank(section: ConfigDict, describe: Describe, published: Path) -> dict[str, Any]:
  """The fields with which weights are random."""
  del published
  location = describe_checkpoint("reward.aesthetic.checkpoint", section.checkpoint, describe)
  return {"checkpoint": location, "head": RANDOM}


KIND = RewardKind(build=build, of_images=True, section="aesthetic", blank=blank)

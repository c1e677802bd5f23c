"""LAION's aesthetic predictor v2: a linear score of CLIP ViT-L/14's image embedding, about 1 to 10,
not clipped.

Published as sac+logos+ava1-l14-linearMSE.pth
(https://github.com/christophschuhmann/improved-aesthetic-predictor).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dancegrpo_jax.models.aesthetic import Head
from dancegrpo_jax.pipelines.base import Component
from dancegrpo_jax.rewards.base import Reward, images, no_features
from dancegrpo_jax.rewards.clip import Checkpoint, network_of, normalise
from dancegrpo_jax.rewards.preprocess import preprocess
from dancegrpo_jax.types import Media, PyTree


def build(
  checkpoint: Checkpoint, head: str, dtype: str, attention: str = "auto", scan_layers: bool = False
) -> Reward:
  """The term "aesthetic".

  Args:
    checkpoint: the CLIP whose image embeddings the head was trained on: openai's ViT-L/14.
    head: location of the head's weights.
    dtype: of the towers; the head, of which a mean squared error in points is asked, is float32.
    attention: see `models.attention.attention`.
    scan_layers: stack the towers' layers.
  """
  network, clip = network_of(checkpoint, dtype, attention, scan_layers)
  width = network.projection_dim
  abstract = jax.eval_shape(
    Head().init, jax.random.key(0), jax.ShapeDtypeStruct((1, width), jnp.float32)
  )["params"]

  def score(params: PyTree, media: Media, features: PyTree) -> dict[str, Float[Array, "b"]]:
    del features
    ready = preprocess(images("aesthetic", media), checkpoint.preprocessing)
    embedding = normalise(network.apply({"params": params["clip"]}, ready, method="image_features"))
    return {"aesthetic": Head().apply({"params": params["head"]}, embedding)}

  components = {"clip": clip, "head": Component(head, "AestheticHead", abstract)}
  return Reward("aesthetic", "device", lambda examples: (), no_features, score, components)

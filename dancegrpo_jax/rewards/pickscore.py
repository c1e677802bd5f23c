"""PickScore, a CLIP ViT-H/14 fine-tuned on Pick-a-Pic (Kirstain et al., arXiv 2305.01569): the
cosine.

Published as yuvalkirstain/PickScore_v1 in transformers' layout, used with the processor (tokenizer
and images) of laion/CLIP-ViT-H-14-laion2B-s32B-b79K. Its own scale multiplies the cosine by
exp(logit_scale), about 100, which the normalisation of advantages would take out again.
"""

from typing import Any

from dancegrpo_jax.models.clip import Clip
from dancegrpo_jax.rewards.clip import Checkpoint
from dancegrpo_jax.rewards.preprocess import Preprocessing

FILES = {"clip": "config.json"}
TOKENIZERS = ()


def checkpoint(location: str, config: dict[str, Any]) -> Checkpoint:
  """PickScore's checkpoint from its config.json; CLIP's own preprocessing."""
  return Checkpoint(
    location, "CLIPModel", config, Preprocessing(Clip.from_json(config).vision_model.image_size)
  )

"""PickScore, a CLIP ViT-H/14 that was fine-tuned on Pick-a-Pic (Kirstain et al., arXiv 2305.01569).

The checkpoint is published as yuvalkirstain/PickScore_v1 in transformers' layout. Its authors use
it with tokenizer and image preprocessing of laion/CLIP-ViT-H-14-laion2B-s32B-b79K. They multiply
the cosine by exp(logit_scale), about 100. The score here is the cosine itself, because the
normalisation of advantages would remove the factor.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dancegrpo_jax.conversion.tables import clip as tables
from dancegrpo_jax.models.clip import Clip
from dancegrpo_jax.pipelines.layout import layout_of, location_of
from dancegrpo_jax.rewards.base import Describe, Files, Networks, Reward, RewardKind
from dancegrpo_jax.rewards.clip import Checkpoint, cosine
from dancegrpo_jax.rewards.preprocess import Preprocessing

LAYOUT = layout_of({"clip": "config.json"}, {})


def checkpoint(location: str, config: dict[str, Any]) -> Checkpoint:
  """PickScore's checkpoint, from its config.json, with CLIP's preprocessing."""
  size = Clip.from_json(config).vision_model.image_size
  return Checkpoint(
    location=location, table=tables.CLIP, config=config, preprocessing=Preprocessing(size)
  )


def build(name: str, section: ConfigDict, files: Files, networks: Networks) -> Reward:
  """PickScore; its section has `checkpoint` and `tokenizer`."""
  folder = files.folder("reward.pickscore.checkpoint", section.checkpoint, LAYOUT)
  config = files.json(folder, "config.json")
  pickscore = checkpoint(location_of(section.checkpoint, folder), config)
  source = section.tokenizer or section.checkpoint
  tokenize = files.tokenizer("reward.pickscore.tokenizer", source, pickscore.config)
  return cosine(name, pickscore, tokenize, networks)


def blank(section: ConfigDict, describe: Describe, published: Path) -> dict[str, Any]:
  """The fields with which weights are random."""
  del published
  return {"checkpoint": describe("reward.pickscore.checkpoint", section.checkpoint, LAYOUT)}


KIND = RewardKind(build=build, of_images=True, section="pickscore", blank=blank)

"""HPS-v2.1, a ViT-H/14 fine-tuned on human preferences (Wu et al., arXiv 2306.09341): the cosine,
not times 100.

Published as `HPS_v2.1_compressed.pt` (https://huggingface.co/xswu/HPSv2): open_clip's names under
the key "state_dict", no configuration, no tokenizer of its own (it is CLIP's). Images: the longest
side to 224 in floats, zeros around, normalised last.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dancegrpo_jax.pipelines.layout import RANDOM, local_path, location_of
from dancegrpo_jax.rewards.base import Describe, Files, Networks, Reward, RewardKind
from dancegrpo_jax.rewards.clip import OPEN_CLIP_FILE, Checkpoint, cosine, open_clip_checkpoint

# ViT-H-14 of open_clip, with exact gelu; tgxs002/HPSv2 has the same values and sets
# light_augmentation, which is "longest".
CONFIG = {
  "model_cfg": {
    "embed_dim": 1024,
    "vision_cfg": {
      "image_size": 224,
      "layers": 32,
      "width": 1280,
      "head_width": 80,
      "patch_size": 14,
    },
    "text_cfg": {
      "context_length": 77,
      "vocab_size": 49408,
      "width": 1024,
      "heads": 16,
      "layers": 24,
    },
  },
  "preprocess_cfg": {"resize_mode": "longest"},
}


def checkpoint(location: str, config: dict[str, Any] | None = None) -> Checkpoint:
  """HPS's checkpoint; `config` (an open_clip_config.json) in place of ViT-H/14 where one lies
  beside the weights.

  Raises:
    ValueError: a network that is not implemented.
  """
  found = open_clip_checkpoint(location, CONFIG if config is None else config)
  # whatever the file says: HPSv2 resizes tensors, not PIL images
  return found._replace(preprocessing=found.preprocessing._replace(mode="longest", eight_bit=False))


def build(name: str, section: ConfigDict, files: Files, networks: Networks) -> Reward:
  """HPS as the term `name`; the section has `checkpoint`, a file, and `tokenizer`."""
  place = files.file("reward.hps.checkpoint", section.checkpoint)
  folder = place if place.is_dir() else place.parent
  described = (folder / OPEN_CLIP_FILE).is_file()
  config = files.json(folder, OPEN_CLIP_FILE) if described else None
  found = checkpoint(location_of(section.checkpoint, place), config)
  source = section.tokenizer or str(folder)
  tokenize = files.tokenizer("reward.hps.tokenizer", source, found.config)
  return cosine(name, found, tokenize, networks)


def blank(section: ConfigDict, describe: Describe, published: Path) -> dict[str, Any]:
  """The section with random weights: of the published network, unless a folder says otherwise."""
  del describe
  path = local_path(section.checkpoint)
  return {"checkpoint": f"{RANDOM}{path if path.exists() else published}"}


KIND = RewardKind(build=build, section="hps", blank=blank)

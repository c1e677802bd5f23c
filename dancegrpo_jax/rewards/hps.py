"""HPS-v2.1, a CLIP ViT-H/14 that was fine-tuned on human preferences (Wu et al., arXiv 2306.09341).

The score is the cosine, not multiplied by 100. The weights are published as
`HPS_v2.1_compressed.pt` (https://huggingface.co/xswu/HPSv2), with open_clip's names under the key
"state_dict", without a configuration and without a tokenizer, which is CLIP's. Images are resized
in floats so that the longest side is 224, padded with zeros, and normalised last.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dancegrpo_jax.pipelines.layout import RANDOM, local_path, location_of
from dancegrpo_jax.rewards.base import Describe, Files, Networks, Reward, RewardKind
from dancegrpo_jax.rewards.clip import OPEN_CLIP_FILE, Checkpoint, cosine, open_clip_checkpoint

# open_clip's ViT-H-14, with the exact gelu. tgxs002/HPSv2 has the same values and sets
# light_augmentation, which means resize_mode "longest".
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
  """HPS's checkpoint.

  Args:
    location: where the weights are.
    config: the open_clip_config.json beside the weights, or None, which means ViT-H/14.

  Raises:
    ValueError: the network is not implemented.
  """
  result = open_clip_checkpoint(location, CONFIG if config is None else config)
  # HPSv2 resizes tensors and not PIL images, whatever the file says.
  how = result.preprocessing._replace(mode="longest", eight_bit=False)
  return result._replace(preprocessing=how)


def build(name: str, section: ConfigDict, files: Files, networks: Networks) -> Reward:
  """HPS; its section has `checkpoint`, which is a file, and `tokenizer`."""
  path = files.file("reward.hps.checkpoint", section.checkpoint)
  folder = path if path.is_dir() else path.parent
  has_config = (folder / OPEN_CLIP_FILE).is_file()
  config = files.json(folder, OPEN_CLIP_FILE) if has_config else None
  hps = checkpoint(location_of(section.checkpoint, path), config)
  source = section.tokenizer or str(folder)
  tokenize = files.tokenizer("reward.hps.tokenizer", source, hps.config)
  return cosine(name, hps, tokenize, networks)


def blank(section: ConfigDict, describe: Describe, published: Path) -> dict[str, Any]:
  """The fields with which weights are random.

  The network is the published one, unless the checkpoint exists and describes another one.
  """
  del describe
  path = local_path(section.checkpoint)
  return {"checkpoint": f"{RANDOM}{path if path.exists() else published}"}


KIND = RewardKind(build=build, of_images=True, section="hps", blank=blank)

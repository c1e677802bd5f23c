"""The embedded emoji model with the reward of this folder, whose weight file is a config field."""

from ml_collections import ConfigDict

from configs import emoji_clip

PRESETS = emoji_clip.PRESETS


def get_config(preset: str = ""):
  """The presets are those of configs/emoji_clip.py."""
  config = emoji_clip.get_config(preset)
  config.name = "own_reward" + (f"_{preset}" if preset else "")
  config.reward.background = ConfigDict({"checkpoint": "examples/own_reward/weights.safetensors"})
  config.reward.terms = (("own_reward.reward:FROM_SECTION", 1.0),)
  return config

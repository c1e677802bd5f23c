"""FLUX.1-dev, reward = PickScore (cosine, without its own scale).

Hardware, memory and the model's weights: configs/flux.py. On top, computed and not measured:
ViT-H/14, 986.1 M parameters in bfloat16, 2.0 GB a device; from yuvalkirstain/PickScore_v1 of the
hub (3.9 GB on disk), tokenizer from laion/CLIP-ViT-H-14-laion2B-s32B-b79K.

    python -m dancegrpo_jax.main --config=configs/flux_pick.py
"""

from configs import flux

PRESETS = flux.PRESETS


def get_config(preset: str = ""):
  """Presets: see configs/flux.py."""
  config = flux.recipe("flux_pick", preset)
  config.reward.terms = (("pickscore", 1.0),)
  if preset == "tiny":
    config.reward.pickscore.update(checkpoint=flux.RANDOM_CLIP, tokenizer="")
  return config

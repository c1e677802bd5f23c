"""Stable Diffusion v1.4 with PickScore as its reward (the cosine, without PickScore's scale).

For hardware, memory and the model's weights see configs/stable_diffusion.py. The reward adds 2.0
GB, computed and not measured: a ViT-H/14 of 986.1 M parameters in bfloat16, from
yuvalkirstain/PickScore_v1 of the hub (3.9 GB on disk). Its tokenizer is that of
laion/CLIP-ViT-H-14-laion2B-s32B-b79K.

    python -m dancegrpo_jax.main --config=configs/sd_pick.py:1gpu --workdir=runs/sd_pick
"""

from configs import stable_diffusion

PRESETS = stable_diffusion.PRESETS


def get_config(preset: str = ""):
  """The config; for the presets see configs/stable_diffusion.py."""
  config = stable_diffusion.recipe("sd_pick", preset)
  config.reward.terms = (("pickscore", 1.0),)
  if preset == "tiny":
    config.reward.pickscore.update(checkpoint=stable_diffusion.RANDOM_CLIP, tokenizer="")
  return config

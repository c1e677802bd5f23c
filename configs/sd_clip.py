"""Stable Diffusion v1.4 with the CLIP score as its reward (the cosine of image and prompt).

For hardware, memory and the model's weights see configs/stable_diffusion.py. The reward adds 0.9
GB, computed and not measured: CLIP ViT-L/14, 427.6 M parameters in bfloat16, from
openai/clip-vit-large-patch14 of the hub (1.7 GB on disk). The paper scores with DFN5B's ViT-H/14
(986.1 M, 2.0 GB). For that, download apple/DFN5B-CLIP-ViT-H-14 into a folder, give the folder to
--config.reward.clip.checkpoint, and use
--config.reward.clip.tokenizer=openai/clip-vit-large-patch14.

    python -m dancegrpo_jax.main --config=configs/sd_clip.py:1gpu --workdir=runs/sd_clip
"""

from configs import stable_diffusion

PRESETS = stable_diffusion.PRESETS


def get_config(preset: str = ""):
  """The config; for the presets see configs/stable_diffusion.py."""
  config = stable_diffusion.recipe("sd_clip", preset)
  config.reward.terms = (("clip", 1.0),)
  config.reward.clip.checkpoint = "openai/clip-vit-large-patch14"
  if preset == "tiny":
    config.reward.clip.checkpoint = stable_diffusion.RANDOM_CLIP
  return config

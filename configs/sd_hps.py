"""Stable Diffusion v1.4 with HPS-v2.1 as its reward: the main experiment of the paper, which takes
HPS from .239 to .365.

For hardware, memory and the model's weights see configs/stable_diffusion.py. The reward adds 2.0
GB, computed and not measured: a ViT-H/14 of 986.1 M parameters in bfloat16. Its weights are a
pickle, which is read by torch's weights_only loader, and only if it is allowed:

    hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir checkpoints/HPSv2
    python -m dancegrpo_jax.main --config=configs/sd_hps.py:1gpu --config.model.allow_pickle=true
"""

from configs import stable_diffusion

PRESETS = stable_diffusion.PRESETS


def get_config(preset: str = ""):
  """The config; for the presets see configs/stable_diffusion.py."""
  config = stable_diffusion.recipe("sd_hps", preset)
  config.reward.terms = (("hps", 1.0),)
  if preset == "tiny":
    config.reward.hps.update(checkpoint=stable_diffusion.RANDOM_CLIP, tokenizer="")
  return config

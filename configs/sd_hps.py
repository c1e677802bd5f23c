"""Stable Diffusion v1.4, reward = HPS-v2.1: the paper's main experiment (.239 -> .365 there).

Hardware, memory and the model's weights: configs/stable_diffusion.py. On top, computed and not
measured: ViT-H/14, 986.1 M parameters in bfloat16, 2.0 GB. Its weights are a pickle; it is read
through torch's weights_only loader and only if allowed:

    hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir checkpoints/HPSv2
    python -m dancegrpo_jax.main --config=configs/sd_hps.py:1gpu --config.model.allow_pickle=true
"""

from configs import stable_diffusion

PRESETS = stable_diffusion.PRESETS


def get_config(preset: str = ""):
  """Presets: see configs/stable_diffusion.py."""
  config = stable_diffusion.recipe("sd_hps", preset)
  config.reward.terms = (("hps", 1.0),)
  if preset == "tiny":
    config.reward.hps.update(checkpoint=stable_diffusion.RANDOM_CLIP, tokenizer="")
  return config

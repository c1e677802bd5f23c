r"""Stable Diffusion v1.4 with two rewards, HPS-v2.1 and the CLIP score.

They are added as advantages with weights 0.7 and 1.4 [C]. With HPS alone, images become oily. CLIP
keeps them close to the prompt. In the paper both together reach HPS .335 and CLIP .395; HPS alone
reaches .365 and .380.

For hardware, memory and the model's weights see configs/stable_diffusion.py, and for the rewards'
weights sd_hps.py and sd_clip.py. The rewards add 2.8 GB, computed and not measured: 1413.7 M
parameters in bfloat16.

    python -m dancegrpo_jax.main --config=configs/sd_hps_clip.py:1gpu \
      --config.model.allow_pickle=true
"""

from configs import stable_diffusion

PRESETS = stable_diffusion.PRESETS


def get_config(preset: str = ""):
  """The config; for the presets see configs/stable_diffusion.py."""
  config = stable_diffusion.recipe("sd_hps_clip", preset)
  config.reward.terms = (("hps", 0.7), ("clip", 1.4))
  config.reward.combine = "advantages"
  config.reward.clip.checkpoint = "openai/clip-vit-large-patch14"
  if preset == "tiny":
    config.reward.clip.checkpoint = stable_diffusion.RANDOM_CLIP
    config.reward.hps.update(checkpoint=stable_diffusion.RANDOM_CLIP, tokenizer="")
  return config

"""Stable Diffusion v1.4, two rewards: HPS-v2.1 and CLIP score, added as advantages with weights 0.7
and 1.4 [C].

HPS alone drives images to an oily look; CLIP holds them to the prompt (paper: HPS .335, CLIP .395
together, .365 and .380 with HPS alone). Hardware, memory and the model's weights:
configs/stable_diffusion.py; the rewards' weights: sd_hps.py and sd_clip.py. On top, computed and
not measured: 1413.7 M parameters in bfloat16, 2.8 GB.

    python -m dancegrpo_jax.main --config=configs/sd_hps_clip.py:1gpu
    --config.model.allow_pickle=true
"""

from configs import stable_diffusion

PRESETS = stable_diffusion.PRESETS


def get_config(preset: str = ""):
  """Presets: see configs/stable_diffusion.py."""
  config = stable_diffusion.recipe("sd_hps_clip", preset)
  config.reward.terms = (("hps", 0.7), ("clip", 1.4))
  config.reward.combine = "advantages"
  config.reward.clip.checkpoint = "openai/clip-vit-large-patch14"
  if preset == "tiny":
    config.reward.clip.checkpoint = stable_diffusion.RANDOM_CLIP
    config.reward.hps.update(checkpoint=stable_diffusion.RANDOM_CLIP, tokenizer="")
  return config

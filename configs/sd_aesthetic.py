r"""Stable Diffusion v1.4 with LAION's aesthetic predictor v2 as its reward.

The score is in points from about 1 to 10, and the predictor doesn't know the prompt. For hardware,
memory and the model's weights see configs/stable_diffusion.py. The reward adds 0.9 GB, computed and
not measured: CLIP ViT-L/14, 427.6 M parameters in bfloat16, from openai/clip-vit-large-patch14 of
the hub, and the predictor's head (1 M, float32). The head is a pickle, which belongs into
checkpoints/: sac+logos+ava1-l14-linearMSE.pth of
https://github.com/christophschuhmann/improved-aesthetic-predictor.

    python -m dancegrpo_jax.main --config=configs/sd_aesthetic.py:1gpu \
      --config.model.allow_pickle=true
"""

from configs import stable_diffusion

PRESETS = stable_diffusion.PRESETS


def get_config(preset: str = ""):
  """The config; for the presets see configs/stable_diffusion.py."""
  config = stable_diffusion.recipe("sd_aesthetic", preset)
  config.reward.terms = (("aesthetic", 1.0),)
  if preset == "tiny":
    config.reward.aesthetic.update(checkpoint=stable_diffusion.RANDOM_CLIP, head="random:")
  return config

"""FLUX.1-dev with HPS-v2.1 as its reward: the main image experiment of the paper, which takes HPS
from .304 to .372.

This is the recipe for 16 GPUs of 80 GB. For hardware, memory and the model's weights see
configs/flux.py. The reward adds 2.0 GB a device, computed and not measured: a ViT-H/14 of 986.1 M
parameters in bfloat16. Its weights are a pickle, which is read by torch's weights_only loader, and
only if it is allowed:

    hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir checkpoints/HPSv2
    python -m dancegrpo_jax.main --config=configs/flux_hps.py --config.model.allow_pickle=true
"""

from configs import flux

PRESETS = flux.PRESETS


def get_config(preset: str = ""):
  """The config; for the presets see configs/flux.py."""
  config = flux.recipe("flux_hps", preset)
  config.reward.terms = (("hps", 1.0),)
  if preset == "tiny":
    config.reward.hps.update(checkpoint=flux.RANDOM_CLIP, tokenizer="")
  return config

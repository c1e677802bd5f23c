"""FLUX.1-dev, reward = HPS-v2.1: the paper's main image experiment (.304 -> .372 there), the recipe
for 16 GPUs of 80 GB.

Hardware, memory and the model's weights: configs/flux.py. On top, computed and not measured:
ViT-H/14, 986.1 M parameters in bfloat16, 2.0 GB a device. Its weights are a pickle; it is read
through torch's weights_only loader and only if allowed:

    hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir checkpoints/HPSv2
    python -m dancegrpo_jax.main --config=configs/flux_hps.py --config.model.allow_pickle=true
"""

from configs import flux

PRESETS = flux.PRESETS


def get_config(preset: str = ""):
  """Presets: see configs/flux.py."""
  config = flux.recipe("flux_hps", preset)
  config.reward.terms = (("hps", 1.0),)
  if preset == "tiny":
    config.reward.hps.update(checkpoint=flux.RANDOM_CLIP, tokenizer="")
  return config

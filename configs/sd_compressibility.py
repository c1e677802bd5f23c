"""Stable Diffusion v1.4, reward = -kB as a JPEG of quality 95 (DDPO, arXiv 2305.13301): the task
that needs no reward model.

Hardware, memory and the model's weights: configs/stable_diffusion.py; the reward runs on the host.
Incompressibility: --config.reward.compressibility.sign=1.

    python -m dancegrpo_jax.main --config=configs/sd_compressibility.py:1gpu
    --workdir=runs/sd_compressibility
"""

from configs import stable_diffusion

PRESETS = stable_diffusion.PRESETS


def get_config(preset: str = ""):
  """Presets: see configs/stable_diffusion.py."""
  config = stable_diffusion.recipe("sd_compressibility", preset)
  config.reward.terms = (("compressibility", 1.0),)
  config.reward.compressibility.update(quality=95, sign=-1.0)
  return config

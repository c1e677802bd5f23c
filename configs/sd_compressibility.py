r"""Stable Diffusion v1.4 with -kB as a JPEG of quality 95 as its reward (DDPO, arXiv 2305.13301).

This task needs no reward model; the reward is computed on the host. For hardware, memory and the
model's weights see configs/stable_diffusion.py. --config.reward.compressibility.sign=1 rewards
large files instead (incompressibility).

    python -m dancegrpo_jax.main --config=configs/sd_compressibility.py:1gpu \
      --workdir=runs/sd_compressibility
"""

from configs import stable_diffusion

PRESETS = stable_diffusion.PRESETS


def get_config(preset: str = ""):
  """The config; for the presets see configs/stable_diffusion.py."""
  config = stable_diffusion.recipe("sd_compressibility", preset)
  config.reward.terms = (("compressibility", 1.0),)
  config.reward.compressibility.update(quality=95, sign=-1.0)
  return config

"""FLUX.1-dev, two rewards: HPS-v2.1 and CLIP score, added as advantages with weights 0.7 and 1.4.

HPS alone drives images to an oily look and lowers GenEval (.659 -> .561); CLIP holds them to the
prompt (paper: HPS .343, CLIP .427 and GenEval .687 together, .372 and .376 with HPS alone). The
weights are those of the published Stable Diffusion run; FLUX's own aren't known. Hardware, memory
and the model's weights: configs/flux.py; the rewards' weights: flux_hps.py and sd_clip.py. On top,
computed and not measured: 1413.7 M parameters in bfloat16, 2.8 GB a device.

    python -m dancegrpo_jax.main --config=configs/flux_hps_clip.py --config.model.allow_pickle=true
"""

from configs import flux

PRESETS = flux.PRESETS


def get_config(preset: str = ""):
  """Presets: see configs/flux.py."""
  config = flux.recipe("flux_hps_clip", preset)
  config.reward.terms = (("hps", 0.7), ("clip", 1.4))
  config.reward.combine = "advantages"
  config.reward.clip.checkpoint = "openai/clip-vit-large-patch14"
  if preset == "tiny":
    config.reward.clip.checkpoint = flux.RANDOM_CLIP
    config.reward.hps.update(checkpoint=flux.RANDOM_CLIP, tokenizer="")
  return config

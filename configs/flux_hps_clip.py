"""FLUX.1-dev with two rewards, HPS-v2.1 and the CLIP score.

They are added as advantages with weights 0.7 and 1.4, which are those of the published Stable
Diffusion run, because FLUX's are not known. With HPS alone, images become oily and GenEval falls
(.659 -> .561). CLIP keeps images close to the prompt. In the paper both together reach HPS .343,
CLIP .427 and GenEval .687; HPS alone reaches HPS .372 and CLIP .376.

For hardware, memory and the model's weights see configs/flux.py, and for the rewards' weights
flux_hps.py and sd_clip.py. The rewards add 2.8 GB a device, computed and not measured: 1413.7 M
parameters in bfloat16.

    python -m dancegrpo_jax.main --config=configs/flux_hps_clip.py --config.model.allow_pickle=true
"""

from configs import flux

PRESETS = flux.PRESETS


def get_config(preset: str = ""):
  """The config; for the presets see configs/flux.py."""
  config = flux.recipe("flux_hps_clip", preset)
  config.reward.terms = (("hps", 0.7), ("clip", 1.4))
  config.reward.combine = "advantages"
  config.reward.clip.checkpoint = "openai/clip-vit-large-patch14"
  if preset == "tiny":
    config.reward.clip.checkpoint = flux.RANDOM_CLIP
    config.reward.hps.update(checkpoint=flux.RANDOM_CLIP, tokenizer="")
  return config

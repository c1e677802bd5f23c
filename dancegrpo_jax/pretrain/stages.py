"""The stages of pretraining, in their order, and what other modules need of them.

`frames` and `vae` train an autoencoder, `clip` is contrastive, `denoiser` trains Stable Diffusion's
UNet and text encoder, `flow` trains FLUX's transformer and both its text encoders, and `video`
those of HunyuanVideo. The last three are trained on the autoencoder's latents, so that they need
its folder.
"""

from dancegrpo_jax.pretrain.clip import clip_preprocessor, clip_stage
from dancegrpo_jax.pretrain.denoiser import denoiser_stage, model_index
from dancegrpo_jax.pretrain.flow import flow_stage, flux_index
from dancegrpo_jax.pretrain.shared import (
  Data,
  Stage,
  all_captions,
  token_ids,
  write_json,
  write_tokenizer_files,
)
from dancegrpo_jax.pretrain.vae import frames_stage, vae_stage
from dancegrpo_jax.pretrain.video import hunyuan_video_index, video_stage

__all__ = [
  "STAGES",
  "Data",
  "Stage",
  "all_captions",
  "clip_preprocessor",
  "flux_index",
  "hunyuan_video_index",
  "model_index",
  "token_ids",
  "write_json",
  "write_tokenizer_files",
]

STAGES = {
  "frames": frames_stage,
  "vae": vae_stage,
  "clip": clip_stage,
  "denoiser": denoiser_stage,
  "flow": flow_stage,
  "video": video_stage,
}

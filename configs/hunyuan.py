"""What the hunyuan_*.py files share: DanceGRPO's recipe for HunyuanVideo.

Sampler, objective and optimizer are those of the published code [C], finetune_hunyuan_grpo.sh: the
dance SDE at level 0.25 in 16 steps, time shift 5, and a random 60 % of the 15 stochastic steps (9).
That code gives the network a guidance of 6018, which is 6016 in bfloat16: 1000 times the embedded
guidance below.

Memory, computed from the numbers of parameters and not measured, in GB of 10^9 bytes. All devices
together hold this, split over mesh.fsdp:
  256.4  transformer of 12.82 B parameters in float32: weights 51.3, Adam's moments 102.6, gradients
         and their sum 102.6
The language model, of which 7.07 B parameters are used (14.1 in bfloat16), is not resident:
`data.cache_embeddings` encodes all prompts before the transformer is loaded. Every device holds the
autoencoder as a whole, 0.5 for 246.5 M parameters in bfloat16. While an iteration has several
optimizer steps the state before it is kept as well, another 154 over all devices.

Weights: hunyuanvideo-community/HunyuanVideo of the Hugging Face hub, 42 GB in diffusers' layout.
They are fetched unless they are cached.
"""

from ml_collections import ConfigDict

from configs import common

# See configs/flux.py for why kernels are split along their second last axis. mesh.tensor is 1
# unless a run is told otherwise. Over it, the heads and the hidden units of a block are split: the
# kernels that make them along their last axis, and those that take them along the axis before it.
_BLOCKS = "denoiser/(single_)?transformer_blocks/.*"
_MAKE = "(to_[qkv]|add_[qkv]_proj|net_0/proj|proj_mlp)"
_TAKE = "(to_out_0|to_add_out|net_2)"
SPLIT = (
  (f"{_BLOCKS}/{_MAKE}/kernel", ("...", "fsdp", "tensor")),
  (f"{_BLOCKS}/{_MAKE}/bias", ("...", ("tensor", "fsdp"))),
  (f"{_BLOCKS}/{_TAKE}/kernel", ("...", ("tensor", "fsdp"), None)),
  (f"{_BLOCKS}/kernel", ("...", "fsdp", None)),
  (f"{_BLOCKS}/bias", ("...", "fsdp")),
  ("denoiser/context_embedder/.*/kernel", ("...", "fsdp", None)),
  ("denoiser/(norm_out|time_text_embed)/.*kernel", ("fsdp", None)),
  ("text_encoder/layers/.*/kernel", ("...", "fsdp", None)),
  ("text_encoder/embed_tokens/embedding", (None, "fsdp")),
  ("text_encoder_2/encoder/.*/kernel", ("...", "fsdp", None)),
  (".*", ()),
)


def recipe(name: str, preset: str) -> ConfigDict:
  """The config of a run, without its samples, its batches and its reward.

  Args:
    name: the name of the run's file.
    preset: of that file; "" for none.
  """
  config = common.get_config()
  config.name = name + (f"_{preset}" if preset else "")
  config.model.update(
    family="hunyuan_video",
    checkpoint="hunyuanvideo-community/HunyuanVideo",
    dtype="bfloat16",
    frozen_dtype="bfloat16",
    remat=True,
    scan_blocks=True,
    text_length=256,
  )
  config.data.cache_embeddings = True
  config.sampler.update(
    kind="dance",
    noise_level=0.25,
    steps=16,
    shift=5.0,
    guidance_scale=1.0,  # one forward pass a step, because the model is guidance-distilled
    embedded_guidance=6.016,
    last_step="ode",  # 15 of 16 steps are stochastic
  )
  config.rollout.shared_noise = True
  config.objective.update(clip_range=1e-4, timesteps="random", timestep_fraction=0.6)  # 9 of 15
  config.optimizer.update(
    learning_rate=1e-5,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=1e-4,
    max_grad_norm=1.0,
  )
  config.advantage.clamp = 5.0
  config.mesh.update(data=1, fsdp=-1, rules=SPLIT)
  return config

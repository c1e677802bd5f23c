"""How the embedded models in assets/ were made, by `python -m dancegrpo_jax.pretrain` (2 CPU cores; times in assets/README.md).

Three stages, each a folder of weights: vae -> assets/emoji-sd/vae, clip -> assets/emoji-clip, denoiser -> the rest of
assets/emoji-sd. The networks are the published classes with small numbers; their config.json values stand here.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "") -> ConfigDict:
  """`""` is what made the assets; `tiny` runs every stage in seconds, for tests."""
  config = ConfigDict()
  config.name = "emoji_pretrain"
  config.seed = 0
  config.size = 32  # pixels
  config.variants = 8  # pictures of each (name, colour) pair
  config.tokens = 16  # length of a tokenised caption

  config.vae = ConfigDict({
    "steps": 2400,
    "batch": 32,
    "learning_rate": 2e-3,
    "warmup": 100,
    "kl_weight": 1e-4,  # of the KL to N(0, 1), mean over latent elements
    "ema": 0.995,
    "network": ConfigDict({
      "_class_name": "AutoencoderKL",
      "in_channels": 3,
      "out_channels": 3,
      "down_block_types": ("DownEncoderBlock2D",) * 3,
      "up_block_types": ("UpDecoderBlock2D",) * 3,
      "block_out_channels": (16, 32, 64),
      "layers_per_block": 1,
      "latent_channels": 4,
      "norm_num_groups": 8,
      "act_fn": "silu",
      "sample_size": 32,
    }),
  })

  config.clip = ConfigDict({
    "steps": 600,
    "batch": 128,  # distinct pairs, so that every caption has one picture
    "learning_rate": 1e-3,
    "warmup": 100,
    "pixel_noise": 0.1,  # largest std of white noise added to pixels in [0, 1], so that the score survives imperfect samples
    "ema": 0.99,
    "text": ConfigDict({
      "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
      "max_position_embeddings": 16, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    }),  # fmt: skip
    "vision": ConfigDict({
      "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
      "image_size": 32, "patch_size": 8, "num_channels": 3, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    }),  # fmt: skip
    "projection_dim": 64,
  })

  config.denoiser = ConfigDict({
    "steps": 1800,
    "batch": 64,
    "learning_rate": 1e-3,
    "warmup": 100,
    "caption_dropout": 0.1,  # share of captions replaced by "", for classifier-free guidance
    "ema": 0.999,
    "network": ConfigDict({
      "_class_name": "UNet2DConditionModel",
      "in_channels": 4,
      "out_channels": 4,
      "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
      "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
      "block_out_channels": (64, 128),
      "layers_per_block": 1,
      "cross_attention_dim": 128,
      "attention_head_dim": 4,
      "norm_num_groups": 16,
      "norm_eps": 1e-5,
      "act_fn": "silu",
      "flip_sin_to_cos": True,
      "freq_shift": 0,
      "sample_size": 8,
    }),
    "text": ConfigDict({
      "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
      "max_position_embeddings": 16, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    }),  # fmt: skip
    "scheduler": ConfigDict({
      "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
      "beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False,
      "prediction_type": "epsilon", "timestep_spacing": "leading",
    }),  # fmt: skip
  })
  if preset == "tiny":
    config.variants = 1
    for stage in (config.vae, config.clip, config.denoiser):
      stage.update(steps=3, batch=8, warmup=1)
  return config


PRESETS = ("", "tiny")

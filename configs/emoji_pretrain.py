"""How `python -m dancegrpo_jax.pretrain` made the embedded models in assets/, on 2 CPU cores.

assets/README.md has the times. Each of four stages writes a folder of weights: vae ->
assets/emoji-sd/vae, clip -> assets/emoji-clip, denoiser -> the rest of assets/emoji-sd, flow ->
assets/emoji-flux, with the same autoencoder. The networks are small versions of the published
classes. The values of their config.json files are those below.
"""

from ml_collections import ConfigDict

# CLIP's text tower, of the reward, of Stable Diffusion and of FLUX's pooled text.
TEXT = {
  "hidden_size": 128,
  "intermediate_size": 512,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "max_position_embeddings": 16,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
}


def get_config(preset: str = "") -> ConfigDict:
  """The config.

  Args:
    preset: "" for the config that made the assets; "tiny" for stages of seconds, for tests.
  """
  config = ConfigDict()
  config.name = "emoji_pretrain"
  config.seed = 0
  config.world = "emoji"  # the data set
  config.stages = ("vae", "clip", "denoiser", "flow")  # of --stage=all, in this order
  config.folder = "emoji-sd"  # whose folder vae holds the autoencoder
  config.tokenizer = "emoji-sd/tokenizer"  # CLIP's, for all networks
  config.size = 32  # pixels
  config.variants = 8  # pictures of each (name, colour) pair
  config.tokens = 16  # length of a tokenised caption

  config.vae = ConfigDict(
    {
      "steps": 2400,
      "from_frames": False,
      "crop_steps": 0,  # all steps see whole pictures
      "batch": 32,
      "learning_rate": 2e-3,
      "warmup": 100,
      "error": "absolute",  # of pixels, or squared
      "kl_weight": 1e-4,  # of the KL to N(0, 1), mean over latent elements
      "log_variance": 0.0,  # of the first posteriors
      "ema": 0.995,
      "network": ConfigDict(
        {
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
        }
      ),
    }
  )

  config.clip = ConfigDict(
    {
      "folder": "emoji-clip",
      "steps": 600,
      "batch": 128,  # distinct pairs, so that every caption has one picture
      "negatives": 0,  # further captions of a sample's group
      "learning_rate": 1e-3,
      "warmup": 100,
      "position_std": 0.02,  # of the first position embeddings of images
      # The largest std of white noise that is added to pixels in [0, 1], so that the score is right
      # for imperfect samples too.
      "pixel_noise": 0.1,
      "ema": 0.99,
      "text": ConfigDict(TEXT),
      "vision": ConfigDict(
        {
          "hidden_size": 128,
          "intermediate_size": 512,
          "num_hidden_layers": 4,
          "num_attention_heads": 4,
          "image_size": 32,
          "patch_size": 8,
          "num_channels": 3,
          "hidden_act": "quick_gelu",
          "layer_norm_eps": 1e-5,
        }
      ),
      "projection_dim": 64,
    }
  )

  config.denoiser = ConfigDict(
    {
      "steps": 1800,
      "batch": 64,
      "learning_rate": 1e-3,
      "warmup": 100,
      "caption_dropout": 0.1,  # share of captions replaced by "", for classifier-free guidance
      "ema": 0.999,
      "network": ConfigDict(
        {
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
        }
      ),
      "text": ConfigDict(TEXT),
      "scheduler": ConfigDict(
        {
          "_class_name": "DDIMScheduler",
          "num_train_timesteps": 1000,
          "beta_start": 0.00085,
          "beta_end": 0.012,
          "beta_schedule": "scaled_linear",
          "set_alpha_to_one": False,
          "steps_offset": 1,
          "clip_sample": False,
          "prediction_type": "epsilon",
          "timestep_spacing": "leading",
        }
      ),
    }
  )

  config.flow = ConfigDict(
    {
      "steps": 350,
      "batch": 64,
      "learning_rate": 1.5e-3,
      "warmup": 100,
      "ema": 0.99,
      "text_length": 12,  # of T5's tokens
      "network": ConfigDict(
        {
          "_class_name": "FluxTransformer2DModel",
          "in_channels": 16,  # 2x2 squares of 4 channels
          "num_layers": 3,
          "num_single_layers": 4,
          "attention_head_dim": 32,
          "num_attention_heads": 4,
          "joint_attention_dim": 128,
          "pooled_projection_dim": 128,
          "guidance_embeds": False,
          "axes_dims_rope": (4, 14, 14),
          "patch_size": 1,
        }
      ),
      "pooler": ConfigDict(TEXT),
      "text": ConfigDict(
        {
          "d_model": 128,
          "d_kv": 32,
          "d_ff": 256,
          "num_layers": 2,
          "num_heads": 4,
          "layer_norm_epsilon": 1e-6,
          "relative_attention_num_buckets": 32,
          "relative_attention_max_distance": 128,
          "feed_forward_proj": "gated-gelu",
          "pad_token_id": 0,
          "tie_word_embeddings": False,
        }
      ),
      "scheduler": ConfigDict(
        {
          "_class_name": "FlowMatchEulerDiscreteScheduler",
          "num_train_timesteps": 1000,
          "shift": 1.0,
          "use_dynamic_shifting": False,
        }
      ),
    }
  )
  if preset == "tiny":
    _tiny(config)
  return config


def _tiny(config: ConfigDict) -> None:
  """Changes the config to three steps of networks with few layers, which compile fast."""
  config.variants = 1
  for stage in (config.vae, config.clip, config.denoiser, config.flow):
    stage.update(steps=3, batch=8, warmup=1)
  config.vae.network.update(
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(8, 8),
  )
  for tower in (config.clip.text, config.clip.vision, config.denoiser.text, config.flow.pooler):
    tower.num_hidden_layers = 1
  config.denoiser.network.update(
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    block_out_channels=(64,),
    sample_size=16,
  )
  config.flow.network.update(num_layers=1, num_single_layers=1)
  config.flow.text.num_layers = 1


PRESETS = ("", "tiny")

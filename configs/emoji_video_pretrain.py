"""How `python -m dancegrpo_jax.pretrain` made the embedded models of clips, on 2 CPU cores.

assets/README.md has the times. Each of four stages writes a folder of weights: frames ->
emoji-video-frames, which only the next one needs, vae -> assets/emoji-video/vae, clip ->
assets/emoji-video-clip, video -> the rest of assets/emoji-video. The networks are small versions of
the published classes of HunyuanVideo and CLIP. The values of their config.json files are those
below.
"""

from ml_collections import ConfigDict

# CLIP's text tower, of the reward and of the pooled text.
TEXT = {
  "hidden_size": 128,
  "intermediate_size": 512,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
}


def get_config(preset: str = "") -> ConfigDict:
  """The config.

  Args:
    preset: "" for the config that made the assets; "tiny" for stages of seconds, for tests.
  """
  config = ConfigDict()
  config.name = "emoji_video_pretrain"
  config.seed = 0
  config.world = "moving_emoji"  # the data set
  config.stages = ("frames", "vae", "clip", "video")  # of --stage=all, in this order
  config.folder = "emoji-video"  # whose folder vae holds the autoencoder
  config.tokenizer = "emoji-video/tokenizer_2"  # CLIP's, for all networks
  config.size = 32  # pixels
  config.variants = 4  # clips of each scene
  config.jitter_share = 0.3  # share of clips that shake

  # The autoencoder on single frames. Its network, its loss and its start are those of vae.
  config.frames = ConfigDict(
    {
      "folder": "emoji-video-frames",
      "steps": 4000,
      "crop": 16,
      "batch": 16,
      "learning_rate": 2e-3,
      "warmup": 50,
      "ema": 0.995,
    }
  )

  config.vae = ConfigDict(
    {
      "from_frames": True,  # starts from the weights of the stage frames
      "steps": 1900,
      "crop_steps": 1500,  # the first ones, on crops
      "crop_batch": 8,
      "crop": 16,  # side of the crops, pixels
      "batch": 4,  # of whole clips, for the remaining steps
      "learning_rate": 1.5e-3,
      "warmup": 50,
      "error": "squared",  # of pixels, or absolute
      "kl_weight": 1e-4,  # of the KL to N(0, 1), mean over latent elements
      "log_variance": -6.0,  # of the first posteriors: little noise, so that colours pass at once
      "ema": 0.995,
      "network": ConfigDict(
        {
          "_class_name": "AutoencoderKLHunyuanVideo",
          "in_channels": 3,
          "out_channels": 3,
          "latent_channels": 8,
          "down_block_types": ("HunyuanVideoDownBlock3D",) * 3,
          "up_block_types": ("HunyuanVideoUpBlock3D",) * 3,
          "block_out_channels": (16, 16, 32),
          "layers_per_block": 1,
          # Groups of 8 channels at least. A norm takes a group's mean and size away, and with fewer
          # channels the colour of the background hardly passes the last one.
          "norm_num_groups": 2,
          "act_fn": "silu",
          "spatial_compression_ratio": 4,
          "temporal_compression_ratio": 4,
          "mid_block_add_attention": True,
        }
      ),
    }
  )

  config.clip = ConfigDict(
    {
      "folder": "emoji-video-clip",
      "steps": 1500,
      "batch": 60,  # distinct captions
      "negatives": 4,  # further captions of a sample: the same emoji, and each other motion
      "learning_rate": 1e-3,
      "warmup": 100,
      # Of the first position embeddings. Whether an emoji moves left or right is a matter of which
      # frame it is where. With the usual 0.02 that is learned many times more slowly.
      "position_std": 1.0,
      # The largest std of white noise that is added to pixels in [0, 1], so that the score is right
      # for imperfect samples too.
      "pixel_noise": 0.1,
      "ema": 0.99,
      "text": ConfigDict({**TEXT, "max_position_embeddings": 16}),
      "vision": ConfigDict(
        {
          "hidden_size": 128,
          "intermediate_size": 512,
          "num_hidden_layers": 4,
          "num_attention_heads": 4,
          "image_size": 96,  # 3 x 3 frames
          "patch_size": 16,
          "num_channels": 3,
          "hidden_act": "quick_gelu",
          "layer_norm_eps": 1e-5,
        }
      ),
      "projection_dim": 64,
    }
  )

  config.video = ConfigDict(
    {
      "steps": 2600,
      "batch": 64,
      "learning_rate": 1.5e-3,
      "warmup": 100,
      "ema": 0.99,
      "text_length": 16,  # of Llama's tokens
      "random_motion": 0.35,  # share of captions that name a motion at random
      "network": ConfigDict(
        {
          "_class_name": "HunyuanVideoTransformer3DModel",
          "in_channels": 8,
          "out_channels": 8,
          "num_attention_heads": 4,
          "attention_head_dim": 32,
          "num_layers": 2,
          "num_single_layers": 4,
          "num_refiner_layers": 1,
          "mlp_ratio": 4.0,
          "patch_size": 2,
          "patch_size_t": 1,
          "qk_norm": "rms_norm",
          "guidance_embeds": False,
          "text_embed_dim": 128,
          "pooled_projection_dim": 128,
          "rope_theta": 256.0,
          "rope_axes_dim": (8, 12, 12),
        }
      ),
      # Its pooled text. diffusers ask for 77 tokens of it.
      "pooler": ConfigDict({**TEXT, "max_position_embeddings": 77}),
      "text": ConfigDict(
        {
          "hidden_size": 128,
          "intermediate_size": 256,
          "num_hidden_layers": 4,  # of which two are used
          "num_attention_heads": 4,
          "num_key_value_heads": 2,
          "max_position_embeddings": 512,
          "rms_norm_eps": 1e-5,
          "rope_theta": 5e5,
          "hidden_act": "silu",
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
  for stage in (config.frames, config.vae, config.clip, config.video):
    stage.update(steps=3, batch=5, warmup=1)
  config.vae.update(crop_steps=1, crop_batch=5)
  config.vae.network.update(block_out_channels=(8, 8, 8))
  for tower in (config.clip.text, config.clip.vision):
    tower.num_hidden_layers = 1
  config.video.network.update(num_layers=1, num_single_layers=1)
  config.video.pooler.num_hidden_layers = 1


PRESETS = ("", "tiny")

"""Every key of a network's config.json is used, refused or harmless, and what a file leaves out is
what diffusers and transformers take.
"""

import copy
import inspect
import json

import pytest
from tiny_checkpoint import ROOT

from dancegrpo_jax.models import autoencoder, autoencoder_hunyuan_video, clip, flux, t5, unet

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

DIFFUSERS = {
  "UNet2DConditionModel": (unet.KEYS, unet.from_json),
  "AutoencoderKL": (autoencoder.KEYS, autoencoder.from_json),
  "AutoencoderKLHunyuanVideo": (
    autoencoder_hunyuan_video.KEYS,
    autoencoder_hunyuan_video.from_json,
  ),
  "FluxTransformer2DModel": (flux.KEYS, flux.from_json),
}
TRANSFORMERS = {
  "CLIPTextConfig": (clip.TEXT_KEYS, clip.ClipText.from_json),
  "CLIPVisionConfig": (clip.VISION_KEYS, clip.ClipVision.from_json),
  "CLIPConfig": (clip.KEYS, clip.Clip.from_json),
  "T5Config": (t5.KEYS, t5.from_json),
}
V1_1 = {"feed_forward_proj": "gated-gelu"}  # T5's own default is not implemented


def plain(value):
  """A value as JSON has it."""
  return json.loads(json.dumps(value))


def known(keys):
  return keys.used.keys() | keys.neutral.keys() | keys.harmless.keys()


@pytest.mark.parametrize("name", DIFFUSERS)
def test_defaults_are_those_of_diffusers(name):
  keys, _ = DIFFUSERS[name]
  parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
  theirs = {key: plain(each.default) for key, each in parameters.items() if key != "self"}
  assert theirs.keys() == known(keys)
  assert {key: theirs[key] for key in keys.used} == plain(dict(keys.used))
  for key, values in keys.neutral.items():
    assert theirs[key] in plain(values), key


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_defaults_are_those_of_transformers(name):
  keys, _ = TRANSFORMERS[name]
  theirs = getattr(transformers, name)().to_dict() | {"_name_or_path": ""}
  sections = {"text_config", "vision_config", "text_config_dict", "vision_config_dict"}
  mine = {key: value for key, value in keys.used.items() if key not in sections}
  assert {key: theirs[key] for key in mine} == mine
  assert {key for key in theirs if not key.startswith("_")} <= known(keys)
  for key, values in keys.neutral.items():
    if key in theirs and key != "feed_forward_proj":
      assert theirs[key] in values, key


@pytest.mark.parametrize("name", DIFFUSERS)
def test_what_diffusers_saves_is_read(name, tmp_path):
  small = {
    "UNet2DConditionModel": {
      "block_out_channels": (32, 64),
      "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
      "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
      "cross_attention_dim": 32,
      "attention_head_dim": (2, 4),
    },
    "AutoencoderKL": {"block_out_channels": (32,)},
    "AutoencoderKLHunyuanVideo": {
      "block_out_channels": (8, 8, 16),
      "down_block_types": ("HunyuanVideoDownBlock3D",) * 3,
      "up_block_types": ("HunyuanVideoUpBlock3D",) * 3,
      "norm_num_groups": 4,
      "spatial_compression_ratio": 4,
    },
    "FluxTransformer2DModel": {
      "num_layers": 1,
      "num_single_layers": 1,
      "num_attention_heads": 1,
      "joint_attention_dim": 8,
      "pooled_projection_dim": 8,
    },
  }[name]
  getattr(diffusers, name)(**small).save_pretrained(tmp_path)
  network = DIFFUSERS[name][1](json.loads((tmp_path / "config.json").read_text()))
  assert {key: getattr(network, key) for key in small} == small


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_what_transformers_save_is_read(name, tmp_path):
  given = {"CLIPConfig": {"projection_dim": 24}, "T5Config": V1_1 | {"d_model": 24}}
  given = given.get(name, {"hidden_size": 24, "num_attention_heads": 2})
  getattr(transformers, name)(**given).save_pretrained(tmp_path)
  network = TRANSFORMERS[name][1](json.loads((tmp_path / "config.json").read_text()))
  assert all(getattr(network, key) == given[key] for key in given if key not in V1_1)


REFUSED = {
  "UNet2DConditionModel": [
    ("norm_num_groups", None, "norm_num_groups = None (implemented: an integer)"),
    ("class_embed_type", "timestep", "class_embed_type = 'timestep' (implemented: None)"),
    ("layers_per_block", [1, 2], "layers_per_block = [1, 2] (implemented: an integer)"),
    ("use_linear_projection", 1, "use_linear_projection = 1 (implemented: true or false)"),
    ("mid_block_type", None, "mid_block_type = None (implemented: 'UNetMidBlock2DCrossAttn')"),
    ("rope_theta", 2.0, "rope_theta = 2.0 (an unknown key)"),
    ("_class_name", "UNet3D", "config.json is that of a UNet3D"),
    ("attention_head_dim", [2, 4], "attention_head_dim has 2 entries and block_out_channels 4"),
  ],
  "AutoencoderKL": [
    ("latents_mean", [0.5], "latents_mean = [0.5] (implemented: None)"),
    ("scaling_factor", "0.18", "scaling_factor = '0.18' (implemented: an integer or a number)"),
    ("down_block_types", ["DownEncoderBlock2D"] * 2, "down_block_types has 2 entries"),
  ],
  "AutoencoderKLHunyuanVideo": [
    ("act_fn", "relu", "act_fn = 'relu' (implemented: 'silu')"),
    ("down_block_types", ["DownBlock3D"] * 4, "down_block_types holds ['DownBlock3D']"),
    ("up_block_types", ["HunyuanVideoUpBlock3D"] * 3, "up_block_types has 3 entries"),
    ("temporal_compression_ratio", 8, "temporal_compression_ratio = 8 with 4 levels; only 4"),
    ("spatial_compression_ratio", 32, "spatial_compression_ratio = 32 with 4 levels"),
    ("spatial_compression_ratio", 6, "it must be one of 1, 2, 4, 8, 16"),
    ("use_framewise_decoding", False, "use_framewise_decoding = False (an unknown key)"),
  ],
  "FluxTransformer2DModel": [
    ("patch_size", 2, "patch_size = 2 (implemented: 1)"),
    ("quantization_config", {"bits": 4}, "quantization_config"),
  ],
  "CLIPTextConfig": [
    ("hidden_size", 24.0, "hidden_size = 24.0 (implemented: an integer)"),
    ("is_decoder", True, "is_decoder = True (implemented: False)"),
    ("rope_scaling", {"type": "linear"}, "rope_scaling"),
    ("model_type", "siglip_text_model", "model_type = 'siglip_text_model'"),
  ],
  "CLIPVisionConfig": [("num_channels", 4, "num_channels = 4 (implemented: 3)")],
  "CLIPConfig": [("projection_dim", "512", "projection_dim = '512' (implemented: an integer)")],
  "T5Config": [
    ("model_type", "umt5", "model_type = 'umt5' (implemented: 't5' or 'mt5')"),
    ("feed_forward_proj", "relu", "feed_forward_proj = 'relu' (implemented: 'gated-gelu')"),
  ],
}


@pytest.mark.parametrize(
  ("name", "key", "value", "message"),
  [(name, *case) for name, cases in REFUSED.items() for case in cases],
)
def test_what_is_not_implemented_is_refused(name, key, value, message):
  build = (DIFFUSERS | TRANSFORMERS)[name][1]
  with pytest.raises(ValueError) as caught:
    build((V1_1 if name == "T5Config" else {}) | {key: value})
  assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_older_sections_of_a_clip_replace_the_newer_ones():
  """As in transformers. openai/clip-vit-large-patch14 has both."""
  config = {
    "text_config": {"hidden_size": 32, "vocab_size": 9},
    "text_config_dict": {"hidden_size": 64, "num_attention_heads": 4},
    "vision_config": {"hidden_size": 48},
  }
  theirs = transformers.CLIPConfig(**copy.deepcopy(config)).text_config
  mine = clip.Clip.from_json(config).text_model
  assert (mine.hidden_size, mine.vocab_size) == (theirs.hidden_size, theirs.vocab_size)
  assert mine.hidden_size == 64


@pytest.mark.parametrize("path", sorted(ROOT.glob("assets/*/**/config.json")), ids=str)
def test_published_files_and_assets_are_read(path):
  given = json.loads(path.read_text())
  builders = {"clip_text_model": "CLIPTextConfig", "clip": "CLIPConfig", "t5": "T5Config"}
  (DIFFUSERS | TRANSFORMERS)[given.get("_class_name") or builders[given["model_type"]]][1](given)

"""Every key of a network's config.json is used, refused or harmless, and what a file leaves out is
what diffusers and transformers take.
"""

import copy
import inspect
import json

import pytest
from tiny_checkpoint import ROOT

from dancegrpo_jax.models import (
  autoencoder,
  autoencoder_hunyuan_video,
  clip,
  decoder_lm,
  flux,
  hunyuan_video,
  t5,
  unet,
)

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
  "HunyuanVideoTransformer3DModel": (hunyuan_video.KEYS, hunyuan_video.from_json),
}
TRANSFORMERS = {
  "CLIPTextConfig": (clip.TEXT_KEYS, clip.ClipText.from_json),
  "CLIPVisionConfig": (clip.VISION_KEYS, clip.ClipVision.from_json),
  "CLIPConfig": (clip.KEYS, clip.Clip.from_json),
  "T5Config": (t5.KEYS, t5.from_json),
  "LlamaConfig": (decoder_lm.KEYS, decoder_lm.from_json),
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
  if name == "LlamaConfig":
    # transformers 5 fills these in; files of earlier versions have rope_theta
    rope = theirs.pop("rope_parameters")
    assert rope == {"rope_theta": mine.pop("rope_theta"), "rope_type": "default"}
    width = theirs["hidden_size"] // theirs["num_attention_heads"]
    filled = {"num_key_value_heads": theirs["num_attention_heads"], "head_dim": width}
    assert {key: theirs[key] for key in filled} == filled
    assert not any(mine.pop(key) for key in (*filled, "rope_parameters"))
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
    "HunyuanVideoTransformer3DModel": {
      "num_layers": 1,
      "num_single_layers": 1,
      "num_refiner_layers": 1,
      "num_attention_heads": 1,
      "text_embed_dim": 8,
      "pooled_projection_dim": 8,
      "guidance_embeds": False,
      "rope_theta": 99.0,
    },
  }[name]
  getattr(diffusers, name)(**small).save_pretrained(tmp_path)
  network = DIFFUSERS[name][1](json.loads((tmp_path / "config.json").read_text()))
  assert {key: getattr(network, key) for key in small} == small


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_what_transformers_save_is_read(name, tmp_path):
  given = {"CLIPConfig": {"projection_dim": 24}, "T5Config": V1_1 | {"d_model": 24}}
  small = {"hidden_size": 24, "num_attention_heads": 2}
  given = given.get(name, small)
  getattr(transformers, name)(**given).save_pretrained(tmp_path)
  network = TRANSFORMERS[name][1](json.loads((tmp_path / "config.json").read_text()))
  names = {"num_attention_heads": "heads"} if name == "LlamaConfig" else {}
  for key in given.keys() - V1_1.keys():
    assert getattr(network, names.get(key, key)) == given[key]


def test_the_base_of_rotations_is_read_in_both_spellings(tmp_path):
  """transformers 5 writes it into rope_parameters; earlier versions wrote rope_theta."""
  transformers.LlamaConfig(rope_theta=5e5).save_pretrained(tmp_path)
  saved = json.loads((tmp_path / "config.json").read_text())
  assert "rope_theta" not in saved
  for given in (saved, {"rope_theta": 5e5}):
    assert decoder_lm.from_json(given).theta == 5e5


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
  "HunyuanVideoTransformer3DModel": [
    ("patch_size_t", 2, "patch_size_t = 2 (implemented: 1)"),
    (
      "image_condition_type",
      "token_replace",
      "image_condition_type = 'token_replace' (implemented: None)",
    ),
    ("in_channels", None, "in_channels = None (implemented: an integer)"),
    ("_class_name", "FluxTransformer2DModel", "config.json is that of a FluxTransformer2DModel"),
  ],
  "LlamaConfig": [
    ("model_type", "qwen2", "model_type = 'qwen2' (implemented: 'llama')"),
    ("rope_scaling", {"factor": 8.0}, "rope_scaling = {'factor': 8.0} (implemented: None)"),
    ("sliding_window", 4096, "sliding_window = 4096 (an unknown key)"),
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
  builders = {
    "clip_text_model": "CLIPTextConfig",
    "clip": "CLIPConfig",
    "t5": "T5Config",
    "llama": "LlamaConfig",
  }
  (DIFFUSERS | TRANSFORMERS)[given.get("_class_name") or builders[given["model_type"]]][1](given)

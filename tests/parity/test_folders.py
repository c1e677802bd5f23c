"""Diffusers and transformers load the folders that we write, and we load theirs, bit for bit."""

import json

import jax
import numpy as np
import pytest
import torch
from diffusers import (
  AutoencoderKL,
  FluxTransformer2DModel,
  HunyuanVideoTransformer3DModel,
  UNet2DConditionModel,
)
from torch_parity import randomise
from transformers import (
  CLIPConfig,
  CLIPModel,
  CLIPTextConfig,
  CLIPTextModel,
  LlamaConfig,
  LlamaModel,
  T5Config,
  T5EncoderModel,
)

from dancegrpo_jax.checkpoints import weights
from dancegrpo_jax.checkpoints.networks import abstract_params, class_name

TOWER = {
  "hidden_size": 16,
  "intermediate_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
}
TEXT = TOWER | {
  "vocab_size": 40,
  "max_position_embeddings": 8,
  "bos_token_id": 38,
  "eos_token_id": 39,
  "pad_token_id": 39,
}
VISION = TOWER | {"image_size": 8, "patch_size": 4}


def networks() -> dict:
  return {
    "UNet2DConditionModel": lambda: UNet2DConditionModel(
      block_out_channels=(16, 32),
      down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
      up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
      layers_per_block=1,
      norm_num_groups=8,
      cross_attention_dim=16,
      attention_head_dim=2,
    ),
    "AutoencoderKL": lambda: AutoencoderKL(block_out_channels=(16,), norm_num_groups=8),
    "FluxTransformer2DModel": lambda: FluxTransformer2DModel(
      in_channels=8,
      num_layers=1,
      num_single_layers=2,
      attention_head_dim=8,
      num_attention_heads=2,
      joint_attention_dim=12,
      pooled_projection_dim=10,
      guidance_embeds=True,
      axes_dims_rope=(4, 2, 2),
    ),
    "HunyuanVideoTransformer3DModel": lambda: HunyuanVideoTransformer3DModel(
      in_channels=8,
      out_channels=4,
      num_layers=1,
      num_single_layers=2,
      num_refiner_layers=2,
      attention_head_dim=8,
      num_attention_heads=2,
      text_embed_dim=12,
      pooled_projection_dim=10,
      rope_axes_dim=(4, 2, 2),
    ),
    "LlamaModel": lambda: LlamaModel(
      LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=500000.0,
      )
    ),
    "T5EncoderModel": lambda: T5EncoderModel(
      T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
      )
    ),
    "CLIPTextModel": lambda: CLIPTextModel(CLIPTextConfig(**TEXT)),
    "CLIPModel": lambda: CLIPModel(
      CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)
    ),
  }


@pytest.mark.parametrize("name", networks())
def test_there_and_back(name, tmp_path):
  theirs = randomise(networks()[name](), seed=5)
  theirs.save_pretrained(tmp_path / "theirs")
  config = json.loads((tmp_path / "theirs" / "config.json").read_text())
  assert class_name(config) == name
  params = weights.load(tmp_path / "theirs", name, abstract_params(config))
  weights.save(tmp_path / "ours", name, params, config)
  loaded, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
  again = loaded.state_dict()
  for key, tensor in theirs.state_dict().items():
    assert torch.equal(again[key], tensor), key
  # in float16, as the models of this repository are shipped
  weights.save(tmp_path / "half", name, params, config, dtype=np.float16)
  half = type(theirs).from_pretrained(tmp_path / "half").state_dict()
  assert all(
    torch.equal(half[key].float(), tensor.half().float())
    for key, tensor in theirs.state_dict().items()
  )
  same = weights.load(tmp_path / "ours", name, abstract_params(config))
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), same, params
  )

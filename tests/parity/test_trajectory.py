"""30 steps of DDIM against diffusers' network and scheduler, at reduced width.

test_full_size.py does the same at the published sizes.
"""

import json
from pathlib import Path

import pytest
import trajectories
from diffusers import UNet2DConditionModel
from torch_parity import randomise

FIXTURES = Path(__file__).parent.parent / "fixtures" / "tensors"
UNET = {
  "in_channels": 4,
  "out_channels": 4,
  "block_out_channels": [16, 32],
  "layers_per_block": 1,
  "norm_num_groups": 8,
  "cross_attention_dim": 24,
  "attention_head_dim": 2,
  "norm_eps": 1e-5,
  "sample_size": 8,
  "flip_sin_to_cos": True,
  "freq_shift": 0,
  "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
  "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}


@pytest.mark.parametrize("model", ["sd14", "sd21"], ids=["epsilon", "v"])
def test_ddim_trajectories_and_log_probs(tmp_path, measured, model):
  jsons = {
    name: json.loads((FIXTURES / f"{model}-{file}.json").read_text())
    for name, file in trajectories.FILES.items()
  }
  theirs = randomise(UNet2DConditionModel(**UNET), seed=1)
  theirs.save_pretrained(tmp_path / "unet")
  inputs, steps = trajectories.draw_inputs(UNET, batch=2, side=16, tokens=7), (0, 15, 29)
  expected = trajectories.reference(theirs.to, jsons["scheduler"], inputs, steps)
  jsons["text_encoder"] |= {"hidden_size": UNET["cross_attention_dim"], "num_attention_heads": 2}
  pipeline = trajectories.our_pipeline(jsons | {"unet": UNET}, side=16)
  ours = trajectories.our_results(pipeline, tmp_path, inputs, expected.noisy, steps)
  trajectories.check(measured, ours, expected, jsons["scheduler"], inputs.noise, bound=1e-5)

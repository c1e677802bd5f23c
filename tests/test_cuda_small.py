"""All programs of the small configs, and the losses of pretrain, lower for NVIDIA GPUs.

See cuda_programs.py.
"""

from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from cuda_programs import groups, h100, lower, lower_group

from dancegrpo_jax import programs
from dancegrpo_jax.compilation.calls import Call, abstract
from dancegrpo_jax.data import moving_emoji, tokenizer
from dancegrpo_jax.pretrain import clip, flow, shared, stages, vae
from dancegrpo_jax.settings import config_file

ROOT = Path(__file__).parent.parent
GROUPS = [
  (group, devices)
  for family in ("stable_diffusion", "flux", "hunyuan_video")
  for devices in (1, 8)
  for group in groups(family, devices=devices, tiny=True)
]


@pytest.mark.parametrize(
  "group, devices", GROUPS, ids=lambda value: value if isinstance(value, int) else value[0].name
)
def test_lowers(group, devices, monkeypatch):
  """The small configs compute in float32, which no fused kernel accepts."""
  monkeypatch.chdir(ROOT)
  notes = lower_group(group, devices=devices)
  assert {"rollout", "update accumulate", "sample"} <= {note.program for note in notes}
  assert {note.h100 for note in notes} == {"xla"}


def data_of(config, folder: Path) -> stages.Data:
  """Blank samples with the captions and the tokenizer of a config's world."""
  captions, shape = stages.all_captions()[:256], (config.size, config.size, 3)
  if config.world == "moving_emoji":
    captions = [moving_emoji.caption(scene) for scene in moving_emoji.scenes("train")[:320]]
    shape = (moving_emoji.FRAMES, *shape)
  shared.write_tokenizer_files(folder / config.tokenizer, captions)
  numbers = np.arange(len(captions), dtype=np.int32)
  by_motion = numbers // 40 * 8 + numbers % 8  # of 5 motions x 8 colours of an emoji
  return stages.Data(
    images=np.zeros((len(captions), *shape), np.uint8),
    captions=captions,
    tokens=tokenizer.load_tokenizer(str(folder / config.tokenizer))(captions),
    caption=numbers,
    group=by_motion if len(shape) == 4 else numbers,
  )


@pytest.mark.parametrize(
  "file, name",
  [("emoji_pretrain", name) for name in ("vae", "clip", "denoiser", "flow")]
  + [("emoji_video_pretrain", name) for name in ("frames", "vae", "clip", "video")],
)
def test_the_losses_of_pretraining_lower(file, name, tmp_path, monkeypatch):
  """One optimizer step of each stage, as in pretrain.fit, with abstract parameters."""
  changes = ["vae.from_frames=false"]  # the weights that the stage vae would read
  config = config_file.load(str(ROOT / "configs" / f"{file}.py"), changes)
  data = data_of(config, tmp_path)
  monkeypatch.setattr(
    shared, "initial", lambda network, key, *inputs: jax.eval_shape(network.init, key, *inputs)
  )

  def latents(folder: Path, images: np.ndarray) -> np.ndarray:
    shape = (3, 8, 8, 8) if images.ndim == 5 else (8, 8, 4)
    return np.zeros((len(images), *shape), np.float32)

  monkeypatch.setattr(vae, "scaled_latents", latents)
  monkeypatch.setattr(flow, "without_modulation", lambda params: params)
  monkeypatch.setattr(vae, "_with_log_variance", lambda params, value: params)
  monkeypatch.setattr(clip, "_with_larger_positions", lambda params, factor: params)
  stage, optimizer = stages.STAGES[name](config, data, tmp_path), optax.adam(1e-3)
  state = (stage.params, jax.eval_shape(optimizer.init, stage.params), stage.params)
  with h100():
    arguments = (state, abstract(stage.batch(0)), jax.random.key(0), np.float32(0))
    assert lower(Call(name, programs.fit_step(stage.loss, optimizer), arguments, 1)).as_text()

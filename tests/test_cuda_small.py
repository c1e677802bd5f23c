"""All programs of the small configs, and the losses of pretrain, lower for NVIDIA GPUs.

See cuda_programs.py.
"""

import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from cuda_programs import groups, h100, lower, lower_group

from dancegrpo_jax import programs
from dancegrpo_jax.compilation.calls import Call, abstract
from dancegrpo_jax.data import tokenizer
from dancegrpo_jax.pretrain import flow, shared, stages, vae
from dancegrpo_jax.settings import config_file

ROOT = Path(__file__).parent.parent
GROUPS = [
  (group, devices)
  for family in ("stable_diffusion", "flux")
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


@pytest.mark.parametrize("name", stages.STAGES)
def test_the_losses_of_pretraining_lower(name, tmp_path, monkeypatch):
  """One optimizer step of each stage, as in pretrain.fit, with abstract parameters."""
  for folder in ("emoji-sd", "emoji-flux", "emoji-clip"):
    shutil.copytree(ROOT / "assets" / folder, tmp_path / folder)
  config = config_file.load(str(ROOT / "configs" / "emoji_pretrain.py"))
  captions = stages.all_captions()[:256]
  tokens = tokenizer.load_tokenizer(str(tmp_path / "emoji-sd" / "tokenizer"))(captions)
  images = np.zeros((len(captions), config.size, config.size, 3), np.uint8)
  data = stages.Data(
    images=images, captions=captions, tokens=tokens, pair=np.arange(len(captions), dtype=np.int32)
  )
  monkeypatch.setattr(
    shared, "initial", lambda network, key, *inputs: jax.eval_shape(network.init, key, *inputs)
  )
  monkeypatch.setattr(
    vae, "scaled_latents", lambda folder, images: np.zeros((len(images), 8, 8, 4), np.float32)
  )
  monkeypatch.setattr(flow, "without_modulation", lambda params: params)
  stage, optimizer = stages.STAGES[name](config, data, tmp_path), optax.adam(1e-3)
  state = (stage.params, jax.eval_shape(optimizer.init, stage.params), stage.params)
  with h100():
    arguments = (state, abstract(stage.batch(0)), jax.random.key(0), np.float32(0))
    assert lower(Call(name, programs.fit_step(stage.loss, optimizer), arguments, 1)).as_text()

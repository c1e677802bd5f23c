"""Runs that cannot fit are refused before weights are read. Their devices are not needed here."""

import re

import jax
import numpy as np
import pytest
from tiny_checkpoint import ROOT, overrides

from dancegrpo_jax import main
from dancegrpo_jax.assembly import loading, resident
from dancegrpo_jax.compilation import inventory
from dancegrpo_jax.devices import chips, sharding
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.settings import config_file

GPU = chips.Chip("80 GB", 80e9, 0.0, 0.0, 0.0)


def stand_ins(config, count: int) -> jax.sharding.Mesh:
  """A mesh of so many devices. Nothing is put on them, so any may stand in."""
  devices = np.resize(np.array(jax.devices()), sharding.axis_sizes(config.mesh, count))
  return jax.sharding.Mesh(devices, sharding.AXES)


def described(name: str, *changes: str):
  """The config of a published recipe, without weights."""
  return inventory.without_weights(config_file.load(str(ROOT / "configs" / f"{name}.py"), changes))


def abstract(config, count: int):
  """(model, state) on so many devices, without weights."""
  mesh = stand_ins(config, count)
  model = inventory.outline(config, mesh)
  return model, loading.abstract_state(config, model, mesh, 1)


def require_room(config, count: int) -> None:
  resident.require_room(config, stand_ins(config, count), *abstract(config, count))


@pytest.fixture(scope="module")
def flux():
  return described("flux_hps")


def test_what_full_flux_keeps(flux):
  """Numbers of parameters are those published.

  Trained in float32: 11.90 B. In bfloat16: T5-XXL's encoder with 4.76 B, CLIP-L's text tower with
  123 M, the autoencoder with 84 M, and ViT-H with 986 M.
  """
  config = flux
  one = resident.device_bytes(config, *abstract(config, 1))
  assert one["trained weights"] == pytest.approx(4 * 11.90e9, rel=1e-3)
  assert one["optimizer"] == pytest.approx(8 * 11.90e9, rel=1e-3)
  # The least are the sums of gradients over microbatches.
  assert one["gradients"] == one["trained weights"]
  assert one["frozen weights"] == pytest.approx(2 * (4.76e9 + 123.1e6 + 83.8e6), rel=2e-3)
  assert one["rewards"] == pytest.approx(2 * 986.1e6, rel=1e-3)
  assert one["average"] == one["KL reference"] == 0
  eight = resident.device_bytes(config, *abstract(config, 8))
  assert eight["optimizer"] == pytest.approx(one["optimizer"] / 8, rel=1e-2)
  cached = resident.device_bytes(
    config, *abstract(config, 1), without=("text_encoder", "text_encoder_2")
  )
  assert cached["frozen weights"] == pytest.approx(2 * 83.8e6, rel=2e-3)


def test_full_flux_is_refused_on_one_gpu_and_taken_on_eight(flux, monkeypatch):
  monkeypatch.setattr(chips, "chip_of", lambda device: GPU)
  config = flux
  with pytest.raises(ConfigError) as caught:
    require_room(config, 1)
  (line,) = str(caught.value).splitlines()
  said = re.match(r"config.mesh.fsdp = -1: an update keeps ([\d.]+) GiB at least on the only", line)
  # For each parameter: the weight 4, two moments 8, the gradient 4, and the state before the
  # iteration, 12.
  assert float(said[1]) * 2**30 == pytest.approx(28 * 11.90e9 + 9.93e9 + 1.97e9, rel=1e-3)
  for word in ("has 74.51", "optimizer 88.", "mesh.rules", ":8gpu", "lora.rank"):
    assert word in line, line
  require_room(config, 8)


def test_adapters_fit_on_one_gpu(monkeypatch):
  monkeypatch.setattr(chips, "chip_of", lambda device: GPU)
  lora = described("flux_hps_lora")
  require_room(lora, 1)
  small = GPU._replace(memory=24e9)
  monkeypatch.setattr(chips, "chip_of", lambda device: small)
  with pytest.raises(ConfigError, match=r"has 22\.35 .*frozen weights 31\.") as caught:
    require_room(lora, 1)
  assert "lora.rank" not in str(caught.value)  # the config has adapters already


def test_one_microbatch_needs_no_sum_and_a_penalty_and_an_average_are_copies(tiny_models):
  changes = {"optimizer__microbatch": 48, "objective__kl__weight": 0.1, "ema__decay": 0.9}
  config = config_file.load(
    f"{ROOT / 'configs' / 'emoji_clip.py'}:tiny", overrides(tiny_models, **changes)
  )
  config = inventory.without_weights(config)
  model = inventory.outline(config, stand_ins(config, 1))
  kept = resident.device_bytes(
    config, model, loading.abstract_state(config, model, stand_ins(config, 1), 1)
  )
  assert kept["trained weights"] > 0
  for copy in ("gradients", "average", "KL reference"):
    assert kept[copy] == kept["trained weights"], copy


def test_train_asks_before_it_reads_weights(tiny_models, tmp_path, monkeypatch, capsys):
  """Through the command.

  Where the size of the memory is unknown, as on a CPU, nothing is checked.
  """
  tiny = chips.Chip("tiny", 1e6, 0.0, 0.0, 0.0)
  monkeypatch.setattr(chips, "chip_of", lambda device: tiny)
  monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("weights are read"))
  flags = [f"--config.{word}" for word in overrides(tiny_models)]
  config = f"--config={ROOT / 'configs' / 'emoji_clip.py'}:tiny"
  assert main.main([config, *flags, f"--workdir={tmp_path / 'run'}"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: config.mesh.fsdp = 1: an update keeps 0.") and "8 devices" in line
  assert not (tmp_path / "run").exists()

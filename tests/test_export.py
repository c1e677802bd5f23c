"""Export and import of checkpoints.

diffusers draws from an exported run what we draw; imported trees are equal; no file is replaced.
"""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_checkpoint import ROOT, tiny_config

from dancegrpo_jax import train
from dancegrpo_jax.assembly import loading, sampling
from dancegrpo_jax.checkpoints import chosen, components, hub, store, weights
from dancegrpo_jax.convert import __main__ as command
from dancegrpo_jax.convert import folders
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.pipelines.families import FAMILIES
from dancegrpo_jax.rl import rng
from dancegrpo_jax.settings import config_file
from dancegrpo_jax.types import Example

EMOJI = str(ROOT / "configs" / "emoji_clip.py") + ":tiny"
PROMPTS = ["a red apple on a blue background", "a cat on a cyan background", "a star", ""]


def changed(config, **values):
  """A locked config with values by dotted key, `__` for the dot."""
  with config.unlocked():
    for key, value in values.items():
      *sections, leaf = key.split("__")
      section = config
      for name in sections:
        section = section[name]
      section[leaf] = value
  return config


def theirs(folder: Path, latents: np.ndarray, prompts: list[str], steps: int) -> np.ndarray:
  """Images `[n, h, w, 3]` in [0, 1] from diffusers' pipeline on an exported folder.

  It samples by DDIM with eta 0 and takes diffusers' last step.
  """
  import torch
  from diffusers import DDIMScheduler, StableDiffusionPipeline

  pipe = StableDiffusionPipeline.from_pretrained(folder)
  pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
  pipe.set_progress_bar_config(disable=True)
  noise = torch.from_numpy(np.ascontiguousarray(latents.transpose(0, 3, 1, 2)))
  return pipe(
    prompts, num_inference_steps=steps, eta=0.0, guidance_scale=1.0, latents=noise, output_type="np"
  ).images


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
  """(config, workdir) of the shipped model after two iterations.

  They have a high learning rate and averaged weights.
  """
  config = changed(
    config_file.load(EMOJI),
    iterations=2,
    ema__decay=0.5,
    optimizer__learning_rate=1e-3,
    sampler__steps=4,
    evaluation__steps=10,
    evaluation__every=0,
    logging__tensorboard=False,
  )
  workdir = tmp_path_factory.mktemp("run") / "emoji"
  train.run(config, workdir)
  return config, workdir


def test_diffusers_draws_our_pixels(emoji, tmp_path):
  config, workdir = emoji
  with sampling.opened(config, str(workdir)) as opened:
    base = sampling.draw(
      opened,
      opened.model.trainable,
      [Example(i, text) for i, text in enumerate(PROMPTS)],
      2,
      seed=5,
    ).pixels
    abstract = components.placed(opened.weights, opened.model.shardings)
    stream = rng.derive(rng.stream(0, "evaluation"), np.int32(5))
    numbers = np.arange(8, dtype=np.int32)
    noise = rng.initial_noise(
      stream, 0, numbers, numbers, shared=True, shape=opened.model.pipeline.latent_shape
    )
    for kind in ("ema", "raw"):
      folders.export(config, str(workdir), tmp_path / kind, "pipeline", kind)
      tuned = sampling.restore_weights(chosen.find(str(workdir)), abstract, kind)
      ours = sampling.draw(
        opened, tuned, [Example(i, text) for i, text in enumerate(PROMPTS)], 2, seed=5
      ).pixels
      images = theirs(
        tmp_path / kind, np.asarray(noise), [text for text in PROMPTS for _ in range(2)], 10
      )
      error, change = np.abs(images.reshape(ours.shape) - ours).max(), np.abs(base - ours).max()
      print(
        f"max abs pixel error, {kind}: {255 * error:.4f}/255; trained against base"
        f" {255 * change:.1f}/255"
      )
      assert error <= 2 / 255
      assert change > 10 / 255  # otherwise the base's weights would pass


@pytest.fixture
def run(tiny_models, tmp_path_factory):
  """(config, workdir) of a tiny random model, with a checkpoint as training saves it."""
  config, workdir = tiny_config(tiny_models), tmp_path_factory.mktemp("trained")
  component = loading.build_pipeline(config).components["denoiser"]
  with store.Saver(workdir / "checkpoints", keep=1) as saver:
    drawn = weights.draw(component.abstract, seed=1, table=component.table)
    state = {"trainable": {"denoiser": drawn}}
    saver.save(1, state, {"config": config.to_dict(), "iteration": 1})
  return config, workdir


def test_denoiser_alone(run, tmp_path, capsys):
  from diffusers import UNet2DConditionModel

  config, workdir = run
  folders.export(config, str(workdir), tmp_path / "unet", "denoiser", "")
  assert sorted(os.listdir(tmp_path / "unet")) == [
    "README.md",
    "config.json",
    "diffusion_pytorch_model.safetensors",
  ]
  _, info = UNet2DConditionModel.from_pretrained(tmp_path / "unet", output_loading_info=True)
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
  assert f"denoiser of {workdir}@1: {tmp_path / 'unet'}" in capsys.readouterr().out


def test_taken_or_misnamed(run, tmp_path):
  config, workdir = run
  (tmp_path / "taken").mkdir()
  (tmp_path / "taken" / "file").write_text("mine")
  with pytest.raises(
    ConfigError, match="--out=.*taken: exists and is not empty; name a new folder"
  ):
    folders.export(config, str(workdir), tmp_path / "taken", "pipeline", "")
  with pytest.raises(ConfigError, match="file: is a file"):
    folders.import_checkpoint(config, tmp_path / "taken" / "file")
  with pytest.raises(ConfigError, match="keeps no averaged weights .* take the raw ones"):
    folders.export(config, str(workdir), tmp_path / "out", "pipeline", "ema")
  with pytest.raises(ConfigError, match="no such directory; give the checkpoints/ of a workdir"):
    folders.export(config, str(tmp_path / "nowhere"), tmp_path / "out", "pipeline", "")
  assert os.listdir(tmp_path) == ["taken"]  # no temporary folder is left


def test_an_interrupted_export_leaves_nothing(run, tmp_path, monkeypatch):
  def interrupted(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(folders, "write_index", interrupted)
  with pytest.raises(KeyboardInterrupt):
    folders.export(run[0], str(run[1]), tmp_path / "out", "pipeline", "")
  assert os.listdir(tmp_path) == []


def test_import_gives_the_same_run(tiny_models, tmp_path):
  config = tiny_config(tiny_models)
  folders.import_checkpoint(config, tmp_path / "orbax")
  assert not list((tmp_path / "orbax").rglob("*.safetensors"))
  imported = tiny_config(tiny_models, model__checkpoint=str(tmp_path / "orbax"))
  models = []
  for each in (config, imported):
    mesh = sharding.make_mesh(each.mesh)
    models.append(loading.load(each, loading.build_pipeline(each), {}, mesh))
  for a, b in zip(
    *(jax.tree.leaves((model.frozen, model.trainable)) for model in models), strict=True
  ):
    assert a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim)
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_export_with_an_imported_base(run, tiny_models, tmp_path, capsys):
  """There are no weight files to copy, so that the frozen networks are written again."""
  config, workdir = run
  folders.import_checkpoint(config, tmp_path / "orbax")
  changed(config, model__checkpoint=str(tmp_path / "orbax"))
  folders.export(config, str(workdir), tmp_path / "out", "pipeline", "")
  assert (
    f"was trained from {str(tiny_models.model)!r}; its other folders are copied from"
    in capsys.readouterr().out
  )
  for name in ("vae", "text_encoder"):
    before, after = (
      weights.open_reader(folder / name) for folder in (tiny_models.model, tmp_path / "out")
    )
    assert before.specs == after.specs
    for tensor, spec in before.specs.items():
      whole = (slice(None),) * len(spec.shape)
      np.testing.assert_array_equal(before.read(tensor, whole), after.read(tensor, whole))
  assert hub.missing(tmp_path / "out", FAMILIES["stable_diffusion"].layout) == []


def test_a_variant_is_copied_under_the_plain_name(run, tiny_models, tmp_path):
  """from_pretrained without a variant looks only for the plain names.

  Random weights are written as they were drawn.
  """
  config, workdir = run
  base = tmp_path / "base"
  shutil.copytree(config.model.checkpoint, base)
  for name in ("vae/diffusion_pytorch_model", "text_encoder/model"):
    (base / f"{name}.safetensors").rename(base / f"{name}.fp16.safetensors")
  changed(config, model__checkpoint=str(base), model__variant="fp16")
  folders.export(config, str(workdir), tmp_path / "out", "pipeline", "")
  changed(config, model__checkpoint=f"random:{base}", model__variant="")
  folders.export(config, str(workdir), tmp_path / "drawn", "pipeline", "")
  for out in ("out", "drawn"):
    assert sorted(os.listdir(tmp_path / out / "vae")) == [
      "config.json",
      "diffusion_pytorch_model.safetensors",
    ]
    assert sorted(os.listdir(tmp_path / out / "text_encoder")) == [
      "config.json",
      "model.safetensors",
    ]
  file = "vae/diffusion_pytorch_model.safetensors"
  assert (tmp_path / "out" / file).read_bytes() == (tiny_models.model / file).read_bytes()


def test_parts_that_are_not_there_leave_the_index(run, tmp_path):
  """from_pretrained must not look for parts that are not downloaded.

  They are the hub's safety checker and feature extractor.
  """
  config, workdir = run
  base = tmp_path / "base"
  os.symlink(config.model.checkpoint, base)
  index = json.loads((base / "model_index.json").read_text())
  index |= {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "requires_safety_checker": True,
  }
  real = tmp_path / "real"
  real.mkdir()
  for path in base.iterdir():
    if path.name != "model_index.json":
      os.symlink(path.resolve(), real / path.name)
  (real / "model_index.json").write_text(json.dumps(index))
  changed(config, model__checkpoint=str(real))
  folders.export(config, str(workdir), tmp_path / "out", "pipeline", "raw")
  written = json.loads((tmp_path / "out" / "model_index.json").read_text())
  assert written["safety_checker"] == [None, None] and written["requires_safety_checker"] is False
  assert written["unet"] == ["diffusers", "UNet2DConditionModel"]


def test_command(tmp_path, capsys):
  assert command.main(["export", f"--config={EMOJI}", f"--out={tmp_path}/out"]) == 2
  assert "error: the following arguments are required: --checkpoint" in capsys.readouterr().err
  assert (
    command.main(["import", f"--config={EMOJI}", f"--out={tmp_path}", "--config.model.chekpoint=x"])
    == 2
  )
  assert (
    "config.model.chekpoint: unknown key; did you mean model.checkpoint?" in capsys.readouterr().err
  )

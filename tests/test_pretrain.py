"""The command that makes the shipped models, on four emoji and three steps a stage.

Its files can be loaded, and it resumes.
"""

import pathlib

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file

from dancegrpo_jax.data import emoji
from dancegrpo_jax.pretrain import __main__

ROOT = pathlib.Path(__file__).resolve().parents[1]
FONT = ROOT / "tests/fixtures/emoji_subset.ttf"
CONFIG = f"--config={ROOT / 'configs' / 'emoji_pretrain.py'}:tiny"


def command(folder: pathlib.Path, *flags: str) -> int:
  return __main__.main(
    [CONFIG, f"--workdir={folder / 'work'}", f"--out={folder / 'out'}", f"--font={FONT}", *flags]
  )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  """A compilation cache, so that a stage is compiled only once in this file."""
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = {name: getattr(jax.config, name) for name in names}
  # JAX looks for the folder only at the first compilation of a process.
  compilation_cache.reset_cache()
  for name, value in zip(names, (str(tmp_path_factory.mktemp("cache")), 0.0)):
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def made(tmp_path_factory, cache):
  """All stages in one run."""
  whole = emoji.pairs
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      emoji,
      "pairs",
      lambda split, names=("red apple", "star", "frog", "ghost"): whole(split, names),
    )
    folder = tmp_path_factory.mktemp("pretrain")
    assert command(folder) == 0
    yield folder


def test_what_it_writes_loads_in_diffusers_and_transformers(made):
  diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
    made / "out/emoji-sd", dtype=torch.float32
  )
  pipeline.set_progress_bar_config(disable=True)
  (image,) = pipeline(
    "a star on a red background", height=32, width=32, num_inference_steps=2, output_type="np"
  ).images
  assert image.shape == (32, 32, 3) and np.isfinite(image).all()
  flux = diffusers.FluxPipeline.from_pretrained(made / "out/emoji-flux")
  flux.set_progress_bar_config(disable=True)
  settings = {
    "height": 32,
    "width": 32,
    "num_inference_steps": 2,
    "guidance_scale": 0.0,
    "max_sequence_length": 12,
  }
  (image,) = flux("a star on a red background", **settings, output_type="np").images
  assert image.shape == (32, 32, 3) and np.isfinite(image).all()
  clip = transformers.CLIPModel.from_pretrained(made / "out/emoji-clip")
  assert clip.config.projection_dim == 64


def test_it_resumes_where_it_stopped(made, tmp_path):
  """Two steps and then a third give the weights of three steps in one run."""
  work, out = tmp_path / "work", tmp_path / "out"
  for name in ("emoji-sd/vae", "emoji-clip"):  # the inputs of the denoiser's stage
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).symlink_to(made / "out" / name)
  assert command(tmp_path, "--stage=denoiser", "--config.denoiser.steps=2") == 0
  assert [path.name for path in (work / "denoiser").iterdir() if path.name.isdigit()] == ["2"]
  assert command(tmp_path, "--stage=denoiser") == 0
  file = "emoji-sd/unet/diffusion_pytorch_model.safetensors"
  resumed, straight = load_file(out / file), load_file(made / "out" / file)
  assert resumed.keys() == straight.keys()
  assert all((resumed[name] == straight[name]).all() for name in straight)
  assert len((work / "denoiser.jsonl").read_text().splitlines()) == 3  # steps 0, 1 and 2


def test_a_font_that_is_not_there(tmp_path, capsys):
  assert command(tmp_path, "--font=/nowhere.ttf") == 2
  assert "/nowhere.ttf" in capsys.readouterr().err and not list(tmp_path.iterdir())

"""The command that makes the shipped video models, on four emoji and three steps a stage.

diffusers and transformers load what it writes, and so does a run.
"""

import pathlib

import numpy as np
import pytest

from dancegrpo_jax.data import moving_emoji
from dancegrpo_jax.pretrain import __main__

ROOT = pathlib.Path(__file__).resolve().parents[1]
FONT = ROOT / "tests/fixtures/emoji_subset.ttf"
CONFIG = f"--config={ROOT / 'configs' / 'emoji_video_pretrain.py'}:tiny"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """All stages in one run."""
  folder = tmp_path_factory.mktemp("pretrain")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(moving_emoji, "NAMES", ("red apple", "star", "frog", "ghost"))
    flags = [f"--workdir={folder / 'work'}", f"--out={folder / 'out'}", f"--font={FONT}"]
    assert __main__.main([CONFIG, *flags]) == 0
  return folder / "out"


def test_what_it_writes_loads_in_diffusers_and_transformers(made):
  diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
  pipeline = diffusers.HunyuanVideoPipeline.from_pretrained(made / "emoji-video")
  pipeline.set_progress_bar_config(disable=True)
  caption = "a star moving left on a red background"
  (clip,) = pipeline(
    caption, height=32, width=32, num_frames=9, num_inference_steps=2, output_type="np"
  ).frames
  assert clip.shape == (9, 32, 32, 3) and np.isfinite(clip).all()
  # The published template has its published length, so that diffusers' default fits.
  ids = pipeline.tokenizer([caption])["input_ids"][0]
  assert pipeline.tokenizer.convert_ids_to_tokens(ids)[1:4] == ["a", "Ġstar", "Ġmoving"]
  clip_model = transformers.CLIPModel.from_pretrained(made / "emoji-video-clip")
  assert clip_model.config.vision_config.image_size == 96
  assert (made / "emoji-video-clip" / "tokenizer_config.json").is_file()


def test_every_stage_has_its_log(made):
  for stage in ("vae", "clip", "video"):
    assert len((made.parent / "work" / f"{stage}.jsonl").read_text().splitlines()) == 2

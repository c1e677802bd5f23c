"""The command that makes the shipped video models, on four emoji and three steps a stage.

diffusers and transformers load what it writes, and so does a run.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from dancegrpo_jax.data import moving_emoji
from dancegrpo_jax.models import causal_conv
from dancegrpo_jax.pretrain import __main__, clip, vae
from dancegrpo_jax.settings import config_file

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
  for stage in ("frames", "vae", "clip", "video"):
    assert len((made.parent / "work" / f"{stage}.jsonl").read_text().splitlines()) == 2


def test_a_clip_starts_as_its_frames():
  """Inflated weights treat a single frame as before, and in a clip no frame sees an earlier one."""
  network = vae.network_of(config_file.load(CONFIG.removeprefix("--config=")).vae.network.to_dict())
  frame = jax.random.uniform(jax.random.key(0), (2, 1, 16, 16, 3))
  before = jax.jit(network.init)(jax.random.key(1), frame)["params"]
  after = vae.inflated(before)
  call = jax.jit(lambda params, x: network.apply({"params": params}, x, method="encode")[0])
  np.testing.assert_allclose(call(after, frame), call(before, frame), atol=1e-5)

  conv = causal_conv.CausalConv(4)
  clip_of = jax.random.normal(jax.random.key(2), (2, 5, 8, 8, 3))
  kernels = conv.init(jax.random.key(3), clip_of)["params"]
  alone = [conv.apply({"params": kernels}, clip_of[:, i : i + 1]) for i in range(5)]
  together = conv.apply({"params": vae.inflated(kernels)}, clip_of)
  np.testing.assert_allclose(together, jnp.concatenate(alone, axis=1), atol=1e-5)
  assert np.abs(conv.apply({"params": kernels}, clip_of) - together).max() > 0.1


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--stage=flow"], "--stage=flow: not a stage of emoji_video_pretrain; use all, frames, vae"),
    (["--stage=vae"], "emoji-video-frames/vae: no autoencoder; run --stage=frames first"),
    (["--stage=video"], "emoji-video/vae: no autoencoder; run --stage=vae first"),
    (["--stage=frames", "--config.vae.error=x"], "config.vae.error = 'x': must be one of absolute"),
    (["--stage=frames", "--config.frames.crop=33"], "crop = 33: must be at most config.size"),
    (["--stage=clip", "--config.clip.negatives=5"], "config.clip.negatives = 5: must be at most 4"),
  ],
)
def test_mistakes_are_one_line(flags, message, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(moving_emoji, "NAMES", ("red apple", "star", "frog", "ghost"))
  folders = [f"--workdir={tmp_path / 'work'}", f"--out={tmp_path / 'out'}", f"--font={FONT}"]
  assert __main__.main([CONFIG, *folders, *flags]) == 2
  line = capsys.readouterr().err.splitlines()[-1]
  assert line.startswith("error: ") and message in line


def test_the_negatives_of_an_image():
  """They stand beside the batch's texts in the image's cross-entropy, and in no text's."""
  rng = np.random.default_rng(0)

  def unit(*shape):
    vectors = rng.standard_normal(shape)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

  text, image, negatives, scale = unit(3, 8), unit(3, 8), unit(3, 2, 8), 10.0
  logits = scale * image @ text.T
  more = scale * np.stack([negatives[i] @ image[i] for i in range(3)])
  by_image = logsumexp(np.concatenate([logits, more], 1), 1) - np.diag(logits)
  by_text = logsumexp(logits, 0) - np.diag(logits)
  arrays = [jnp.asarray(value) for value in (text, image, scale, negatives)]
  loss, metrics = clip._contrastive(*arrays)
  np.testing.assert_allclose(loss, (by_image.mean() + by_text.mean()) / 2, rtol=1e-5)
  np.testing.assert_allclose(metrics["in_group"], (np.diag(logits) > more.max(1)).mean())

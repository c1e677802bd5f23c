"""Videos as files, as film strips and on the report's page."""

import base64
import io
import re
import sys

import numpy as np
import pytest
from PIL import Image
from synthetic_run import make_run

from dancegrpo_jax.report import clips, images, page
from dancegrpo_jax.report import pictures as on_page

FPS = 8.0


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
  """Noise, so that no two frames are alike, but for the last two, which are equal."""
  pixels = np.random.default_rng(0).random((9, 32, 48, 3), np.float32)
  pixels[8] = pixels[7]
  return pixels


def test_a_file_holds_every_frame_without_loss(clip, tmp_path):
  file = images.save_sample(tmp_path / "new" / "a", clip, FPS)
  assert [path.name for path in file.parent.iterdir()] == ["a.webp"]
  with Image.open(file) as opened:
    assert (opened.n_frames, opened.size, opened.info["loop"]) == (8, (48, 32), 0)
    for number in range(8):
      opened.seek(number)
      np.testing.assert_array_equal(opened.convert("RGB"), np.round(clip[number] * 255))
      assert opened.info["duration"] == (250 if number == 7 else 125)  # of equal frames
  frames, fps = clips.read(file)
  assert fps == FPS
  np.testing.assert_array_equal(frames, images.to_uint8(clip))


def test_a_still_video_keeps_its_length(tmp_path):
  still = np.full((5, 8, 8, 3), 0.5, np.float32)
  frames, fps = clips.read(images.save_sample(tmp_path / "a", still, 24.0))
  assert frames.shape == still.shape and fps == 24


def test_mp4(clip, tmp_path, monkeypatch):
  """Where the encoder is installed."""
  frames = images.to_uint8(np.repeat(clip[:, :1, :1], 32, 1).repeat(48, 2))
  with monkeypatch.context() as patch:
    patch.setitem(sys.modules, "imageio_ffmpeg", None)
    clips.save_mp4(tmp_path / "a.mp4", frames, FPS)
  assert not list(tmp_path.iterdir())
  encoder = pytest.importorskip("imageio_ffmpeg")
  clips.save_mp4(tmp_path / "a.mp4", frames, FPS)
  reader = encoder.read_frames(str(tmp_path / "a.mp4"))
  about = next(reader)
  read = np.stack([np.frombuffer(frame, np.uint8).reshape(32, 48, 3) for frame in reader])
  assert about["size"] == (48, 32) and about["fps"] == FPS and len(read) == 9
  np.testing.assert_allclose(read.mean((1, 2)) / 255, clip[:, 0, 0], atol=0.03)  # 8-bit YUV


def test_images_and_videos_in_one_folder_s_order(clip, tmp_path):
  paths = images.save_samples(tmp_path, np.stack([clip, clip]), FPS)
  assert [path.name for path in paths] == ["00.webp", "01.webp"] and images.saved(tmp_path) == paths


@pytest.mark.parametrize("count, shown", [(9, [0, 2, 4, 6, 8]), (3, [0, 1, 2]), (1, [0])])
def test_a_strip_has_evenly_spaced_frames(clip, count, shown):
  strip = clips.strip(clip[:count])
  assert strip.shape == (32, len(shown) * 50 - 2, 3)
  for place, number in enumerate(shown):
    np.testing.assert_array_equal(strip[:, place * 50 : place * 50 + 48], clip[number])
  assert (strip[:, 48:50] == 1).all()


def test_a_grid_of_videos_is_one_of_their_strips(clip):
  strips = np.stack([clips.strip(clip)] * 2)
  expected = images.grid(strips, 2, captions=["a", "b"])
  found = images.grid(np.stack([clip, clip]), 2, captions=["a", "b"])
  np.testing.assert_array_equal(found, expected)


def test_the_page_has_strips_that_play(tmp_path):
  """A strip and an animation for each, inside of the page, and a link to the whole file."""
  workdir = make_run(tmp_path / "run", iterations=20, frames=9)
  text = page.write(workdir).read_text()
  moving = re.findall(r'<img class="moving pixelated" src="data:image/webp;base64,([^"]+)"', text)
  assert len(moving) == len(re.findall(r'class="enlarge"', text)) > 6
  with Image.open(io.BytesIO(base64.b64decode(moving[0]))) as opened:
    opened.load()
    assert (opened.n_frames, opened.info["duration"], opened.size) == (9, 125, (32, 32))
  for file in re.findall(r'class="enlarge" href="([^"]+)"', text):
    assert file.endswith(".webp") and (workdir / file).is_file()


def test_a_large_video_is_small_on_the_page(tmp_path):
  """480 x 480 pixels and 53 frames: a page of 80 such pictures stays below 3 MB."""
  y, x, t = np.mgrid[0:480, 0:480, 0:53]
  clip = np.stack([np.sin(x / 40 + t / 5), np.cos(y / 30), np.sin(t / 9 + y / 50)], -1) / 2 + 0.5
  file = images.save_sample(tmp_path / "a", np.moveaxis(clip, 2, 0).astype(np.float32), FPS)
  embedded = on_page._embedded(file, 0)
  assert len(embedded.uri) + len(embedded.moving) < 36_000
  content = base64.b64decode(embedded.moving.split(",")[1])
  with Image.open(io.BytesIO(content)) as opened:
    opened.load()
    assert opened.n_frames == 9 and opened.size == (96, 96)
    assert opened.n_frames * opened.info["duration"] == pytest.approx(53 / FPS * 1000, rel=0.01)

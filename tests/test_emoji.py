"""The text-to-emoji pictures: what is drawn, what is held out, and that nothing is random."""

import collections
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from dancegrpo_jax.data import emoji

ROOT = pathlib.Path(__file__).resolve().parents[1]
SUBSET = str(ROOT / "tests/fixtures/emoji_subset.ttf")
SUBSET_NAMES = ("red apple", "star", "frog", "ghost")
full_font = pytest.mark.skipif(
  not os.path.isfile(emoji.FONT), reason="the Debian package fonts-noto-color-emoji isn't installed"
)


def test_table():
  assert len(emoji.NAMES) == 160 and len(emoji.COLOURS) == 8
  assert len(set(emoji.EMOJI.values())) == 160
  for name in emoji.NAMES:
    assert name.isascii() and name.islower() and 1 <= len(name.split()) <= 3
    assert name[0] not in "aeio"  # captions write "a" before it
    assert not set(name.split()) & set(emoji.COLOURS) or name == "red apple"
  assert not any(colour[0] in "aeio" for colour in emoji.COLOURS)
  flags_and_skin = [*range(0x1F1E6, 0x1F200), *range(0x1F3FB, 0x1F400)]
  assert not set(emoji.EMOJI.values()) & set(flags_and_skin)


def test_caption():
  assert emoji.caption("red apple", "blue") == "a red apple on a blue background"


def test_held_out_pairs_are_never_in_train():
  train, held_out = emoji.pairs("train"), emoji.pairs("held_out")
  assert len(train) == len(set(train)) == 160 * 7 and len(held_out) == len(set(held_out)) == 160
  assert not set(train) & set(held_out)
  assert set(held_out) == emoji.held_out()
  assert len({name for name, _ in held_out}) == 160
  assert set(collections.Counter(colour for _, colour in held_out).values()) == {20}
  assert len({emoji.pair_id(*pair) for pair in train + held_out}) == 160 * 8


def test_fewer_names_keep_their_split():
  assert emoji.pairs("held_out", SUBSET_NAMES) == [
    p for p in emoji.pairs("held_out") if p[0] in SUBSET_NAMES
  ]
  assert len(emoji.pairs("train", SUBSET_NAMES)) == 4 * 7


def test_unknown_split_and_name():
  with pytest.raises(ValueError, match="splits train and held_out, not 'test'"):
    emoji.pairs("test")
  with pytest.raises(ValueError, match="not in the emoji table: gryphon"):
    emoji.pairs("train", ("gryphon",))


def test_run_prompts_are_training_pairs_of_all_colours():
  pairs = emoji.run_pairs()
  assert len(pairs) == 16 and len({name for name, _ in pairs}) == 16
  assert set(pairs) <= set(emoji.pairs("train"))
  assert set(collections.Counter(colour for _, colour in pairs).values()) == {2}


def test_prompt_files_are_what_the_command_writes(tmp_path):
  emoji.write_prompts(str(tmp_path))
  for name, count in (("train", 1120), ("held_out", 160), ("run", 16)):
    written = (tmp_path / f"emoji_{name}.txt").read_bytes()
    assert written == (ROOT / f"assets/prompts/emoji_{name}.txt").read_bytes()
    assert len(written.decode().splitlines()) == count


LOOKS = [("red apple", "R", "GB"), ("star", "RG", "B"), ("frog", "G", "B"), ("ghost", "RGB", "")]


@pytest.mark.parametrize("name, bright, dark", LOOKS)
def test_glyph_has_its_colours(name, bright, dark):
  """An apple is red, a star yellow, a frog greenish and a ghost white.

  Colours are those of rows 8 to 12 (apple: middle) of 32.
  """
  picture = emoji.draw(SUBSET, name, "purple", 32, 0)
  assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
  rows = slice(12, 20) if name == "red apple" else slice(8, 12)
  channels = dict(zip("RGB", np.median(picture[rows, 12:20].reshape(-1, 3), 0), strict=True))
  assert min(channels[c] for c in bright) > 180
  assert max((channels[c] for c in dark), default=0) < 100


def test_background_and_place():
  for colour, rgb in emoji.COLOURS.items():
    picture = emoji.draw(SUBSET, "star", colour, 32, 0).astype(int)
    for corner in (picture[0, 0], picture[0, -1], picture[-1, 0], picture[-1, -1]):
      np.testing.assert_array_equal(corner, rgb)
    if colour == "yellow":
      continue  # the edge of a yellow star is not visible there
    drawn = np.abs(picture - rgb).max(-1) > 60
    # The picture is centred, and its longer side has the size in the docstring, to a pixel.
    for axis in (0, 1):
      first, last = np.flatnonzero(drawn.any(axis))[[0, -1]]
      assert first + last == pytest.approx(31, abs=1)
    assert last - first + 1 == pytest.approx(32 * emoji.FILL * sum(emoji.SCALES) / 2, abs=2.5)


def test_shift_and_scale_move_the_glyph():
  def extent(shift, scale):
    drawn = (
      np.abs(emoji.render(SUBSET, 0x2B50, 64, (0, 0, 0), shift, scale).astype(int)).max(-1) > 60
    )
    return np.flatnonzero(drawn.any(0))[[0, -1]], np.flatnonzero(drawn.any(1))[[0, -1]]

  (left, right), (top, bottom) = extent((0.0, 0.0), 1.0)
  moved = extent((4 / 64, -4 / 64), 1.0)
  np.testing.assert_allclose(moved, ([left + 4, right + 4], [top - 4, bottom - 4]), atol=1)
  smaller = extent((0.0, 0.0), 0.5)[0]
  assert smaller[1] - smaller[0] == pytest.approx((right - left) / 2, abs=2)


def test_extreme_shift_is_not_cut_off():
  """With the largest scale and shift the outermost rows still show the background."""
  picture = emoji.render(
    SUBSET, 0x1F47B, 32, (0, 0, 0), (emoji.MAX_SHIFT, -emoji.MAX_SHIFT), emoji.SCALES[1]
  )
  whole = emoji.render(SUBSET, 0x1F47B, 32, (0, 0, 0), (0.0, 0.0), emoji.SCALES[1])
  assert picture.sum(dtype=int) == pytest.approx(whole.sum(dtype=int), rel=0.01)


def test_jitter_range_and_determinism():
  values = [
    emoji.jitter(name, colour, variant)
    for name, colour in emoji.pairs("train")[::50]
    for variant in range(8)
  ]
  shifts, scales = np.array([v[0] for v in values]), np.array([v[1] for v in values])
  low, high = emoji.SCALES
  assert (
    np.abs(shifts).max() <= emoji.MAX_SHIFT <= 2 / 32
    and scales.min() >= low >= 0.85
    and scales.max() <= high <= 1
  )
  assert np.abs(shifts).max() > 0.75 * emoji.MAX_SHIFT and scales.max() - scales.min() > 0.75 * (
    high - low
  )
  assert len(set(map(str, values))) == len(values) * 7 // 8 + 1  # variant 0 is the same for all
  code = "from dancegrpo_jax.data import emoji; print(emoji.jitter('frog', 'red', 3))"
  for seed in ("1", "2"):  # Python's hash is salted, so that it must not be used
    out = subprocess.run(
      [sys.executable, "-c", code],
      cwd=ROOT,
      env={**os.environ, "PYTHONHASHSEED": seed},
      capture_output=True,
    )
    assert out.stdout.decode().strip() == str(emoji.jitter("frog", "red", 3))


def test_load_arrays():
  images, captions, ids = emoji.load_arrays(SUBSET, 16, 3, "train", SUBSET_NAMES)
  assert images.shape == (4 * 7 * 3, 16, 16, 3) and images.dtype == np.uint8
  assert captions[:3] == ["a red apple on a red background"] * 3 and ids[:3].tolist() == [2 * 8] * 3
  assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)
  again, _, _ = emoji.load_arrays(SUBSET, 16, 1, "train", SUBSET_NAMES)
  np.testing.assert_array_equal(images[::3], again)  # more variants leave the first unchanged
  with pytest.raises(ValueError, match="no glyph for U\\+1F436"):
    emoji.load_arrays(SUBSET, 16, 1, "train", ("dog",))


def test_missing_and_unfit_font(tmp_path):
  with pytest.raises(
    FileNotFoundError, match="nowhere.ttf; install .* fonts-noto-color-emoji, .* --font=PATH"
  ) as error:
    emoji.load_arrays(str(tmp_path / "nowhere.ttf"), 32, 1, "train")
  assert "\n" not in str(error.value)
  other = tmp_path / "other.ttf"
  other.write_bytes(b"\0\1\0\0" + bytes(2000))
  with pytest.raises(ValueError, match="other.ttf has no colour bitmaps"):
    emoji.load_arrays(str(other), 32, 1, "train")


def test_import_is_light():
  heavy = ("PIL", "jax", "grain", "tensorflow_datasets")
  code = f"import sys, dancegrpo_jax.data.emoji; print([m for m in {heavy} if m in sys.modules])"
  out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
  assert out.stdout.decode().strip() == "[]"


def test_command(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["emoji", f"--sheet={tmp_path}/x.png", "--font=/nowhere.ttf"])
  assert emoji.main() == 2
  assert capsys.readouterr().err.startswith("error: emoji font not found: /nowhere.ttf")
  assert not (tmp_path / "x.png").exists()


@full_font
def test_subset_draws_what_the_full_font_draws():
  for name in SUBSET_NAMES:
    np.testing.assert_array_equal(
      emoji.draw(SUBSET, name, "pink", 32, 2), emoji.draw(emoji.FONT, name, "pink", 32, 2)
    )


@full_font
def test_every_glyph_is_seen_and_no_two_are_alike():
  grey = np.array((128, 128, 128))
  pictures = np.stack(
    [
      emoji.render(emoji.FONT, code, 32, (128, 128, 128), (0.0, 0.0), 1.0)
      for code in emoji.EMOJI.values()
    ]
  )
  drawn = (np.abs(pictures.astype(int) - grey).max(-1) > 24).mean((1, 2))
  assert drawn.min() > 0.12, emoji.NAMES[drawn.argmin()]
  flat = pictures.reshape(len(pictures), -1).astype(np.float32) / 255
  squares = (flat**2).sum(1)
  distance = np.sqrt(
    np.maximum(squares[:, None] + squares[None, :] - 2 * flat @ flat.T, 0) / flat.shape[1]
  )
  np.fill_diagonal(distance, np.inf)
  first, second = np.unravel_index(distance.argmin(), distance.shape)
  assert distance.min() > 0.08, (emoji.NAMES[first], emoji.NAMES[second])

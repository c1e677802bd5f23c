"""Clips of moving emoji: the data set, and the verifier that judges what clips show.

The emoji come from a subset of the font (tests/fixtures). Tests of all 40 need the whole font.
"""

import collections
import functools
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoint import ROOT

from dancegrpo_jax.assembly import reward_builders
from dancegrpo_jax.data import emoji, moving_emoji
from dancegrpo_jax.data.moving_emoji import Scene
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.rewards import moving_object
from dancegrpo_jax.rewards.moving_emoji import TERMS
from dancegrpo_jax.settings import checks, config_file
from dancegrpo_jax.types import Example, Media

SUBSET = str(ROOT / "tests" / "fixtures" / "emoji_subset.ttf")
NAMES = ("red apple", "star", "frog", "ghost")  # of that font
SUBJECTS = ROOT / "assets" / "emoji-video" / "subjects.png"
full_font = pytest.mark.skipif(
  not os.path.isfile(emoji.FONT), reason="the Debian package fonts-noto-color-emoji isn't installed"
)
OPPOSITE = {
  "moving left": "moving right",
  "moving right": "moving left",
  "moving up": "moving down",
  "moving down": "moving up",
  "growing": "shrinking",
  "shrinking": "growing",
}

# The data set


def test_splits():
  train, held_out = moving_emoji.scenes("train"), moving_emoji.scenes("held_out")
  assert len(train) == len(set(train)) == 1600 and len(held_out) == len(set(held_out)) == 320
  assert not set(train) & set(held_out)
  assert len(set(train) | set(held_out)) == 40 * 6 * 8
  # One motion of every emoji, with all eight colours, and every motion for 6 or 7 of 40 emoji.
  pairs = {(scene.name, scene.motion) for scene in held_out}
  assert len(pairs) == len({name for name, _ in pairs}) == 40
  counts = collections.Counter(motion for _, motion in pairs)
  assert len(counts) == 6 and set(counts.values()) == {6, 7}
  with pytest.raises(ValueError, match="splits train and held_out, not 'test'"):
    moving_emoji.scenes("test")


def test_the_scenes_of_the_default_run():
  scenes = moving_emoji.run_scenes()
  assert [scene.name for scene in scenes] == list(emoji.NAMES[:16])
  assert set(scenes) <= set(moving_emoji.scenes("train"))
  motions = collections.Counter(scene.motion for scene in scenes)
  assert len(motions) == 6 and set(motions.values()) == {2, 3}
  colours = collections.Counter(scene.colour for scene in scenes)
  assert len(colours) == 8 and set(colours.values()) == {2}


def test_captions_and_scenes():
  scene = Scene("red apple", "moving left", "blue")
  assert moving_emoji.caption(scene) == "a red apple moving left on a blue background"
  for scene in moving_emoji.scenes("train") + moving_emoji.scenes("held_out"):
    assert moving_emoji.scene_of(moving_emoji.caption(scene)) == scene
  for text in (
    "",
    "a cat on a red background",
    "a red apple moving left on a blue background.",
    "a red apple moving away on a blue background",
    "a penguin growing on a red background",  # an emoji, but none of the 40
  ):
    with pytest.raises(ValueError, match="is no caption of moving emoji, such as 'a dog moving"):
      moving_emoji.scene_of(text)


@pytest.mark.parametrize(
  "motion, direction",
  [
    ("moving left", (-1, 0)),
    ("moving right", (1, 0)),
    ("moving up", (0, -1)),  # rows count downwards
    ("moving down", (0, 1)),
  ],
)
def test_paths_of_directions(motion, direction):
  speeds = []
  for variant in range(50):
    shifts, scales = moving_emoji.path(Scene("frog", motion, "red"), variant)
    assert shifts.shape == (9, 2) and (scales == 1).all() and (np.abs(shifts[4]) <= 2).all()
    steps = np.diff(shifts, axis=0)
    speed = np.abs(steps).sum(1)
    np.testing.assert_allclose(steps, speed[:, None] * direction, atol=1e-12)
    np.testing.assert_allclose(speed, speed[0])
    speeds.append(speed[0])
  assert 0.8 <= min(speeds) < 0.85 and 1.35 < max(speeds) <= 1.4


@pytest.mark.parametrize("motion, sign", [("growing", 1), ("shrinking", -1)])
def test_paths_of_sizes(motion, sign):
  shifts, scales = moving_emoji.path(Scene("frog", motion, "red"), 3)
  np.testing.assert_allclose(scales, 1 + sign * 0.09 * np.arange(-4, 5))
  np.testing.assert_array_equal(shifts, np.tile(shifts[0], (9, 1)))


def test_a_clip_that_shakes_is_moved_in_every_frame():
  scene = Scene("frog", "moving up", "red")
  difference = moving_emoji.path(scene, 3, jitter=1.0).shifts - moving_emoji.path(scene, 3).shifts
  assert (np.abs(difference) <= 1).all() and np.abs(difference).max() > 0.5
  assert len(np.unique(difference)) == 18


def test_clips_are_functions_of_their_arguments():
  scene = Scene("frog", "moving up", "red")
  clip = moving_emoji.draw(SUBSET, scene, 3)
  assert clip.shape == (9, 32, 32, 3) and clip.dtype == np.uint8
  moving_emoji.draw(SUBSET, scene, 4)
  np.testing.assert_array_equal(moving_emoji.draw(SUBSET, scene, 3), clip)
  assert (moving_emoji.draw(SUBSET, scene, 4) != clip).any()
  assert (clip[:, 0, 0] == emoji.COLOURS["red"]).all()


def test_a_split_in_memory(monkeypatch):
  monkeypatch.setattr(moving_emoji, "NAMES", ("frog", "ghost"))
  clips, scenes = moving_emoji.load_arrays(SUBSET, 2, "train", jitter_share=0.3)
  assert clips.shape == (2 * 5 * 8 * 2, 9, 32, 32, 3) and scenes[0] == scenes[1]
  still = [
    (clip == moving_emoji.draw(SUBSET, scene, number % 2)).all()
    for number, (clip, scene) in enumerate(zip(clips, scenes, strict=True))
  ]
  assert abs(np.mean(still) - 0.7) < 0.03


def test_the_files_are_what_the_code_writes(tmp_path):
  command = [sys.executable, "-m", "dancegrpo_jax.data.moving_emoji"]
  subprocess.run([*command, f"--write-prompts={tmp_path}"], cwd=ROOT, check=True)
  counts = {"moving_run": 16, "moving_train": 1600, "moving_held_out": 320}
  for name, count in counts.items():
    written = (tmp_path / f"{name}.txt").read_bytes()
    assert written == (ROOT / "assets" / "prompts" / f"{name}.txt").read_bytes()
    assert len(written.splitlines()) == count
  found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert found.returncode == 2 and "nothing to do" in found.stderr
  found = subprocess.run(
    [*command, f"--write-subjects={tmp_path}", "--font=none.ttf"],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert found.returncode == 2 and found.stderr.startswith("error: emoji font not found: none.ttf")


@full_font
def test_the_subjects_are_what_the_code_writes(tmp_path):
  moving_emoji.write_subjects(emoji.FONT, str(tmp_path))
  written = np.asarray(Image.open(tmp_path / "subjects.png"))
  np.testing.assert_array_equal(written, np.asarray(Image.open(SUBJECTS)))


@pytest.mark.parametrize("name", NAMES)
def test_a_subject_on_a_background_is_the_glyph_of_a_clip(name):
  """The tile of the file, put on a colour by hand, against the font's glyph on that colour."""
  number = moving_emoji.NAMES.index(name)
  row, column = divmod(number, 8)
  tiles = np.asarray(Image.open(SUBJECTS), np.float64)
  tile = tiles[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
  np.testing.assert_array_equal(tile, moving_emoji.subject(SUBSET, name))
  alpha = tile[..., 3:] / 255
  found = alpha * tile[..., :3] + (1 - alpha) * emoji.COLOURS["blue"]
  drawn = emoji.render(
    SUBSET, emoji.EMOJI[name], 16, emoji.COLOURS["blue"], (0.0, 0.0), 12 / 16 / emoji.FILL
  )
  np.testing.assert_allclose(found, drawn, atol=2.5)  # of 255: alpha has 8 bits


# What is measured of clips


def disc(centres, side=9.0, colour=(1.0, 0.5, 0.0), background=(0.1, 0.2, 0.6)) -> np.ndarray:
  """A clip `[1, f, 32, 32, 3]` of a disc with a soft edge, which may lie between pixels."""
  frames = []
  for (x, y), diameter in zip(centres, np.broadcast_to(side, len(centres)), strict=True):
    radius = np.hypot(np.arange(32)[:, None] - y, np.arange(32) - x)
    alpha = np.clip((diameter / 2 - radius) / 2 + 0.5, 0, 1)[..., None]
    frames.append(alpha * np.array(colour) + (1 - alpha) * np.array(background))
  return np.stack(frames)[None].astype(np.float32)


TIMES = np.arange(9) - 4


def test_velocity_of_a_disc():
  velocity = np.array([1.2, -0.4])
  found = moving_object.measure(disc(15.5 + TIMES[:, None] * velocity))
  np.testing.assert_allclose(found.velocity[0], velocity, atol=5e-3)
  np.testing.assert_allclose(found.background[0], [0.1, 0.2, 0.6], atol=1e-6)
  assert found.seen[0] == 1
  assert abs(found.growth[0]) < 2e-3 and found.shake[0] < 0.05 and found.change[0] < 2e-2


def test_growth_of_a_disc():
  """The blurred edge adds a constant to every side, so that growth is a little less than drawn."""
  found = moving_object.measure(disc(np.full((9, 2), 15.5), 11 * (1 + 0.09 * TIMES)))
  assert 0.075 < found.growth[0] < 0.09
  np.testing.assert_allclose(found.velocity[0], 0, atol=5e-3)


def test_shake_of_a_zigzag():
  """The second difference of (-1)^t is 4 in every frame. Steps of whole pixels are exact."""
  centres = np.stack([15.5 + 0.5 * (-1.0) ** TIMES, 15.5 + 1.0 * TIMES], 1)
  found = moving_object.measure(disc(centres))
  np.testing.assert_allclose(found.shake[0], 4 * 0.5, atol=1e-4)


def test_frames_without_an_object_count_as_not_seen():
  clip = disc(15.5 + TIMES[:, None] * np.array([1.0, 0.0]))
  clip[0, [1, 6]] = clip[0, 0, 0, 0]
  found = moving_object.measure(clip)
  np.testing.assert_allclose(found.seen[0], 7 / 9)
  np.testing.assert_allclose(found.velocity[0], [1, 0], atol=5e-3)


def test_an_empty_clip_has_no_motion():
  found = moving_object.measure(np.full((1, 9, 32, 32, 3), 0.5, np.float32))
  assert found.seen[0] == found.growth[0] == found.shake[0] == found.change[0] == 0
  assert not found.velocity.any() and not found.picture.any()


def test_a_small_object_is_cut_out_as_large_as_a_large_one():
  """A disc of half the size, cut out at half the step, covers as much."""
  large, small = (
    np.moveaxis(disc([[15.5, 15.5]], side, background=(0, 0, 0))[0], -1, 1) for side in (12, 6)
  )
  centre = np.array([[15.5, 15.5]])
  found = [
    moving_object.cut_out(pictures, centre, np.array([scale]))
    for pictures, scale in ((large, 1.0), (small, 0.5))
  ]
  # Within a diameter of 7, which is inside of the soft edges, both are the disc's colour.
  inside = np.hypot(*np.mgrid[-7.5:8, -7.5:8]) < 3.5
  for picture in found:
    np.testing.assert_allclose(picture[0, 0][inside], 1, atol=0.02)
  np.testing.assert_allclose(found[0].sum(), found[1].sum(), rtol=0.05)


# The verifier


@functools.cache
def verifier():
  config = config_file.load(
    f"{ROOT / 'configs' / 'emoji_clip.py'}:tiny",
    [f"reward.terms={','.join(f'moving_emoji/{term}' for term in TERMS)}"],
  )
  checks.validate(config, num_devices=1, num_examples=16)
  return reward_builders.build_rewards(config)["moving_emoji"]


def scores(clips: np.ndarray, scenes: list[Scene]) -> dict[str, np.ndarray]:
  examples = [Example(i, moving_emoji.caption(scene)) for i, scene in enumerate(scenes)]
  found = verifier().score(Media(clips, 8.0), examples)
  assert set(found) == {f"moving_emoji/{term}" for term in TERMS}
  return {term: found[f"moving_emoji/{term}"] for term in TERMS}


# Every emoji of the subset and every motion, on backgrounds that differ from them.
SCENES = [
  Scene(name, motion, colour)
  for name, colours in {
    "red apple": ("blue", "white"),
    "star": ("purple", "green"),
    "frog": ("red", "white"),
    "ghost": ("green", "blue"),
  }.items()
  for colour in colours
  for motion in moving_emoji.MOTIONS
]


@functools.cache
def clips(jitter: float = 0.0) -> np.ndarray:
  """A clip of each of `SCENES`, of a variant that no model is trained on."""
  drawn = [moving_emoji.draw(SUBSET, scene, 1000, jitter) for scene in SCENES]
  return np.stack(drawn).astype(np.float32) / 255


def changed(**fields) -> list[Scene]:
  """`SCENES` with other values: functions from the old value to the new one."""
  return [
    scene._replace(**{key: change(getattr(scene, key)) for key, change in fields.items()})
    for scene in SCENES
  ]


def test_clean_clips():
  found = scores(clips(), SCENES)
  assert found["vq"].min() > 0.65 and found["vq"].mean() > 0.85
  assert found["mq"].min() > 0.9
  assert found["ta"].min() > 0.75 and found["ta"].mean() > 0.9
  assert (found["direction"] == 1).all()
  assert all((row <= 1 + 1e-6).all() for row in found.values())


def test_the_opposite_motion():
  """Quality doesn't depend on the caption. Alignment loses 1: half of 1 becomes half of -1."""
  clean, found = scores(clips(), SCENES), scores(clips(), changed(motion=OPPOSITE.get))
  np.testing.assert_array_equal(found["vq"], clean["vq"])
  np.testing.assert_array_equal(found["mq"], clean["mq"])
  np.testing.assert_allclose(clean["ta"] - found["ta"], 1, atol=1e-3)
  assert (found["direction"] == 0).all()


def test_no_motion_is_right_for_two_captions():
  """All 36 pairs of a drawn motion and a motion in the caption, and the diagonal between two."""
  for motion in moving_emoji.MOTIONS:
    found = scores(clips(), changed(motion=lambda _, motion=motion: motion))
    expected = [scene.motion == motion for scene in SCENES]
    np.testing.assert_array_equal(found["direction"], expected)
  diagonal = disc(15.5 + TIMES[:, None] * np.array([1.0, 1.0]))
  for motion in moving_emoji.MOTIONS:
    assert scores(diagonal, [Scene("frog", motion, "blue")])["direction"] == 0


def test_a_still_clip():
  found = scores(np.repeat(clips()[:, 4:5], 9, axis=1), SCENES)
  np.testing.assert_allclose(found["vq"], 1, atol=1e-5)
  np.testing.assert_allclose(found["mq"], 0, atol=1e-5)
  assert found["ta"].max() < 0.501 and (found["direction"] == 0).all()


@pytest.mark.parametrize("jitter", [0.7, 1.0])
def test_jitter_costs_motion_quality(jitter):
  """Each coordinate is moved by up to j, evenly, which has variance j^2 / 3. Second differences
  have 1 + 4 + 1 times that of each of two coordinates, and smoothness is exp(-variance / 1.5^2).
  """
  clean, found = scores(clips(), SCENES), scores(clips(jitter), SCENES)
  expected = np.exp(-2 * 6 * jitter**2 / 3 / 1.5**2)
  assert abs(np.mean(found["mq"]) / np.mean(clean["mq"]) - expected) < 0.07
  assert np.mean(found["vq"]) > np.mean(clean["vq"]) - 0.05
  assert (found["direction"] == 1).all()


def test_flicker_costs_visual_quality():
  levels = np.random.default_rng(0).uniform(0.4, 1, (len(SCENES), 9, 1, 1, 1)).astype(np.float32)
  clean, whole = scores(clips(), SCENES), scores(clips() * levels, SCENES)
  assert np.mean(whole["vq"]) < 0.5 * np.mean(clean["vq"])
  ground = clips()[:, :, :1, :1]
  glyph = scores(ground + levels * (clips() - ground), SCENES)
  assert np.mean(whole["vq"]) < np.mean(glyph["vq"]) < np.mean(clean["vq"]) - 0.1


def test_a_size_that_flickers_costs_visual_quality():
  sides = 10 + 1.5 * (-1.0) ** TIMES
  centres = 15.5 + TIMES[:, None] * np.array([1.0, 0.0])
  scene = [Scene("frog", "moving right", "blue")]
  steady, flickers = (scores(disc(centres, side), scene) for side in (10.0, sides))
  assert flickers["vq"] < steady["vq"] - 0.2


def test_another_emoji():
  """Half of alignment is left, that of the motion."""
  others = dict(zip(NAMES, (*NAMES[1:], NAMES[0]), strict=True))
  clean, found = scores(clips(), SCENES), scores(clips(), changed(name=others.get))
  np.testing.assert_allclose(found["ta"], 0.5, atol=0.02)
  for term in ("vq", "mq", "direction"):
    np.testing.assert_array_equal(found[term], clean[term])


def test_another_background():
  """Half of alignment is left again, since the emoji counts only on its background."""
  found = scores(clips(), changed(colour=lambda c: "cyan" if c in ("red", "purple") else "red"))
  np.testing.assert_allclose(found["ta"], 0.5, atol=0.02)
  assert (found["direction"] == 1).all()


def test_an_emoji_that_is_not_there():
  found = scores(np.repeat(np.repeat(clips()[:, :, :1, :1], 32, axis=2), 32, axis=3), SCENES)
  for row in found.values():
    np.testing.assert_array_equal(row, 0)


def test_what_can_t_be_judged_is_nan():
  """A pixel that is not finite, a text that is no caption, and a yellow star on yellow."""
  scenes = [Scene("frog", "moving left", "red")] * 4
  prompts = [moving_emoji.caption(scene) for scene in scenes]
  prompts[2] = "a photo of a frog"
  prompts[3] = "a star moving left on a yellow background"
  videos = np.stack([moving_emoji.draw(SUBSET, scene, 0) for scene in scenes]) / np.float32(255)
  videos[1, 8, 31, 31, 2] = np.nan
  found = verifier().score(Media(videos, 8.0), [Example(i, p) for i, p in enumerate(prompts)])
  for row in found.values():
    assert row.dtype == np.float32
    np.testing.assert_array_equal(np.isfinite(row), [True, False, False, False])
  alone = verifier().score(Media(videos[1:2], 8.0), [Example(1, prompts[1])])
  assert all(np.isnan(row).all() for row in alone.values())


def test_a_clip_s_score_does_not_depend_on_the_others():
  together = scores(clips(), SCENES)
  some = slice(5, 12)
  alone = scores(clips()[some], SCENES[some])
  for term in TERMS:
    np.testing.assert_allclose(alone[term], together[term][some], atol=1e-6)


def test_every_prompt_of_the_run_can_be_judged():
  grey = np.full((16, 9, 32, 32, 3), 0.5, np.float32)
  found = scores(grey, moving_emoji.run_scenes())
  assert all(np.isfinite(row).all() for row in found.values())


@pytest.mark.parametrize("shape", [(32, 32, 3), (2, 32, 32, 3), (9, 64, 64, 3), (9, 32, 48, 3)])
def test_samples_of_another_shape_are_refused(shape):
  with pytest.raises(ConfigError, match="'moving_emoji' judges clips of at least 3 frames of 32 x"):
    reward_builders.require_scorable({"moving_emoji": verifier()}, shape)
  reward_builders.require_scorable({"moving_emoji": verifier()}, (9, 32, 32, 3))


def test_a_file_of_subjects_that_can_t_be_used(tmp_path):
  Image.new("RGB", (128, 80)).save(tmp_path / "small.png")
  (tmp_path / "text.png").write_text("no image")
  for name, message in {
    "none.png": "no such file .*--write-subjects=FOLDER` writes it too",
    "small.png": "must be an image with RGBA of 128 x 80, .* \\(RGB of 128 x 80\\)",
    "text.png": "must be an image with RGBA of 128 x 80, .*cannot identify image file",
  }.items():
    config = config_file.load(
      f"{ROOT / 'configs' / 'emoji_clip.py'}:tiny",
      ["reward.terms=moving_emoji/ta", f"reward.moving_emoji.subjects={tmp_path / name}"],
    )
    with pytest.raises(ConfigError, match=f"config.reward.moving_emoji.subjects = .*{message}"):
      reward_builders.build_rewards(config)


@full_font
def test_all_emoji_are_told_apart():
  """Of the font's own 40 emoji, in all motions, the verifier finds the caption's."""
  scenes = [
    Scene(name, motion, list(emoji.COLOURS)[(i + 3 * j) % 8])
    for i, name in enumerate(moving_emoji.NAMES)
    for j, motion in enumerate(moving_emoji.MOTIONS)
  ]
  drawn = np.stack([moving_emoji.draw(emoji.FONT, scene, 1000) for scene in scenes])
  found = scores(drawn.astype(np.float32) / 255, scenes)
  judged = np.isfinite(found["ta"])
  assert judged.mean() > 0.97
  assert (found["direction"][judged] == 1).all()
  # The motion is right, so that more than 0.75 says: the emoji has more than half of all shares.
  assert (found["ta"][judged] > 0.75).mean() > 0.98 and found["ta"][judged].mean() > 0.93

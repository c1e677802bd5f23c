"""Rewards of images on videos: the chosen frames and the mean of their scores, and sheets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import ROOT

from dancegrpo_jax.assembly import reward_builders
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.rewards import frames, kinds
from dancegrpo_jax.settings import checks, config_file, stored_config
from dancegrpo_jax.types import Example, Media

VIDEO = (5, 32, 32, 3)  # the shape of one sample
EXAMPLES = [Example(0, "a red apple on a blue background"), Example(1, "a cat")]


def config(choice: str):
  overrides = [
    "reward.terms=clip:1,compressibility:1",
    *(f"reward.{name}.frames={choice}" for name in ("clip", "compressibility")),
  ]
  return config_file.load(f"{ROOT / 'configs' / 'emoji_clip.py'}:tiny", overrides)


@pytest.fixture(scope="module")
def videos() -> np.ndarray:
  return np.random.default_rng(0).random((2, *VIDEO), np.float32)


@pytest.mark.parametrize(
  "choice, count, expected",
  [
    ("first", 9, [0]),
    ("middle", 9, [4]),
    ("middle", 4, [1]),
    ("1", 9, [4]),
    ("all", 3, [0, 1, 2]),
    ("2", 9, [0, 8]),
    ("3", 9, [0, 4, 8]),
    ("4", 53, [0, 17, 35, 52]),
    ("9", 9, list(range(9))),
  ],
)
def test_chosen_frames(choice, count, expected):
  assert frames.chosen(choice, count).tolist() == expected


def test_more_frames_than_there_are():
  with pytest.raises(ValueError, match="5 frames only"):
    frames.chosen("6", 5)


@pytest.mark.parametrize("choice, shown", [("3", [0, 2, 4]), ("all", range(5)), ("first", [0])])
def test_the_score_of_a_video_is_the_mean_over_frames(videos, choice, shown):
  """What the reward says of the same frames as single images is what is expected."""
  loaded = config(choice)
  rewards = reward_builders.build_rewards(loaded)
  # On the host.
  reward = rewards["compressibility"]
  each = [reward.score(Media(videos[:, i]), EXAMPLES)["compressibility"] for i in shown]
  found = reward.score(Media(videos, 8.0), EXAMPLES)["compressibility"]
  np.testing.assert_allclose(found, np.mean(each, 0), rtol=1e-6)
  # On the device.
  reward = rewards["clip"]
  params = reward_builders.read_reward(reward, None)
  features = reward.features(params, jnp.asarray(reward.prepare(EXAMPLES)))
  each = [reward.score(params, Media(videos[:, i]), features)["clip"] for i in shown]
  found = jax.jit(reward.score)(params, Media(videos, 8.0), features)["clip"]
  np.testing.assert_allclose(found, np.mean(each, 0), atol=2e-6)
  rows = np.mean([reward.embed(params, Media(videos[:, i])) for i in shown], 0)
  expected = rows / np.linalg.norm(rows, axis=1, keepdims=True)
  np.testing.assert_allclose(reward.embed(params, Media(videos, 8.0)), expected, atol=2e-6)


def numbered(count: int) -> np.ndarray:
  """A video of 2 x 3 pixels whose frames are 1, 2, ... in every pixel."""
  numbers = np.arange(1, count + 1, dtype=np.float32)
  return np.broadcast_to(numbers[None, :, None, None, None], (1, count, 2, 3, 3))


@pytest.mark.parametrize(
  "count, grid",
  [
    (1, [[1]]),
    (2, [[1, 2]]),
    (3, [[1, 2], [3, 0]]),
    (5, [[1, 2, 3], [4, 5, 0]]),
    (9, [[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
  ],
)
def test_a_sheet_has_the_frames_row_by_row(count, grid):
  expected = np.kron(np.array(grid), np.ones((2, 3)))[None, ..., None].repeat(3, -1)
  video = numbered(count)
  np.testing.assert_array_equal(frames.sheet(video), expected)
  np.testing.assert_array_equal(frames.sheet(jnp.asarray(video)), expected)


def test_a_sheet_keeps_the_pixels_of_a_frame(videos):
  """Numbered frames don't show whether rows and columns within a frame stay where they are."""
  found = frames.sheet(videos)
  assert found.shape == (2, 64, 96, 3)
  np.testing.assert_array_equal(found[:, :32, 64:], videos[:, 2])
  np.testing.assert_array_equal(found[:, 32:, 32:64], videos[:, 4])
  assert not found[:, 32:, 64:].any()


def test_a_sheet_is_scored_as_one_image(videos):
  """The expected sheet of five frames is put together by hand."""
  rewards = reward_builders.build_rewards(config("sheet"))
  black = np.zeros_like(videos[:, 0])
  rows = [[videos[:, 0], videos[:, 1], videos[:, 2]], [videos[:, 3], videos[:, 4], black]]
  sheet = Media(np.concatenate([np.concatenate(row, axis=2) for row in rows], axis=1))
  # On the host.
  reward = rewards["compressibility"]
  expected = reward.score(sheet, EXAMPLES)["compressibility"]
  found = reward.score(Media(videos, 8.0), EXAMPLES)["compressibility"]
  np.testing.assert_array_equal(found, expected)
  # On the device.
  reward = rewards["clip"]
  params = reward_builders.read_reward(reward, None)
  features = reward.features(params, jnp.asarray(reward.prepare(EXAMPLES)))
  expected = reward.score(params, sheet, features)["clip"]
  found = jax.jit(reward.score)(params, Media(videos, 8.0), features)["clip"]
  np.testing.assert_allclose(found, expected, atol=2e-6)
  expected = reward.embed(params, sheet)
  np.testing.assert_allclose(reward.embed(params, Media(videos, 8.0)), expected, atol=2e-6)
  reward_builders.require_scorable(rewards, VIDEO)


def test_of_images_no_sheet_is_made(videos):
  images = Media(videos[:, 0])
  scores = [
    reward_builders.build_rewards(config(choice))["compressibility"].score(images, EXAMPLES)
    for choice in ("error", "sheet")
  ]
  np.testing.assert_array_equal(scores[0]["compressibility"], scores[1]["compressibility"])


@pytest.mark.parametrize("choice", ["all", "sheet"])
def test_a_frame_that_fails_fails_its_video(videos, choice):
  reward = reward_builders.build_rewards(config(choice))["compressibility"]
  spoilt = videos.copy()
  spoilt[1, 3, 0, 0, 0] = np.nan
  scores = reward.score(Media(spoilt, 8.0), EXAMPLES)["compressibility"]
  assert np.isfinite(scores[0]) and np.isnan(scores[1])


@pytest.mark.parametrize(
  "choice, message",
  [
    (
      "error",
      "config.reward.clip.frames = 'error': the reward 'clip' scores images, and the model",
    ),
    ("6", "config.reward.clip.frames = '6': a video has 5 frames only; set it to at most 5"),
  ],
)
def test_what_can_t_be_scored_is_one_line_a_reward(choice, message):
  rewards = reward_builders.build_rewards(config(choice))
  with pytest.raises(ConfigError) as caught:
    reward_builders.require_scorable(rewards, VIDEO)
  lines = str(caught.value).splitlines()
  assert len(lines) == 2 and lines[0].startswith(message)
  reward_builders.require_scorable(rewards, VIDEO[1:])  # pictures: the field changes nothing


def test_a_wrong_choice_is_named():
  with pytest.raises(ConfigError, match="reward.clip.frames = 'last': must be one of error, first"):
    checks.validate(config("last"), num_devices=1, num_examples=16)


def test_every_reward_of_images_has_the_field():
  """In configs/common.py, and for the workdirs of earlier versions."""
  fields = stored_config.flatten(config_file.load(str(ROOT / "configs" / "common.py")))
  names = [kind.section for kind in kinds.KINDS.values() if kind.of_images]
  assert len(names) == 5
  for name in names:
    assert fields[f"reward.{name}.frames"] == "error"
    assert stored_config.ADDED[f"reward.{name}.frames"].value == "error"


def test_a_reward_of_ones_own_keeps_a_field_of_that_name(monkeypatch):
  """It may mean anything there: only kinds that say that they are of images are changed."""
  kind = kinds.KINDS["compressibility"]._replace(of_images=False)
  monkeypatch.setitem(kinds.KINDS, "compressibility", kind)
  reward = reward_builders.build_rewards(config("first"))["compressibility"]
  assert reward.refusal is None

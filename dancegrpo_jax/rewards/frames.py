"""Rewards of single images on videos: the mean of the scores of some frames, or the score of all
frames in one image.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num

from dancegrpo_jax.rewards.base import Reward
from dancegrpo_jax.types import Example, Media, PyTree

NAMED = ("error", "first", "middle", "all", "sheet")
FIELD = "frames"  # of a reward's section of the config


def is_valid(choice: str) -> bool:
  """Whether a choice is one of `NAMED`, or a number of frames, at least 1, as text."""
  return choice in NAMED or (choice.isascii() and choice.isdecimal() and int(choice) > 0)


def chosen(choice: str, count: int) -> np.ndarray:
  """The frames that are scored, each on its own.

  Args:
    choice: "first", "middle" (of an even number the earlier of the two), "all", or a number k for k
      evenly spaced ones with the first and the last among them. One frame is the middle one.
    count: the frames of a video.

  Raises:
    ValueError: k is more than there are.
  """
  middle = (count - 1) // 2
  named = {"first": [0], "middle": [middle], "1": [middle], "all": range(count)}
  if choice in named:
    return np.array(named[choice])
  if int(choice) > count:
    raise ValueError(f"a video has {count} frames only")
  return np.round(np.linspace(0, count - 1, int(choice))).astype(int)


def sheet(pixels: Num[Array | np.ndarray, "b f h w 3"]) -> Num[Array | np.ndarray, "b i j 3"]:
  """A contact sheet of every video: its frames in one image, row by row.

  The grid is as square as possible, and cells that are left over are black.
  """
  count, height, width = pixels.shape[1:4]
  columns = math.ceil(math.sqrt(count))
  rows = math.ceil(count / columns)
  xp = np if isinstance(pixels, np.ndarray) else jnp
  cells = xp.pad(pixels, ((0, 0), (0, rows * columns - count), (0, 0), (0, 0), (0, 0)))
  grid = cells.reshape(-1, rows, columns, height, width, pixels.shape[-1])
  return grid.swapaxes(2, 3).reshape(-1, rows * height, columns * width, pixels.shape[-1])


def of_videos(reward: Reward, choice: str, where: str) -> Reward:
  """A reward of images that scores videos too, by the mean over some of their frames.

  A video fails where one of the chosen frames fails. An embedding of a video is the mean of its
  frames' embeddings, at length 1. With "sheet" score and embedding are those of one image instead,
  the contact sheet of the video.

  Args:
    reward: of images.
    choice: which frames, see `chosen`; "sheet" for `sheet`; "error" refuses videos.
    where: the full name of the section, for messages.
  """

  def refusal(shape: tuple[int, ...]) -> str:
    if len(shape) == 3:
      return ""
    field = f"config.{where}.{FIELD} = {choice!r}"
    if choice == "error":
      return (
        f"{field}: the reward {reward.name!r} scores images, and the model draws {shape[0]} frames;"
        " set it to first, middle, all, sheet, or a number of frames"
      )
    if choice == "sheet":
      return ""
    try:
      chosen(choice, shape[0])
    except ValueError as error:
      return f"{field}: {error}; set it to at most {shape[0]}"
    return ""

  def spread(media: Media) -> tuple[Media, int]:
    """The images that are scored, video by video, and how many each video has."""
    if choice == "sheet":
      return Media(sheet(media.pixels)), 1
    frames = chosen(choice, media.pixels.shape[1])
    pixels = media.pixels[:, frames]
    return Media(pixels.reshape(-1, *pixels.shape[2:])), len(frames)

  def score(*arguments: Any) -> dict:
    *before, media, rows = arguments
    if media.pixels.ndim == 4 or choice == "error":
      return reward.score(*arguments)
    images, count = spread(media)
    scores = reward.score(*before, images, _repeated(rows, count))
    return {term: values.reshape(-1, count).mean(-1) for term, values in scores.items()}

  def embed(params: PyTree, media: Media) -> jax.Array:
    assert reward.embed is not None
    if media.pixels.ndim == 4 or choice == "error":
      return reward.embed(params, media)
    images, count = spread(media)
    rows = reward.embed(params, images)
    mean = rows.reshape(-1, count, rows.shape[-1]).mean(1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)

  embeds: Callable | None = embed if reward.embed else None
  return reward._replace(score=score, embed=embeds, refusal=refusal)


def _repeated(rows: PyTree | list[Example], count: int) -> PyTree | list[Example]:
  """Each row `count` times: of a list of examples, or of every array of a tree."""
  if isinstance(rows, list):
    return [example for example in rows for _ in range(count)]
  return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), rows)

"""Measures of clips that show one object on a plain background: where it is, how it moves, and how
it looks.

All of them are closed forms in NumPy, for whole batches. Lengths are pixels, and points are (right,
down) from the middle of the picture's first pixel.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

BORDER = 2  # width of the border whose median is the background, pixels
# Differences from the background up to FAINT are none, and twice as large ones are the object. The
# length of an RGB vector of which each channel is in [0, 1].
FAINT = 0.15
# An object is seen where it covers more than the one and less than the other, pixels: an emoji that
# shrinks to 8 x 8 in colours near the background's, and a square of 20 x 20.
AREAS = (6.0, 400.0)
SIDE = 16  # height and width of an object's picture


class Measures(NamedTuple):
  """What is measured of b clips. Where the object isn't seen, motion and growth are 0.

  Attributes:
    background: its colour, RGB in [0, 1].
    seen: the share of frames in which an object is seen.
    velocity: of its centre, pixels a frame.
    shake: root mean square of the second differences of its centre, pixels a frame squared.
    growth: the change of its side in a frame, as a share of its mean side.
    picture: the mean over frames of the object, cut out at its centre and in its size, minus the
      background.
    change: the mean difference between a frame's cut-out picture and `picture`.
  """

  background: Float[np.ndarray, "b 3"]
  seen: Float[np.ndarray, "b"]
  velocity: Float[np.ndarray, "b 2"]
  shake: Float[np.ndarray, "b"]
  growth: Float[np.ndarray, "b"]
  picture: Float[np.ndarray, "b 3 side side"]
  change: Float[np.ndarray, "b"]


def measure(clips: Float[np.ndarray, "b f h w 3"]) -> Measures:
  """The measures of clips of at least three frames with finite pixels in [0, 1]."""
  count, frames = clips.shape[:2]
  pixels = np.moveaxis(clips, -1, 2)
  edge = pixels[..., _border(*pixels.shape[-2:])]
  background = np.median(edge.swapaxes(1, 2).reshape(count, 3, -1), axis=-1)
  differences = blur(pixels - background[:, None, :, None, None])
  areas, centres = located(differences)

  seen = (areas > AREAS[0]) & (areas < AREAS[1])
  weights = seen / np.maximum(seen.sum(1, keepdims=True), 1)
  times = np.arange(frames) - (weights * np.arange(frames)).sum(1, keepdims=True)
  spread = np.maximum((weights * times**2).sum(1), 1e-6)
  sides = np.sqrt(areas)
  growth = (weights * times * sides).sum(1) / spread / np.maximum((weights * sides).sum(1), 1e-6)
  # A cut-out follows the line through the sides and not each of them, so that an object whose size
  # flickers changes. The limits matter only to frames that show something else.
  scales = np.clip(1 + growth[:, None] * times, 0.25, 4.0)
  cutouts = cut_out(differences, centres, scales)
  share = weights[:, :, None, None, None]
  picture = (share * cutouts).sum(1)
  change = (share * np.abs(cutouts - picture[:, None])).sum(1).mean((1, 2, 3))
  return Measures(
    background=background,
    seen=seen.mean(1),
    velocity=((weights * times)[..., None] * centres).sum(1) / spread[:, None],
    shake=_shake(centres, seen),
    growth=growth,
    picture=picture,
    change=change,
  )


def _border(height: int, width: int) -> Bool[np.ndarray, "h w"]:
  """The pixels of the border."""
  border = np.ones((height, width), bool)
  border[BORDER:-BORDER, BORDER:-BORDER] = False
  return border


def _shake(
  centres: Float[np.ndarray, "b f 2"], seen: Bool[np.ndarray, "b f"]
) -> Float[np.ndarray, "b"]:
  """Root mean square of the second differences, over the frames that are seen three in a row."""
  second = centres[:, 2:] - 2 * centres[:, 1:-1] + centres[:, :-2]
  usable = seen[:, 2:] & seen[:, 1:-1] & seen[:, :-2]
  total = ((second**2).sum(-1) * usable).sum(1)
  return np.sqrt(total / np.maximum(usable.sum(1), 1))


def blur(pictures: Float[np.ndarray, "... h w"]) -> Float[np.ndarray, "... h w"]:
  """The mean over 3 x 3 pixels; outside of a picture is 0."""
  *before, height, width = pictures.shape
  wide = np.pad(pictures, (*((0, 0),) * len(before), (1, 1), (1, 1)))
  rows = wide[..., :height, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
  return (rows[..., :width] + rows[..., 1:-1] + rows[..., 2:]) / 9


def located(
  differences: Float[np.ndarray, "... 3 h w"],
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "... 2"]]:
  """Area and centre of what differs from the background; the centre of nothing is (0, 0)."""
  height, width = differences.shape[-2:]
  length = np.sqrt(np.square(differences).sum(-3))
  mask = np.clip((length - FAINT) / FAINT, 0, 1)
  columns, rows = mask.sum(-2), mask.sum(-1)
  areas = rows.sum(-1)
  moments = np.stack([columns @ np.arange(width), rows @ np.arange(height)], -1)
  return areas, moments / np.maximum(areas, 1e-6)[..., None]


def cut_out(
  differences: Float[np.ndarray, "... 3 h w"],
  centres: Float[np.ndarray, "... 2"],
  scales: Float[np.ndarray, "..."],
) -> Float[np.ndarray, "... 3 side side"]:
  """`SIDE` x `SIDE` pixels around a centre, `scales` pixels of the picture apart. They are
  interpolated linearly; outside of the picture is 0, the background.
  """
  height, width = differences.shape[-2:]
  down = _tents(centres[..., 1], scales, height).astype(differences.dtype)
  right = _tents(centres[..., 0], scales, width).astype(differences.dtype)
  return down[..., None, :, :] @ differences @ right[..., None, :, :].swapaxes(-1, -2)


def _tents(
  centres: Float[np.ndarray, "..."], scales: Float[np.ndarray, "..."], length: int
) -> Float[np.ndarray, "... side length"]:
  """The weights of `length` pixels in each pixel of a cut-out, along one axis.

  A pixel that covers several of the picture's is a mean of them.
  """
  offsets = np.arange(SIDE) - (SIDE - 1) / 2
  places = centres[..., None] + scales[..., None] * offsets
  reach = np.maximum(scales, 1)[..., None, None]
  return np.maximum(0, 1 - np.abs(np.arange(length) - places[..., None]) / reach) / reach

"""What the example is about: small pictures of coloured shapes, named by their captions."""

import itertools

import numpy as np

SIZE = 16  # height and width, pixels
COLOURS = {
  "red": (0.9, 0.15, 0.15),
  "green": (0.15, 0.75, 0.2),
  "blue": (0.2, 0.3, 0.95),
  "yellow": (0.95, 0.85, 0.15),
  "purple": (0.6, 0.2, 0.8),
  "orange": (0.95, 0.5, 0.1),
}
SHAPES = ("disc", "square", "cross")
CAPTIONS = tuple(f"{colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES))
BACKGROUND = 0.08  # grey
RADIUS = (3.0, 6.0)  # of a shape, pixels
SHIFT = 1.5  # of its middle from the picture's, each way, pixels


def draw(caption: str, rng: np.random.Generator) -> np.ndarray:
  """A picture of a caption, float32 `[SIZE, SIZE, 3]` in [0, 1]; place and radius are random.
  KeyError: an unknown colour.
  """
  colour, shape = caption.split()
  radius = rng.uniform(*RADIUS)
  y, x = SIZE / 2 + rng.uniform(-SHIFT, SHIFT, 2)
  rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
  across, down = np.abs(columns - x), np.abs(rows - y)
  # How far inside the edge a pixel's centre is, in pixels: that makes the edge one pixel soft.
  inside = {
    "disc": radius - np.hypot(across, down),
    "square": 0.85 * radius - np.maximum(across, down),
    "cross": np.minimum(
      radius - np.maximum(across, down), 0.35 * radius - np.minimum(across, down)
    ),
  }[shape]
  cover = np.clip(inside + 0.5, 0.0, 1.0)[..., None]
  return (cover * np.array(COLOURS[colour]) + (1 - cover) * BACKGROUND).astype(np.float32)


def batch(captions: list[str], seed: list[int]) -> np.ndarray:
  """One picture a caption, `[n, SIZE, SIZE, 3]`."""
  rng = np.random.default_rng(seed)
  return np.stack([draw(caption, rng) for caption in captions])

"""JPEG size in kB: the reward that needs no network (DDPO, arXiv 2305.13301)."""

import io

import numpy as np

from dancegrpo_jax.rewards.base import Reward
from dancegrpo_jax.types import Example, Media


def size_kb(pixels: np.ndarray, quality: int) -> float:
  """Size of one image `[h, w, 3]` in [0, 1] as a JPEG, 1000 bytes; NaN for pixels that are not
  finite.
  """
  from PIL import Image

  if not np.isfinite(pixels).all():
    return float("nan")
  buffer = io.BytesIO()
  Image.fromarray(np.round(pixels * 255).astype(np.uint8)).save(
    buffer, format="JPEG", quality=quality
  )
  return len(buffer.getvalue()) / 1000


def build(quality: int, sign: float) -> Reward:
  """Args: `quality` of the JPEG, 1-100; `sign` -1 rewards small files, +1 large ones."""

  def score(media: Media, examples: list[Example]) -> dict[str, np.ndarray]:
    del examples
    return {
      "compressibility": np.array(
        [sign * size_kb(image, quality) for image in media.pixels], np.float32
      )
    }

  return Reward("compressibility", "host", None, None, score)

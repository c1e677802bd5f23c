"""The size as a JPEG in kB: the reward without a network (DDPO, arXiv 2305.13301)."""

import io

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from dancegrpo_jax.rewards.base import Files, Networks, Reward, RewardKind, images
from dancegrpo_jax.types import Example, Media


def size_kb(pixels: np.ndarray, quality: int) -> float:
  """The size of one image as a JPEG file, in units of 1000 bytes.

  Args:
    pixels: `[h, w, 3]` in [0, 1]. If one is not finite, the size is NaN.
    quality: of the JPEG, from 1 to 100.
  """
  if not np.isfinite(pixels).all():
    return float("nan")
  buffer = io.BytesIO()
  Image.fromarray(np.round(pixels * 255).astype(np.uint8)).save(
    buffer, format="JPEG", quality=quality
  )
  return len(buffer.getvalue()) / 1000


def build(name: str, section: ConfigDict, files: Files, networks: Networks) -> Reward:
  """The reward; its section has `quality`, of the JPEG from 1 to 100, and `sign`.

  With `sign` = -1 small files are rewarded, with 1 large ones.
  """
  del files, networks
  quality, sign = section.quality, section.sign

  def score(media: Media, examples: list[Example]) -> dict[str, np.ndarray]:
    del examples
    sizes = [sign * size_kb(image, quality) for image in images(name, media)]
    return {name: np.array(sizes, np.float32)}

  return Reward(name=name, kind="host", terms=(name,), score=score)


KIND = RewardKind(build=build, of_images=True, section="compressibility")

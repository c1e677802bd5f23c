"""JPEG size in kB: the reward that needs no network (DDPO, arXiv 2305.13301)."""

import io

import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax.rewards.base import Files, Networks, Reward, RewardKind, images
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


def build(name: str, section: ConfigDict, files: Files, networks: Networks) -> Reward:
  """The term of that name.

  Args:
    name: of the reward.
    section: `quality` of the JPEG, 1 to 100; `sign` -1 rewards small files, +1 large ones.
    files: not used.
    networks: not used.
  """
  del files, networks
  quality, sign = section.quality, section.sign

  def score(media: Media, examples: list[Example]) -> dict[str, np.ndarray]:
    del examples
    sizes = [sign * size_kb(image, quality) for image in images(name, media)]
    return {name: np.array(sizes, np.float32)}

  return Reward(name=name, kind="host", terms=(name,), score=score)


KIND = RewardKind(build=build, section="compressibility")

"""From pixels of any size to what a CLIP tower takes: resize, crop or pad, normalise. Pure
functions of float images.

References: transformers' CLIPImageProcessor, open_clip's image_transform and HPSv2's ResizeMaxSize.
PIL and torch (with `antialias=True`) resize with Keys' cubic a = -0.5, widened by the scale where
they shrink, and so does jax.image.resize: torch's and ours differ by less than 1e-5. torch's a =
-0.75 belongs to its resize without antialiasing, which none of these use. PIL works on 8-bit images
and rounds and clamps after its horizontal pass and again after its vertical one.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# openai/CLIP; open_clip, HPS-v2 and PickScore use the same
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3  # PIL's number


class Preprocessing(NamedTuple):
  """How a checkpoint's images are prepared.

  Attributes:
    size: side of the square that the tower takes, pixels.
    mode: "shortest" (shortest side to `size`, centre crop), "longest" (longest side to `size`,
      zeros around) or "squash".
    crop: offset of a crop whose margin is odd: "floor" (transformers) or "round" (torchvision: half
      to even).
    eight_bit: whether a resize rounds and clamps before, between and after its passes, as PIL's
      does; else it keeps floats, overshoots too. Rounding has no derivative.
    mean, std: of the channels, applied last: what was padded with 0 becomes -mean / std.
  """

  size: int
  mode: str = "shortest"
  crop: str = "floor"
  eight_bit: bool = True
  mean: tuple[float, ...] = MEAN
  std: tuple[float, ...] = STD


def resize(
  pixels: Float[Array, "b h w 3"], height: int, width: int, eight_bit: bool
) -> Float[Array, "b i j 3"]:
  """Antialiased bicubic, the width first as in PIL; pixels that have this size already are left
  alone, eight_bit or not.
  """
  if pixels.shape[1:3] == (height, width):
    return pixels
  pixels = _to_eight_bit(pixels) if eight_bit else pixels
  for h, w in ((pixels.shape[1], width), (height, width)):
    if pixels.shape[1:3] != (h, w):
      pixels = jax.image.resize(pixels, (len(pixels), h, w, 3), "cubic", antialias=True)
      pixels = _to_eight_bit(pixels) if eight_bit else pixels
  return pixels


def _to_eight_bit(pixels: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
  return jnp.clip(jnp.floor(pixels * 255 + 0.5), 0, 255) / 255


def _shortest(pixels: Float[Array, "b h w 3"], how: Preprocessing) -> Float[Array, "b s s 3"]:
  """The shortest side to `size`, the longest rounded down; then the middle square."""
  h, w = (int(how.size * side / min(pixels.shape[1:3])) for side in pixels.shape[1:3])
  pixels = resize(pixels, h, w, how.eight_bit)
  offset = round if how.crop == "round" else int
  top, left = (offset((side - how.size) / 2) for side in (h, w))
  return pixels[:, top : top + how.size, left : left + how.size]


def _longest(pixels: Float[Array, "b h w 3"], how: Preprocessing) -> Float[Array, "b s s 3"]:
  """The longest side to `size`, the other rounded half to even; zeros around, the odd one below or
  right.
  """
  scale = how.size / max(pixels.shape[1:3])
  h, w = (max(1, round(side * scale)) for side in pixels.shape[1:3])
  pixels = resize(pixels, h, w, how.eight_bit)
  margins = [((how.size - side) // 2, how.size - side - (how.size - side) // 2) for side in (h, w)]
  return jnp.pad(pixels, ((0, 0), *margins, (0, 0)))


def _squash(pixels: Float[Array, "b h w 3"], how: Preprocessing) -> Float[Array, "b s s 3"]:
  return resize(pixels, how.size, how.size, how.eight_bit)


MODES = {"shortest": _shortest, "longest": _longest, "squash": _squash}


def preprocess(pixels: Float[Array, "b h w 3"], how: Preprocessing) -> Float[Array, "b s s 3"]:
  """What the tower takes, float32, from pixels in [0, 1]."""
  square = MODES[how.mode](pixels.astype(jnp.float32), how)
  return (square - jnp.array(how.mean).reshape(1, 1, 1, 3)) / jnp.array(how.std).reshape(1, 1, 1, 3)


def from_transformers(config: dict[str, Any], size: int) -> Preprocessing:
  """What a preprocessor_config.json (CLIPImageProcessor) says, for a tower of `size` pixels.

  Raises:
    ValueError: naming a value that is not implemented or does not fit the tower.
  """
  wanted, crop = config.get("size", size), config.get("crop_size", size)
  wanted = {"shortest_edge": wanted} if isinstance(wanted, int) else dict(wanted)
  crop = {"height": crop, "width": crop} if isinstance(crop, int) else dict(crop)
  if config.get("resample", _BICUBIC) != _BICUBIC:
    raise ValueError(
      f"preprocessor_config.json: resample = {config['resample']!r} is not supported; 3"
      " (bicubic) is"
    )
  mode = "shortest" if "shortest_edge" in wanted else "squash"
  if set(wanted.values()) != {size} or (mode == "shortest" and set(crop.values()) != {size}):
    raise ValueError(
      f"preprocessor_config.json: size {wanted} and crop_size {crop} must be the tower's"
      f" image_size, {size}"
    )
  return Preprocessing(
    size, mode, mean=tuple(config.get("image_mean", MEAN)), std=tuple(config.get("image_std", STD))
  )


def from_open_clip(config: dict[str, Any]) -> Preprocessing:
  """What an open_clip_config.json says. ValueError naming a value that is not implemented."""
  said = config.get("preprocess_cfg", {})
  mode, interpolation = (
    said.get("resize_mode") or "shortest",
    said.get("interpolation") or "bicubic",
  )
  if mode not in MODES or interpolation != "bicubic":
    raise ValueError(
      f"open_clip_config.json: resize_mode = {mode!r}, interpolation = {interpolation!r} are not"
      " supported;"
      f" {', '.join(MODES)} with bicubic are"
    )
  size = config["model_cfg"]["vision_cfg"]["image_size"]
  return Preprocessing(
    size, mode, "round", mean=tuple(said.get("mean") or MEAN), std=tuple(said.get("std") or STD)
  )

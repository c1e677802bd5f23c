"""From pixels of any size to the input of a CLIP tower: resize, crop or pad, normalise.

All functions are pure functions of float images.

References: transformers' CLIPImageProcessor, open_clip's image_transform and HPSv2's ResizeMaxSize.
PIL, torch (with `antialias=True`) and jax.image.resize all resize with Keys' cubic kernel, a =
-0.5, which is widened by the scale when an image shrinks. The results of torch and of this module
differ by less than 1e-5. torch has a = -0.75 for its resize without antialiasing, which none of the
references use. PIL works on 8-bit images, and rounds and clamps after its horizontal pass and again
after its vertical pass.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dancegrpo_jax import published

# The values of openai/CLIP, which open_clip, HPS-v2 and PickScore use too.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3  # PIL's number
_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil")


class Preprocessing(NamedTuple):
  """How a checkpoint's images are prepared.

  Attributes:
    size: the side of the tower's square input, in pixels.
    mode: "shortest" (the shortest side becomes `size`, then a centre crop), "longest" (the longest
      side becomes `size`, then padding with zeros) or "squash" (both sides become `size`).
    crop: how the offset of a crop with an odd margin is rounded: "floor" (transformers) or "round"
      (torchvision, half to even).
    eight_bit: whether a resize rounds and clamps before, between and after its passes, as PIL does.
      Otherwise the pixels stay floats, which may leave [0, 1]. Rounding has no derivative.
    mean: of the channels. Mean and std are applied last, so padded pixels become -mean / std.
    std: of the channels.
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
  """An antialiased bicubic resize, of the width first as in PIL.

  Images that have the size already are returned unchanged, even with `eight_bit`.
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
  """Resizes the shortest side to `size`, with the longest rounded down; then crops the middle."""
  h, w = (int(how.size * side / min(pixels.shape[1:3])) for side in pixels.shape[1:3])
  pixels = resize(pixels, h, w, how.eight_bit)
  offset = round if how.crop == "round" else int
  top, left = (offset((side - how.size) / 2) for side in (h, w))
  return pixels[:, top : top + how.size, left : left + how.size]


def _longest(pixels: Float[Array, "b h w 3"], how: Preprocessing) -> Float[Array, "b s s 3"]:
  """Resizes the longest side to `size`, with the other rounded half to even; then pads with zeros.

  Where the padding is odd, one more row or column is at the bottom or right.
  """
  scale = how.size / max(pixels.shape[1:3])
  h, w = (max(1, round(side * scale)) for side in pixels.shape[1:3])
  pixels = resize(pixels, h, w, how.eight_bit)
  margins = [((how.size - side) // 2, how.size - side - (how.size - side) // 2) for side in (h, w)]
  return jnp.pad(pixels, ((0, 0), *margins, (0, 0)))


def _squash(pixels: Float[Array, "b h w 3"], how: Preprocessing) -> Float[Array, "b s s 3"]:
  return resize(pixels, how.size, how.size, how.eight_bit)


MODES = {"shortest": _shortest, "longest": _longest, "squash": _squash}


def preprocess(
  pixels: Float[Array | np.ndarray, "b h w 3"], how: Preprocessing
) -> Float[Array, "b s s 3"]:
  """The input of the tower, float32, from pixels in [0, 1]."""
  square = MODES[how.mode](jnp.asarray(pixels, jnp.float32), how)
  mean, std = (jnp.array(values).reshape(1, 1, 1, 3) for values in (how.mean, how.std))
  return (square - mean) / std


# The keys of a preprocessor_config.json, with transformers' defaults.
TRANSFORMERS = published.Keys(
  used={
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_normalize": True,
    "image_mean": MEAN,
    "image_std": STD,
    "size": {"shortest_edge": 224},
  },
  neutral={
    "default_to_square": (False, None),
    "do_pad": (False, None),
    "do_rescale": (True,),
    "do_resize": (True,),
    "feature_extractor_type": (*_PROCESSORS, "CLIPFeatureExtractor"),
    "image_processor_type": _PROCESSORS,
    "resample": (_BICUBIC,),
    "rescale_factor": (1 / 255,),
    "use_square_size": (False, None),
  },
  harmless={
    "data_format": "is the order of axes in PyTorch",
    "device": "is where PyTorch computes",
    "disable_grouping": "says how it is computed, but not its values",
    "do_convert_rgb": "samples have three channels",
    "input_data_format": "is the order of axes in PyTorch",
    "processor_class": "describes the file",
    "return_tensors": "says what a call returns",
  },
  types={"crop_size": (int, dict), "size": (int, dict)},
)


def from_transformers(config: dict[str, Any], size: int) -> Preprocessing:
  """The preprocessing of a preprocessor_config.json (CLIPImageProcessor).

  Args:
    config: the parsed file.
    size: the side of the tower's input, in pixels.

  Raises:
    ValueError: a key is unknown, or its value is not implemented or does not fit the tower.
  """
  fields = published.read("preprocessor_config.json", config, TRANSFORMERS)
  resized, crop = fields["size"], fields["crop_size"]
  resized = {"shortest_edge": resized} if isinstance(resized, int) else dict(resized)
  crop = {"height": crop, "width": crop} if isinstance(crop, int) else dict(crop)
  mode = "shortest" if "shortest_edge" in resized else "squash"
  if set(resized.values()) != {size} or (mode == "shortest" and set(crop.values()) != {size}):
    raise ValueError(
      f"preprocessor_config.json: size {resized} and crop_size {crop} must be the tower's"
      f" image_size, {size}"
    )
  if mode == "shortest" and not fields["do_center_crop"]:
    raise ValueError(
      "preprocessor_config.json: do_center_crop = False leaves pictures that are not square, which"
      " the tower can't take; set it to true"
    )
  normalizes = fields["do_normalize"]
  return Preprocessing(
    size=size,
    mode=mode,
    mean=channels("preprocessor_config.json: image_mean", fields["image_mean"])
    if normalizes
    else (0.0,) * 3,
    std=channels("preprocessor_config.json: image_std", fields["image_std"])
    if normalizes
    else (1.0,) * 3,
  )


def channels(where: str, values: Any) -> tuple[float, ...]:
  """One number a channel. ValueError: there are not three."""
  if len(values) != 3 or not all(isinstance(value, int | float) for value in values):
    raise ValueError(f"{where} = {values!r} must have three numbers")
  return tuple(values)

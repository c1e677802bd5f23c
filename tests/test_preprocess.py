"""Preprocessing of images against PIL, transformers and torch.

Sizes are square, not square, larger, smaller and odd.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from dancegrpo_jax.rewards import open_clip
from dancegrpo_jax.rewards import preprocess as p

SIZES = [(512, 512), (320, 511), (100, 61), (33, 32), (224, 331), (17, 300)]
SIZE = 224


def pictures(h: int, w: int) -> np.ndarray:
  """Noise, whose edges overshoot most, and smooth waves: uint8 `[2, h, w, 3]`."""
  noise = np.random.default_rng(0).integers(0, 256, (h, w, 3))
  y, x = np.mgrid[:h, :w]
  waves = np.stack([128 + 127 * np.sin(x / 17 + y / (11 + c)) for c in range(3)], -1)
  return np.stack([noise, waves]).astype(np.uint8)


def ours(pixels: np.ndarray, how: p.Preprocessing) -> np.ndarray:
  return np.asarray(p.preprocess(jnp.asarray(pixels, jnp.float32), how))


def normalised(x: np.ndarray) -> np.ndarray:
  return (x - np.array(p.MEAN)) / np.array(p.STD)


def torch_resize(pixels: np.ndarray, h: int, w: int) -> torch.Tensor:
  planes = torch.tensor(pixels).permute(0, 3, 1, 2)
  return torch.nn.functional.interpolate(planes, size=(h, w), mode="bicubic", antialias=True)


def assert_close(
  actual: np.ndarray, expected: np.ndarray, most: float, mean: float = np.inf
) -> None:
  assert actual.shape == expected.shape and actual.dtype == np.float32
  difference = np.abs(actual - expected)
  assert difference.max() <= most and difference.mean() <= mean, (
    difference.max(),
    difference.mean(),
  )


def keys(x: np.ndarray, a: float, n: int) -> np.ndarray:
  """Resizes the first axis to n samples by Keys' cubic in float64.

  The kernel is widened by the scale where the image shrinks.
  """
  m = len(x)
  scale = m / n
  t = np.abs(np.arange(m)[None] + 0.5 - (np.arange(n)[:, None] + 0.5) * scale) / max(scale, 1)
  near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
  weights = np.where(t < 1, near, np.where(t < 2, far, 0))
  return np.tensordot(weights / weights.sum(1, keepdims=True), x, 1)


def test_the_coefficient_is_a_half():
  """torch with antialiasing and PIL both use a = -0.5.

  The value of torch without it, -0.75, would be 100 times further off.
  """
  picture = pictures(61, 100)[0]
  x = picture.astype(np.float32) / 255
  half, three = (keys(keys(x, a, 40).swapaxes(0, 1), a, 150).swapaxes(0, 1) for a in (-0.5, -0.75))
  theirs = torch_resize(x[None], 40, 150)[0].permute(1, 2, 0).numpy()
  assert np.abs(theirs - half).max() < 1e-4 < 1e-2 < np.abs(theirs - three).max()
  mild = (64 + picture / 2).astype(np.uint8)  # far from 0 and 255, where PIL clamps
  resized = np.asarray(Image.fromarray(mild).resize((150, 40), Image.Resampling.BICUBIC)) / 255
  half, three = (
    keys(keys(mild / 255, a, 40).swapaxes(0, 1), a, 150).swapaxes(0, 1) for a in (-0.5, -0.75)
  )
  assert np.abs(resized - half).max() < 1.5 / 255 < 8 / 255 < np.abs(resized - three).max()
  mine = p.resize(jnp.asarray(x)[None], 40, 150, eight_bit=False)
  assert np.abs(np.asarray(mine)[0] - theirs).max() < 2e-5


@pytest.mark.parametrize("h, w", SIZES)
def test_shortest_as_transformers(h, w):
  """CLIP, PickScore and aesthetic: CLIPImageProcessor on 8-bit images."""
  processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)()
  images = pictures(h, w)
  theirs = processor(list(images), input_data_format="channels_last", return_tensors="np")[
    "pixel_values"
  ].transpose(0, 2, 3, 1)
  assert_close(ours(images / 255, p.Preprocessing(SIZE)), theirs, 3e-2, 1e-4)


@pytest.mark.parametrize("h, w", SIZES)
def test_pixels_that_were_never_8_bit(h, w):
  """The bounds also hold for generated pixels, which are floats.

  A reference that goes through files rounds them first.
  """
  images = np.clip(
    pictures(h, w) / 255 + np.random.default_rng(1).uniform(-0.5, 0.5, (2, h, w, 3)) / 255, 0, 1
  )
  processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)()
  files = np.round(images * 255).astype(np.uint8)
  theirs = processor(list(files), input_data_format="channels_last", return_tensors="np")[
    "pixel_values"
  ].transpose(0, 2, 3, 1)
  assert_close(ours(images, p.Preprocessing(SIZE)), theirs, 3e-2, 4e-3)


@pytest.mark.parametrize("h, w", SIZES)
def test_shortest_in_floats_as_torch(h, w):
  images = pictures(h, w).astype(np.float32) / 255
  short = min(h, w)
  nh, nw = (SIZE, SIZE * w // h) if short == h else (SIZE * h // w, SIZE)
  resized = torch_resize(images, nh, nw).permute(0, 2, 3, 1).numpy()
  top, left = (nh - SIZE) // 2, (nw - SIZE) // 2
  theirs = normalised(resized[:, top : top + SIZE, left : left + SIZE])
  assert_close(ours(images, p.Preprocessing(SIZE, eight_bit=False)), theirs, 2e-3)


@pytest.mark.parametrize("h, w", SIZES)
def test_longest_as_hpsv2(h, w):
  """HPSv2's ResizeMaxSize on tensors.

  The longest side becomes 224, zeros fill the rest, and all is normalised.
  """
  images = pictures(h, w).astype(np.float32) / 255
  scale = SIZE / max(h, w)
  nh, nw = round(h * scale), round(w * scale)
  left, top = (SIZE - nw) // 2, (SIZE - nh) // 2
  padded = torch.nn.functional.pad(
    torch_resize(images, nh, nw), (left, SIZE - nw - left, top, SIZE - nh - top)
  )
  mean, std = (torch.tensor(x).reshape(1, 3, 1, 1) for x in (p.MEAN, p.STD))
  theirs = ((padded - mean) / std).permute(0, 2, 3, 1).numpy()
  assert_close(ours(images, p.Preprocessing(SIZE, "longest", eight_bit=False)), theirs, 2e-3)


@pytest.mark.parametrize("h, w", SIZES)
def test_open_clip_paths(h, w):
  """PIL's resize with torchvision's rounding of an odd margin (LAION), and squashed (DFN5B)."""
  images = pictures(h, w)
  nh, nw = (int(SIZE * side / min(h, w)) for side in (h, w))
  top, left = (int(round((side - SIZE) / 2.0)) for side in (nh, nw))
  for how, size, box in (
    (p.Preprocessing(SIZE, "shortest", "round"), (nw, nh), (left, top, left + SIZE, top + SIZE)),
    (p.Preprocessing(SIZE, "squash"), (SIZE, SIZE), (0, 0, SIZE, SIZE)),
  ):
    theirs = [
      np.asarray(Image.fromarray(x).resize(size, Image.Resampling.BICUBIC).crop(box)) / 255
      for x in images
    ]
    assert_close(ours(images / 255, how), normalised(np.stack(theirs)), 3e-2, 1e-4)


def test_odd_margins_are_rounded_as_each_library_does():
  """With a margin of 3 (227 - 224) transformers starts at 1, torchvision at 2; with 1 both at 0."""
  x = np.zeros((1, 224, 227, 3), np.float32)
  x[:, :, 1] = 1
  floor, even = (ours(x, p.Preprocessing(224, crop=crop)) for crop in ("floor", "round"))
  assert (floor[0, :, 0] > 0).all() and (even[0, :, 0] < 0).all()
  one = np.random.default_rng(0).random((1, 225, 224, 3), np.float32)
  np.testing.assert_array_equal(
    *(ours(one, p.Preprocessing(224, crop=crop)) for crop in ("floor", "round"))
  )


def test_images_of_the_right_size_pass_untouched():
  """As with the shipped model: nothing is rounded to 8 bits where nothing is resized."""
  x = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
  assert_close(ours(x, p.Preprocessing(32)), normalised(x), 1e-6)


def test_published_files_are_read():
  old = {
    "size": 224,
    "crop_size": 224,
    "resample": 3,
    "image_mean": list(p.MEAN),
    "image_std": list(p.STD),
  }
  new = old | {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
  assert p.from_transformers(old, 224) == p.from_transformers(new, 224) == p.Preprocessing(224)
  vision = {"model_cfg": {"vision_cfg": {"image_size": 224}}}
  assert open_clip.preprocessing(vision) == p.Preprocessing(224, crop="round")
  said = {
    "mean": list(p.MEAN),
    "std": list(p.STD),
    "interpolation": "bicubic",
    "resize_mode": "squash",
  }
  assert open_clip.preprocessing(vision | {"preprocess_cfg": said}) == p.Preprocessing(
    224, "squash", "round"
  )


@pytest.mark.parametrize(
  "changed",
  [
    {},
    {"do_normalize": False},
    {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
    {"size": {"height": 224, "width": 224}, "do_center_crop": False},
  ],
)
def test_what_transformers_save_is_read_and_means_the_same(changed, tmp_path):
  processor = transformers.CLIPImageProcessor(**changed)
  processor.save_pretrained(tmp_path)
  how = p.from_transformers(json.loads((tmp_path / "preprocessor_config.json").read_text()), 224)
  pixels = pictures(300, 260)[1]  # noise would leave [0, 1], which 8-bit images can't
  theirs = processor(images=pixels, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
  mine = ours(pixels[None] / 255, how)[0]
  # transformers resize 8-bit images, which are rounded after each of two passes.
  scale = 1 / min(how.std)
  np.testing.assert_allclose(mine, theirs, atol=2.01 * scale / 255)
  assert np.abs(mine - theirs).mean() < 0.3 * scale / 255


@pytest.mark.parametrize(
  "config, message",
  [
    ({"size": 256, "crop_size": 224}, "must be the tower's image_size, 224"),
    ({"size": 224, "resample": 2}, r"resample = 2 \(implemented: 3\)"),
    ({"do_rescale": False}, r"do_rescale = False \(implemented: True\)"),
    ({"do_center_crop": False}, "do_center_crop = False leaves pictures that are not square"),
    ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type = 'ViTImageProcessor'"),
    ({"image_mean": [0.5]}, "image_mean = .0.5. must have three numbers"),
    ({"sharpen": 1}, "sharpen = 1 .an unknown key."),
  ],
)
def test_other_preprocessing_is_refused(config, message):
  with pytest.raises(ValueError, match=message):
    p.from_transformers(config, 224)
  with pytest.raises(ValueError, match="interpolation = 'bilinear'"):
    open_clip.preprocessing(
      {
        "model_cfg": {"vision_cfg": {"image_size": 224}},
        "preprocess_cfg": {"interpolation": "bilinear"},
      }
    )

"""Writes samples as files, and as grids with captions. A file appears whole or not at all.

An image becomes a PNG file and a video an animated WebP file.
"""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dancegrpo_jax.report import clips

_INK, _PAPER = (30, 30, 30), (255, 255, 255)


def to_uint8(pixels: np.ndarray) -> np.ndarray:
  """Pixels in [0, 1], of any shape, as 0..255. Values outside are clipped and NaN becomes black."""
  finite = np.nan_to_num(np.asarray(pixels, np.float32), nan=0.0)
  return np.round(np.clip(finite, 0.0, 1.0) * 255.0).astype(np.uint8)


def save(path: str | os.PathLike, pixels: np.ndarray | Image.Image) -> None:
  """Writes one image as PNG, and makes missing folders.

  Args:
    path: of the file.
    pixels: `[height, width, 3]` in [0, 1], or a PIL image.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.partial")
  image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(to_uint8(pixels))
  image.save(partial, format="PNG")
  os.replace(partial, path)


def save_sample(stem: Path, pixels: np.ndarray, fps: float | None) -> Path:
  """Writes one sample, and makes missing folders.

  Args:
    stem: of the path, without an extension.
    pixels: `[(frames,) height, width, 3]` in [0, 1].
    fps: frames a second; None for an image.

  Returns:
    The path of the file.
  """
  if fps is None:
    path = stem.with_name(f"{stem.name}.png")
    save(path, pixels)
  else:
    path = stem.with_name(f"{stem.name}.webp")
    path.parent.mkdir(parents=True, exist_ok=True)
    clips.save(path, to_uint8(pixels), fps)
  return path


def save_samples(folder: str | os.PathLike, pixels: np.ndarray, fps: float | None) -> list[Path]:
  """Writes `[batch, (frames,) height, width, 3]` as 00.png or 00.webp and so on.

  Returns:
    The paths.
  """
  digits = max(2, len(str(len(pixels) - 1)))
  stems = [Path(folder) / f"{index:0{digits}d}" for index in range(len(pixels))]
  return [save_sample(stem, sample, fps) for stem, sample in zip(stems, np.asarray(pixels))]


def saved(folder: Path) -> list[Path]:
  """The samples that `save_samples` has written, in their order."""
  return sorted([*folder.glob("*.png"), *folder.glob("*.webp")])


def grid(
  pixels: np.ndarray,
  columns: int,
  *,
  captions: Sequence[str] | None = None,
  headers: Sequence[str] | None = None,
  min_cell: int = 96,
) -> Image.Image:
  """Images, or film strips of videos, side by side, row by row, with text.

  Args:
    pixels: `[batch, (frames,) height, width, 3]` in [0, 1].
    columns: images in a row.
    captions: text under each image, wrapped to its width.
    headers: text above each column.
    min_cell: pixels. Smaller images are enlarged by a whole factor to at least this width.

  Returns:
    A PIL image, which `save` writes.
  """
  images = to_uint8(clips.pictures(pixels))
  count, height, width, _ = images.shape
  zoom = max(1, -(-min_cell // width))
  width, height = width * zoom, height * zoom
  font, line, gap = ImageFont.load_default(12), 15, 6
  wrapped = [_wrap(text, width, font) for text in (captions or [""] * count)]
  caption_height = max(map(len, wrapped)) * line + 4 if captions else 0
  header_height = line + 4 if headers else 0
  rows = -(-count // columns)
  sheet_width = columns * (width + gap) + gap
  sheet_height = header_height + rows * (height + caption_height + gap) + gap
  sheet = Image.new("RGB", (sheet_width, sheet_height), _PAPER)
  draw = ImageDraw.Draw(sheet)
  for column, text in enumerate(headers or ()):
    draw.text((gap + column * (width + gap), gap), text, _INK, font)
  for index, image in enumerate(images):
    left = gap + index % columns * (width + gap)
    top = gap + header_height + index // columns * (height + caption_height + gap)
    enlarged = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
    sheet.paste(enlarged, (left, top))
    for number, text in enumerate(wrapped[index]):
      draw.text((left, top + height + 2 + number * line), text, _INK, font)
  return sheet


def _wrap(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
  """At most 4 lines of about `width` pixels, by the mean width of a letter."""
  letters = max(4, int(width / (font.getlength("abcdefghijklmnopqrstuvwxyz ") / 27)))
  return textwrap.wrap(text, letters, max_lines=4, placeholder=" ...") or [""]

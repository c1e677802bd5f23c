"""Writes videos as animated WebP files, which browsers play by themselves, and as film strips."""

import os
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

STRIP = 5  # frames of a film strip
_DESCRIPTION = 0x010E  # of EXIF; it has the number of frames, and frames a second
_GAP = 2  # pixels between the frames of a strip


def save(path: Path, frames: UInt8[np.ndarray, "f h w 3"], fps: float) -> None:
  """Writes a video without loss, which is played for ever.

  Args:
    path: of the file, which ends with .webp. It appears whole or not at all.
    frames: 0..255.
    fps: frames a second. A file holds whole milliseconds for each frame.
  """
  partial = path.with_name(f".{path.name}.partial")
  first, *rest = map(Image.fromarray, frames)
  about = Image.Exif()
  about[_DESCRIPTION] = f"{len(frames)} {fps:g}"
  first.save(
    partial,
    format="WEBP",
    save_all=True,
    append_images=rest,
    duration=round(1000 / fps),
    loop=0,
    lossless=True,
    exif=about,
  )
  os.replace(partial, path)


def save_mp4(path: Path, frames: UInt8[np.ndarray, "f h w 3"], fps: float) -> None:
  """Writes H.264 in 4:2:0, which every player knows. Writes nothing where imageio-ffmpeg is not
  installed, or where a side is odd.
  """
  if any(side % 2 for side in frames.shape[1:3]):
    return
  try:
    import imageio_ffmpeg
  except ImportError:
    return
  partial = path.with_name(f".partial.{path.name}")  # ffmpeg takes the format from the extension
  size = (frames.shape[2], frames.shape[1])
  writer = imageio_ffmpeg.write_frames(
    str(partial), size, fps=fps, quality=8, macro_block_size=2, ffmpeg_log_level="error"
  )
  writer.send(None)  # starts ffmpeg
  for frame in frames:
    writer.send(np.ascontiguousarray(frame))
  writer.close()
  os.replace(partial, path)


def read(path: Path) -> tuple[UInt8[np.ndarray, "f h w 3"], float]:
  """The frames of a file that `save` wrote, 0..255, and frames a second.

  Equal frames in a row are one frame of the file, which is shown for longer.
  """
  with Image.open(path) as file:
    count, fps = map(float, file.getexif()[_DESCRIPTION].split())
    frames: list[np.ndarray] = []
    for number in range(getattr(file, "n_frames", 1)):
      file.seek(number)
      frame = np.asarray(file.convert("RGB"))
      duration = file.info.get("duration") or 0
      frames += [frame] * max(1, round(duration / round(1000 / fps)))
  frames += frames[-1:] * (int(count) - len(frames))  # a still video is a file without durations
  return np.stack(frames), fps


def strip(pixels: Float[np.ndarray, "f h w 3"], count: int = STRIP) -> Float[np.ndarray, "h w2 3"]:
  """At most `count` evenly spaced frames side by side, the first and the last among them."""
  shown = np.unique(np.linspace(0, len(pixels) - 1, min(count, len(pixels))).round().astype(int))
  gap = np.ones((pixels.shape[1], _GAP, 3), pixels.dtype)
  parts = [gap, pixels[shown[0]]]
  for number in shown[1:]:
    parts += [gap, pixels[number]]
  return np.concatenate(parts[1:], axis=1)


def pictures(pixels: np.ndarray) -> Float[np.ndarray, "n h w 3"]:
  """Samples as pictures, for a grid: images as they are, and videos as film strips.

  Args:
    pixels: `[n, (frames,) h, w, 3]`.
  """
  return np.asarray(pixels) if np.ndim(pixels) == 4 else np.stack([strip(clip) for clip in pixels])

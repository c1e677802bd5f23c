"""Text to moving emoji: a small set of clips with captions, drawn like the pictures of emoji.py.

A clip shows one of the 40 best-known emoji on one of 8 background colours, and it does one of 6
things: it moves left, right, up or down, or it grows or shrinks. One motion of every emoji is held
out of training, so that a model has to know emoji and motions apart. Everything is a function of
(name, motion, colour, variant), so that nothing depends on the order or the number of calls.

    python -m dancegrpo_jax.data.moving_emoji --write-prompts=assets/prompts
    python -m dancegrpo_jax.data.moving_emoji --write-subjects=assets/emoji-video
    python -m dancegrpo_jax.data.moving_emoji --clip=clip.webp
"""

import argparse
import os
import re
import sys
import zlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from dancegrpo_jax.data import emoji

FRAMES = 9  # 4 n + 1, as the autoencoders of videos need it
FPS = 8  # frames a second
NAMES = emoji.NAMES[:40]
GLYPH = 12.0  # the longer side of the glyph at scale 1, pixels of a picture of SIZE
SIZE = 32  # height and width for which the lengths here are given, pixels
SPEEDS = (0.8, 1.4)  # smallest and largest, pixels a frame
GROWTH = 0.09  # change of the scale in a frame
OFFSET = 2.0  # the largest distance between the glyph's middle and the picture's, pixels
JITTER = 1.0  # the largest displacement of a frame of a clip that shakes, pixels
TILE = 16  # height and width of a glyph's tile in the file of all subjects, pixels
COLUMNS = 8  # tiles in a row of that file

# motion -> its direction (right, down), or None where the size changes.
MOTIONS: dict[str, tuple[int, int] | None] = {
  "moving left": (-1, 0),
  "moving right": (1, 0),
  "moving up": (0, -1),
  "moving down": (0, 1),
  "growing": None,
  "shrinking": None,
}


class Scene(NamedTuple):
  """What a clip shows.

  Attributes:
    name: of the emoji, one of `NAMES`.
    motion: a key of `MOTIONS`.
    colour: of the background, a key of `emoji.COLOURS`.
  """

  name: str
  motion: str
  colour: str


def caption(scene: Scene) -> str:
  """The text that describes the clips of a scene."""
  return f"a {scene.name} {scene.motion} on a {scene.colour} background"


_CAPTION = re.compile(
  f"a (?P<name>{'|'.join(emoji.NAMES)}) (?P<motion>{'|'.join(MOTIONS)})"
  f" on a (?P<colour>{'|'.join(emoji.COLOURS)}) background"
)


def scene_of(text: str) -> Scene:
  """The scene that a caption describes.

  Raises:
    ValueError: the text is no caption of this data set.
  """
  match = _CAPTION.fullmatch(text)
  if match is None or match["name"] not in NAMES:
    raise ValueError(
      f"{text!r} is no caption of moving emoji, such as {caption(run_scenes()[0])!r}"
    )
  return Scene(**match.groupdict())


def held_out_motion(name: str) -> str:
  """The motion of an emoji that no model is trained on; each motion is held out equally often."""
  return tuple(MOTIONS)[NAMES.index(name) % len(MOTIONS)]


def scenes(split: str) -> list[Scene]:
  """The scenes of a split in their order: 1600 for "train", 320 for "held_out".

  Raises:
    ValueError: another split.
  """
  if split not in ("train", "held_out"):
    raise ValueError(f"moving emoji have the splits train and held_out, not {split!r}")
  return [
    Scene(name, motion, colour)
    for name in NAMES
    for motion in MOTIONS
    for colour in emoji.COLOURS
    if (motion == held_out_motion(name)) == (split == "held_out")
  ]


def run_scenes(count: int = 16) -> list[Scene]:
  """The prompts of the default run: one training scene of each of the best-known names.

  Motions and colours are equally frequent as far as the count allows it.
  """
  motions, colours = tuple(MOTIONS), tuple(emoji.COLOURS)
  return [
    Scene(
      name=name,
      # With the offset, which is never 0, the motion is never the one that is held out.
      motion=motions[(i + 1 + i // len(motions) % (len(motions) - 1)) % len(motions)],
      colour=colours[(3 * i + i // len(colours) + 6) % len(colours)],
    )
    for i, name in enumerate(NAMES[:count])
  ]


# Drawing


class Path(NamedTuple):
  """Where a glyph is and how large, in every frame.

  Attributes:
    shifts: of the glyph's middle from the picture's, right and down, pixels, `[frames, 2]`.
    scales: of the glyph, `[frames]`.
  """

  shifts: Float[np.ndarray, "f 2"]
  scales: Float[np.ndarray, "f"]


def path(scene: Scene, variant: int, jitter: float = 0.0) -> Path:
  """The path of a variant of a scene.

  In its middle frame the glyph is at most `OFFSET` pixels from the picture's middle in either
  direction, and has scale 1.

  Args:
    scene: what is shown.
    variant: selects the speed and the offset.
    jitter: the largest displacement that every frame gets on its own, in either direction, pixels.
  """
  rng = np.random.default_rng([zlib.crc32(caption(scene).encode()), variant])
  speed, offset = rng.uniform(*SPEEDS), rng.uniform(-OFFSET, OFFSET, 2)
  times = np.arange(FRAMES) - FRAMES // 2
  direction = MOTIONS[scene.motion]
  if direction is None:
    growth = GROWTH if scene.motion == "growing" else -GROWTH
    shifts, scales = np.zeros((FRAMES, 2)), 1 + growth * times
  else:
    shifts, scales = speed * times[:, None] * np.array(direction), np.ones(FRAMES)
  return Path(shifts + offset + rng.uniform(-jitter, jitter, (FRAMES, 2)), scales)


def draw(
  font_path: str, scene: Scene, variant: int, jitter: float = 0.0
) -> UInt8[np.ndarray, "f h w 3"]:
  """One clip of `FRAMES` frames of `SIZE` x `SIZE` pixels; the arguments are those of `path`.

  Raises:
    FileNotFoundError, ValueError: as `emoji.check_font`.
  """
  frames = zip(*path(scene, variant, jitter), strict=True)
  return np.stack([_frame(font_path, scene, shift, scale) for shift, scale in frames])


def _frame(
  font_path: str, scene: Scene, shift: np.ndarray, scale: float
) -> UInt8[np.ndarray, "h w 3"]:
  x, y = shift / SIZE
  return emoji.render(
    font_path,
    codepoint=emoji.EMOJI[scene.name],
    size=SIZE,
    colour=emoji.COLOURS[scene.colour],
    shift=(float(x), float(y)),
    scale=float(scale) * GLYPH / SIZE / emoji.FILL,
  )


def load_arrays(
  font: str, variants: int, split: str, jitter_share: float = 0.0
) -> tuple[UInt8[np.ndarray, "n f h w 3"], list[Scene]]:
  """A whole split in memory, in the order of the scenes, with the variants of a scene together.

  Args:
    font: path of NotoColorEmoji.ttf.
    variants: number of clips of each scene.
    split: "train" or "held_out".
    jitter_share: the share of clips that shake by `JITTER`. It is taken from the clips evenly.

  Returns:
    n = scenes x variants clips, and the scene of each.

  Raises:
    FileNotFoundError, ValueError: as `emoji.check_font` and `scenes`.
  """
  emoji.check_font(font)
  rows = [(scene, variant) for scene in scenes(split) for variant in range(variants)]
  # The golden ratio spreads the clips that shake over scenes and variants alike.
  shakes = np.arange(len(rows)) * 0.6180339887 % 1.0 < jitter_share
  clips = [
    draw(font, scene, variant, JITTER * float(shaking))
    for (scene, variant), shaking in zip(rows, shakes, strict=True)
  ]
  return np.stack(clips), [scene for scene, _ in rows]


# The command


def write_prompts(folder: str) -> None:
  """Writes moving_train.txt, moving_held_out.txt and moving_run.txt, one caption a line."""
  os.makedirs(folder, exist_ok=True)
  lists = {"train": scenes("train"), "held_out": scenes("held_out"), "run": run_scenes()}
  for name, rows in lists.items():
    path = os.path.join(folder, f"moving_{name}.txt")
    with open(path, "w", encoding="utf-8", newline="\n") as file:
      file.writelines(caption(scene) + "\n" for scene in rows)


def subject(font_path: str, name: str) -> UInt8[np.ndarray, "h w 4"]:
  """A glyph as clips show it at scale 1, on a tile of `TILE` x `TILE` pixels.

  The glyph is in the tile's middle, and its colours are RGBA with straight alpha. They follow from
  the glyph drawn on black and on white, so that the tile on a background is what `draw` draws.

  Raises:
    FileNotFoundError, ValueError: as `emoji.check_font`.
  """
  black, white = (
    emoji.render(
      font_path,
      codepoint=emoji.EMOJI[name],
      size=TILE,
      colour=(level, level, level),
      shift=(0.0, 0.0),
      scale=GLYPH / TILE / emoji.FILL,
    ).astype(np.float64)
    for level in (0, 255)
  )
  alpha = 255 - (white - black).mean(-1, keepdims=True)
  colours = black * 255 / np.maximum(alpha, 1)
  return np.round(np.concatenate([colours, alpha], -1).clip(0, 255)).astype(np.uint8)


def write_subjects(font_path: str, folder: str) -> None:
  """Writes subjects.png: the tiles of all `NAMES`, `COLUMNS` in a row. The verifier of clips,
  rewards/moving_emoji.py, compares with them, and so needs no font.

  Raises:
    FileNotFoundError, ValueError: as `emoji.check_font`.
  """
  from PIL import Image

  tiles = np.stack([subject(font_path, name) for name in NAMES])
  rows = tiles.reshape(-1, COLUMNS, TILE, TILE, 4).swapaxes(1, 2)
  os.makedirs(folder, exist_ok=True)
  Image.fromarray(rows.reshape(-1, COLUMNS * TILE, 4)).save(os.path.join(folder, "subjects.png"))


def show(font_path: str, file: str) -> None:
  """Writes the clips of the default run side by side as one animation."""
  from PIL import Image

  clips = [draw(font_path, scene, variant=0) for scene in run_scenes()]
  rows = [np.concatenate(clips[i : i + 4], axis=2) for i in range(0, len(clips), 4)]
  first, *others = (Image.fromarray(frame) for frame in np.concatenate(rows, axis=1))
  first.save(file, save_all=True, append_images=others, duration=1000 // FPS, loop=0, lossless=True)


def main() -> int:
  """The command. The exit code is 2 where the font is missing or unfit, with one line on stderr."""
  parser = argparse.ArgumentParser(
    prog="python -m dancegrpo_jax.data.moving_emoji",
    description="the text-to-moving-emoji data set",
  )
  parser.add_argument("--write-prompts", metavar="DIR", help="write the three prompt lists")
  parser.add_argument("--write-subjects", metavar="DIR", help="write the glyphs as subjects.png")
  parser.add_argument("--clip", metavar="WEBP", help="draw the clips of the default run")
  parser.add_argument(
    "--font", default=os.environ.get("EMOJI_FONT", emoji.FONT), help="NotoColorEmoji.ttf (CBDT)"
  )
  args = parser.parse_args()
  if not (args.write_prompts or args.write_subjects or args.clip):
    parser.error("nothing to do: give --write-prompts=DIR, --write-subjects=DIR or --clip=WEBP")
  if args.write_prompts:
    write_prompts(args.write_prompts)
  try:
    if args.write_subjects:
      write_subjects(args.font, args.write_subjects)
    if args.clip:
      show(args.font, args.clip)
  except (FileNotFoundError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())

"""Text to emoji: a small set of pictures with captions, drawn from the font Noto Color Emoji (OFL
1.1).

160 emoji on 8 background colours make 1280 (name, colour) pairs; one colour of every name is held
out of training. A pair can have any number of variants, which differ by a small shift and scale of
the glyph. Everything is a function of (name, colour, variant), so that nothing depends on the order
or the number of calls.

    python -m dancegrpo_jax.data.emoji --write-prompts=assets/prompts
    python -m dancegrpo_jax.data.emoji --sheet=sheet.png
"""

import argparse
import functools
import os
import sys
import zlib

import numpy as np

# Where Debian's package fonts-noto-color-emoji installs the font.
FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
STRIKE = 109  # pixels per em; the only bitmap size in the font
CANVAS = (136, 128)  # width and height of a bitmap of that strike, pixels
MAX_SHIFT = 1.0 / 32  # share of the picture's size, in each direction
SCALES = (0.9, 1.0)  # smallest and largest scale of the fitted glyph
# The longer side of the fitted glyph, as a share of the picture. With any shift it still fits.
FILL = 0.875
SUPERSAMPLE = 4  # pictures are composited this many times larger, then averaged down

COLOURS = {
  "red": (214, 48, 49),
  "cyan": (84, 206, 222),
  "yellow": (250, 218, 70),
  "green": (64, 168, 82),
  "blue": (48, 108, 230),
  "purple": (132, 66, 176),
  "pink": (250, 164, 200),
  "white": (252, 252, 252),
}

# "name codepoint", the best known first. They were chosen by eye on a contact sheet at 32x32:
# no flags, no skin tones, no two that look alike. Every name reads well after "a", and no name but
# "red apple" contains the name of a background colour.
TABLE = """
dog 1f436, cat 1f431, red apple 1f34e, banana 1f34c, car 1f697, love heart 2764, star 2b50
smiling face 1f600, lion 1f981, pig 1f437, panda 1f43c, frog 1f438, pizza 1f355, hamburger 1f354
strawberry 1f353, sunflower 1f33b, house 1f3e0, rocket 1f680, guitar 1f3b8, soccer ball 26bd
key 1f511, pumpkin lantern 1f383, robot 1f916, ghost 1f47b, sun 2600, fire 1f525, rainbow 1f308
snowman 26c4, skull 1f480, clown face 1f921, snowflake 2744, rain umbrella 2614, fox 1f98a
bear 1f43b, koala 1f428, tiger 1f42f, cow 1f42e, mouse 1f42d, rabbit 1f430, monkey 1f412
penguin 1f427, duck 1f986, barn owl 1f989, horse 1f40e, unicorn 1f984, bee 1f41d, butterfly 1f98b
ladybug 1f41e, turtle 1f422, snake 1f40d, dinosaur 1f995, baby octopus 1f419, crab 1f980
tropical fish 1f420, dolphin 1f42c, whale 1f433, shark 1f988, zebra 1f993, big elephant 1f418
giraffe 1f992, camel 1f42a, sheep 1f411, parrot 1f99c, flamingo 1f9a9, chicken 1f414, snail 1f40c
cactus 1f335, christmas tree 1f384, palm tree 1f334, lucky clover 1f340, maple leaf 1f341
mushroom 1f344, tulip 1f337, rose 1f339, cherry blossom 1f338, pear 1f350, lemon 1f34b
watermelon 1f349, bunch of grapes 1f347, peach 1f351, pineapple 1f34d, coconut 1f965
kiwi fruit 1f95d, pair of cherries 1f352, tomato 1f345, ripe avocado 1f951, broccoli 1f966
chili pepper 1f336, corn cob 1f33d, carrot 1f955, croissant 1f950, pretzel 1f968
cheese wedge 1f9c0, fried egg 1f373, box of fries 1f35f, hot dog 1f32d, taco 1f32e
popcorn box 1f37f, doughnut 1f369, cookie 1f36a, birthday cake 1f382, cupcake 1f9c1
lollipop 1f36d, soft ice cream 1f366, honey pot 1f36f, cup of coffee 2615, beer mug 1f37a
wine glass 1f377, cocktail 1f378, basketball 1f3c0, football 1f3c8, dart board 1f3af
trophy 1f3c6, medal 1f947, violin 1f3bb, trumpet 1f3ba, drum 1f941, piano keyboard 1f3b9
microphone 1f3a4, paint palette 1f3a8, game controller 1f3ae, dice cube 1f3b2, puzzle piece 1f9e9
teddy bear 1f9f8, balloon 1f388, wrapped gift 1f381, crown 1f451, top hat 1f3a9
pair of sunglasses 1f576, running shoe 1f45f, dress 1f457, shirt 1f455, handbag 1f45c
backpack 1f392, diamond ring 1f48d, lipstick 1f484, laptop 1f4bb, telephone 260e
television 1f4fa, camera 1f4f7, light bulb 1f4a1, candle 1f56f, book 1f4d5, pencil 270f
pair of scissors 2702, magnet 1f9f2, padlock 1f512, hammer 1f528, bomb 1f4a3, money bag 1f4b0
bell 1f514, globe 1f30e, castle 1f3f0, tent 26fa, taxi 1f695, fire truck 1f692, bicycle 1f6b2
steam train 1f682, helicopter 1f681, sailboat 26f5
"""


def _parse(table: str) -> dict[str, int]:
  entries = [entry for line in table.strip().split("\n") for entry in line.split(",")]
  rows = (entry.strip().rpartition(" ") for entry in entries)
  return {name: int(codepoint, 16) for name, _, codepoint in rows}


EMOJI = _parse(TABLE)  # name -> Unicode code point
NAMES = tuple(EMOJI)


def caption(name: str, colour: str) -> str:
  """The text that describes a pair's pictures."""
  return f"a {name} on a {colour} background"


def held_out(
  names: tuple[str, ...] = NAMES, colours: tuple[str, ...] = tuple(COLOURS)
) -> set[tuple[str, str]]:
  """The (name, colour) pairs that are never trained on: one for each name, and each colour equally
  often.

  The colour moves on by 3 from name to name, and by one more after each round of colours. So
  neighbours in the table, which are often alike, miss different colours.
  """
  count = len(colours)
  return {(name, colours[(3 * i + i // count) % count]) for i, name in enumerate(names)}


def pairs(split: str, names: tuple[str, ...] = NAMES) -> list[tuple[str, str]]:
  """The (name, colour) pairs of a split, in table order: 1120 for "train", 160 for "held_out".

  Args:
    split: "train" or "held_out".
    names: only pairs of these names; the split of a pair doesn't depend on them.

  Raises:
    ValueError: another split, or a name that is not in the table.
  """
  if split not in ("train", "held_out"):
    raise ValueError(f"emoji has the splits train and held_out, not {split!r}")
  unknown = set(names) - set(NAMES)
  if unknown:
    raise ValueError(f"not in the emoji table: {', '.join(sorted(unknown))}")
  out = held_out()
  return [
    (n, c) for n in NAMES if n in names for c in COLOURS if ((n, c) in out) == (split == "held_out")
  ]


def pair_id(name: str, colour: str) -> int:
  """The position of a pair in the whole table, 8 * name + colour, which is the same in every
  split.
  """
  return NAMES.index(name) * len(COLOURS) + list(COLOURS).index(colour)


def check_font(font_path: str) -> None:
  """Checks that a file is a font with colour bitmaps.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is another kind of font, which would draw outlines or empty boxes.
  """
  if not os.path.isfile(font_path):
    raise FileNotFoundError(
      f"emoji font not found: {font_path}; install the Debian package fonts-noto-color-emoji, or"
      " name a copy of NotoColorEmoji.ttf (the bitmap build) with --font=PATH or EMOJI_FONT=PATH"
    )
  with open(font_path, "rb") as file:
    if b"CBDT" not in file.read(1024):  # the table directory, at the start of the file
      raise ValueError(
        f"{font_path} has no colour bitmaps: use the CBDT build of NotoColorEmoji.ttf"
      )


@functools.lru_cache(maxsize=512)
def _glyph(font_path: str, codepoint: int):
  """A glyph's bitmap from the font, RGBA with premultiplied alpha, cropped to what is drawn.

  Raises:
    ValueError: the font is no bitmap font of the expected size, or lacks the code point.
  """
  # Here and below Pillow is imported late: the names and captions are needed without it.
  from PIL import Image, ImageDraw, ImageFont

  check_font(font_path)
  try:
    font = ImageFont.truetype(font_path, STRIKE)
  except OSError as error:
    raise ValueError(
      f"{font_path} has no bitmaps of {STRIKE} pixels: use NotoColorEmoji.ttf, the CBDT build"
    ) from error
  picture = Image.new("RGBA", CANVAS)
  ImageDraw.Draw(picture).text((0, 0), chr(codepoint), font=font, embedded_color=True)
  box = picture.getchannel("A").getbbox()
  if box is None:
    raise ValueError(f"{font_path} has no glyph for U+{codepoint:X}")
  # With premultiplied alpha, resizing bleeds no colour from transparent pixels.
  return picture.crop(box).convert("RGBa")


def render(
  font_path: str,
  codepoint: int,
  size: int,
  colour: tuple[int, int, int],
  shift: tuple[float, float],
  scale: float,
) -> np.ndarray:
  """Draws one glyph on a plain background.

  Args:
    font_path: NotoColorEmoji.ttf with CBDT bitmaps.
    codepoint: of the emoji.
    size: height and width of the picture, pixels.
    colour: RGB of the background, 0-255.
    shift: right and down, as shares of `size`.
    scale: of the fitted glyph; at 1 its longer side is FILL of the picture.

  Returns:
    uint8 `[size, size, 3]`.
  """
  from PIL import Image

  glyph = _glyph(font_path, codepoint)
  large = size * SUPERSAMPLE
  ratio = large * FILL * scale / max(glyph.size)
  width, height = (max(1, round(side * ratio)) for side in glyph.size)
  glyph = glyph.resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
  picture = Image.new("RGBA", (large, large), (*colour, 255))
  layer = Image.new("RGBA", picture.size)
  left = round((large - width) / 2 + shift[0] * large)
  top = round((large - height) / 2 + shift[1] * large)
  layer.paste(glyph, (left, top))
  picture.alpha_composite(layer)
  return np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BOX))


def jitter(name: str, colour: str, variant: int) -> tuple[tuple[float, float], float]:
  """The shift (shares of the size) and the scale of a variant. Variant 0 is centred and of middle
  scale.
  """
  if variant == 0:
    return (0.0, 0.0), sum(SCALES) / 2
  rng = np.random.default_rng([zlib.crc32(f"{name}/{colour}".encode()), variant])
  x, y = rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2)
  return (float(x), float(y)), float(rng.uniform(*SCALES))


def draw(font_path: str, name: str, colour: str, size: int, variant: int) -> np.ndarray:
  """One picture of the data set, uint8 `[size, size, 3]`."""
  shift, scale = jitter(name, colour, variant)
  return render(font_path, EMOJI[name], size, COLOURS[colour], shift, scale)


def load_arrays(
  font: str, size: int, variants: int, split: str, names: tuple[str, ...] = NAMES
) -> tuple[np.ndarray, list[str], np.ndarray]:
  """A whole split in memory, in the order of the pairs, with the variants of a pair together.

  Args:
    font: path of NotoColorEmoji.ttf.
    size: height and width of the pictures, pixels.
    variants: number of pictures of each pair.
    split: "train" or "held_out".
    names: only pairs of these names.

  Returns:
    Images uint8 `[n, size, size, 3]` with n = pairs * variants, n captions, and pair ids int32
    `[n]`.

  Raises:
    FileNotFoundError, ValueError: as `check_font` and `pairs`.
  """
  check_font(font)
  rows = [
    (name, colour, variant) for name, colour in pairs(split, names) for variant in range(variants)
  ]
  images = np.stack([draw(font, name, colour, size, variant) for name, colour, variant in rows])
  ids = np.array([pair_id(name, colour) for name, colour, _ in rows], np.int32)
  return images, [caption(name, colour) for name, colour, _ in rows], ids


def run_pairs(count: int = 16) -> list[tuple[str, str]]:
  """The prompts of the default run: one training pair of each of the best-known names, with every
  colour equally often.
  """
  colours = tuple(COLOURS)
  return [
    (name, colours[(3 * i + i // len(colours) + 6) % len(colours)])
    for i, name in enumerate(NAMES[:count])
  ]


def write_prompts(folder: str) -> None:
  """Writes emoji_train.txt, emoji_held_out.txt and emoji_run.txt, one caption a line, into
  `folder`.
  """
  os.makedirs(folder, exist_ok=True)
  lists = {"train": pairs("train"), "held_out": pairs("held_out"), "run": run_pairs()}
  for name, rows in lists.items():
    path = os.path.join(folder, f"emoji_{name}.txt")
    with open(path, "w", encoding="utf-8", newline="\n") as file:
      file.writelines(caption(*pair) + "\n" for pair in rows)


def contact_sheet(font_path: str, size: int, columns: int = 16) -> np.ndarray:
  """A picture of every name once, with the colours in turn: uint8
  `[rows * size, columns * size, 3]`.
  """
  colours = tuple(COLOURS)
  tiles = [
    draw(font_path, name, colours[i % len(colours)], size, 0) for i, name in enumerate(NAMES)
  ]
  tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
  rows = [np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles), columns)]
  return np.concatenate(rows)


def main() -> int:
  """The command. The exit code is 2 where the font is missing or unfit, with one line on stderr."""
  parser = argparse.ArgumentParser(
    prog="python -m dancegrpo_jax.data.emoji", description="the text-to-emoji data set"
  )
  parser.add_argument("--write-prompts", metavar="DIR", help="write the three prompt lists")
  parser.add_argument("--sheet", metavar="PNG", help="draw every emoji once")
  parser.add_argument("--size", type=int, default=32, help="of the sheet's pictures, pixels")
  parser.add_argument(
    "--font", default=os.environ.get("EMOJI_FONT", FONT), help="NotoColorEmoji.ttf (CBDT build)"
  )
  args = parser.parse_args()
  if not (args.write_prompts or args.sheet):
    parser.error("nothing to do: give --write-prompts=DIR or --sheet=PNG")
  if args.write_prompts:
    write_prompts(args.write_prompts)
  if args.sheet:
    from PIL import Image

    try:
      Image.fromarray(contact_sheet(args.font, args.size)).save(args.sheet)
    except (FileNotFoundError, ValueError) as error:
      print(f"error: {error}", file=sys.stderr)
      return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())

"""Makes the data set `emoji`: python -m dancegrpo_jax.data.emoji_dataset --data-dir=DIR"""

import argparse
import sys

from dancegrpo_jax.data import emoji_dataset


def main(argv: list[str] | None = None) -> int:
  """The command. The exit code is 2 where the font is missing or unfit, or where a number can't be
  used, with one line on stderr.
  """
  parser = argparse.ArgumentParser(
    prog="python -m dancegrpo_jax.data.emoji_dataset", description=__doc__
  )
  parser.add_argument(
    "--data-dir", help="of all TFDS data sets (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets)"
  )
  parser.add_argument("--size", type=int, default=32, help="height and width, pixels")
  parser.add_argument(
    "--variants", type=int, default=4, help="number of pictures of each (name, colour) pair"
  )
  parser.add_argument(
    "--font", help="NotoColorEmoji.ttf (default: $EMOJI_FONT, else where Debian installs it)"
  )
  args = parser.parse_args(argv)
  try:
    for split in ("train", "held_out"):
      source = emoji_dataset.load(
        split, data_dir=args.data_dir, size=args.size, variants=args.variants, font=args.font
      )
      print(f"emoji {split}: {len(source)} pictures")
  except (FileNotFoundError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())

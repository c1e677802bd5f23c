"""The data set `emoji`, made by the TFDS builder in `builder.py`.

This module is light to import: TensorFlow Datasets is imported on first use.
"""

import os

DEFAULT_CONFIG = "32px_4"


def load(
  split: str,
  *,
  data_dir: str | None = None,
  size: int = 32,
  variants: int = 4,
  font: str | None = None,
):
  """Makes the data set if it isn't on disk yet, and opens a split of it for random access.

  Args:
    split: "train" or "held_out".
    data_dir: folder of all TFDS data sets; None is $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    size: height and width of the pictures, pixels.
    variants: number of pictures of each (name, colour) pair.
    font: NotoColorEmoji.ttf; None is $EMOJI_FONT, else where Debian installs it. It is read only
      when the data set is made.

  Returns:
    A sequence of dicts: image uint8 `[size, size, 3]`, caption, name and colour (bytes), pair
    (int).

  Raises:
    FileNotFoundError: the font is not there.
    ValueError: the font isn't the bitmap build.
  """
  from dancegrpo_jax.data.emoji_dataset.builder import Emoji, EmojiConfig

  config = EmojiConfig.of(size, variants)
  # TFDS refuses a config that equals its default one and is another object.
  config = Emoji.builder_configs.get(config.name, config)
  builder = Emoji(config=config, data_dir=data_dir or os.environ.get("TFDS_DATA_DIR"), font=font)
  builder.download_and_prepare()
  return builder.as_data_source(split=split)

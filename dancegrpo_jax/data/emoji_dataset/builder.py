"""The TFDS builder of the text-to-emoji pictures, which writes ArrayRecord files and doesn't need
TensorFlow.

It has a folder of its own because TFDS looks for a builder's metadata beside its module.
"""

import dataclasses
import os

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from dancegrpo_jax.data import emoji
from dancegrpo_jax.data.emoji_dataset import DEFAULT_CONFIG

CITATION = (
  "Noto Color Emoji, Google, SIL Open Font License 1.1, https://github.com/googlefonts/noto-emoji"
)


@dataclasses.dataclass(kw_only=True)
class EmojiConfig(tfds.core.BuilderConfig):
  """What the pictures depend on; the config's name is their folder.

  Attributes:
    size: height and width, pixels.
    variants: number of pictures of each (name, colour) pair.
  """

  size: int
  variants: int

  @classmethod
  def of(cls, size: int, variants: int) -> "EmojiConfig":
    """The config of these numbers, with a name made of them. ValueError: one is not positive."""
    if size < 1 or variants < 1:
      raise ValueError(f"emoji: size {size} and variants {variants} must be positive")
    return cls(name=f"{size}px_{variants}", size=size, variants=variants)


class Emoji(tfds.core.GeneratorBasedBuilder):
  """160 emoji on 8 background colours; one colour of every name is in `held_out` alone."""

  name = "emoji"
  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "160 names, 8 colours."}
  BUILDER_CONFIGS = [EmojiConfig.of(32, 4)]
  DEFAULT_BUILDER_CONFIG_NAME = DEFAULT_CONFIG

  def __init__(self, *, font: str | None = None, file_format="array_record", **kwargs):
    """`font` is NotoColorEmoji.ttf; None is $EMOJI_FONT, else where Debian installs it."""
    self.font = font or os.environ.get("EMOJI_FONT", emoji.FONT)
    super().__init__(file_format=file_format, **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    size = self.builder_config.size
    return tfds.core.DatasetInfo(
      builder=self,
      description=Emoji.__doc__,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
          "caption": tfds.features.Text(),
          "name": tfds.features.Text(),
          "colour": tfds.features.Text(),
          "pair": tfds.features.Scalar(np.int32),
        }
      ),
      supervised_keys=("caption", "image"),
      homepage="https://github.com/googlefonts/noto-emoji",
      citation=CITATION,
      license="SIL Open Font License 1.1",
      # Rows stay in the table's order, so that an index means the same everywhere.
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager) -> dict:
    del dl_manager  # nothing is downloaded
    emoji.check_font(self.font)
    return {split: self._generate_examples(split) for split in ("train", "held_out")}

  def _generate_examples(self, split: str):
    config = self.builder_config
    for name, colour in emoji.pairs(split):
      pair = emoji.pair_id(name, colour)
      for variant in range(config.variants):
        pixels = emoji.draw(self.font, name, colour, config.size, variant)
        row = {
          "image": Image.fromarray(pixels),  # TFDS would need TensorFlow to encode an array
          "caption": emoji.caption(name, colour),
          "name": name,
          "colour": colour,
          "pair": pair,
        }
        yield pair * config.variants + variant, row

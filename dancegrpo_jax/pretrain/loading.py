"""The training split of each world: pictures or clips with their tokenised captions."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax.data import emoji_dataset, moving_emoji, tokenizer
from dancegrpo_jax.pretrain import shared
from dancegrpo_jax.pretrain.shared import Data


def load(config: ConfigDict, font: str, workdir: Path, out: Path) -> Data:
  """The training split of the config's world.

  Args:
    config: of pretraining; its `world` is a key of `WORLDS`.
    font: NotoColorEmoji.ttf.
    workdir: where a data set that is drawn once is kept.
    out: the folder of the models. CLIP's tokenizer is written into it.
  """
  return WORLDS[config.world](config, font, workdir, out)


def pictures(config: ConfigDict, font: str, workdir: Path, out: Path) -> Data:
  """Emoji. Their TFDS builder draws them into the workdir once."""
  shared.write_tokenizer_files(out / config.tokenizer)
  rows = emoji_dataset.load(
    "train", data_dir=str(workdir / "tfds"), size=config.size, variants=config.variants, font=font
  )
  rows = [rows[number] for number in range(len(rows))]
  captions = [row["caption"].decode() for row in rows]
  pair = np.array([row["pair"] for row in rows], np.int32)
  return Data(
    images=np.stack([row["image"] for row in rows]),
    captions=captions,
    tokens=tokenizer.load_tokenizer(str(out / config.tokenizer))(captions),
    caption=pair,
    group=pair,
  )


def clips(config: ConfigDict, font: str, workdir: Path, out: Path) -> Data:
  """Moving emoji, which take half a minute to draw. The captions of a group differ in the motion
  alone.
  """
  del workdir
  splits = ("train", "held_out")
  every = [moving_emoji.caption(scene) for split in splits for scene in moving_emoji.scenes(split)]
  shared.write_tokenizer_files(out / config.tokenizer, every)
  images, scenes = moving_emoji.load_arrays(
    font, variants=config.variants, split="train", jitter_share=config.jitter_share
  )
  captions = [moving_emoji.caption(scene) for scene in scenes]
  return Data(
    images=images,
    captions=captions,
    tokens=tokenizer.load_tokenizer(str(out / config.tokenizer))(captions),
    caption=_numbers(captions),
    group=_numbers([f"{scene.name}/{scene.colour}" for scene in scenes]),
  )


def _numbers(texts: list[str]) -> np.ndarray:
  """A number for every text, the same for equal ones, int32 `[n]`."""
  numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
  return np.array([numbers[text] for text in texts], np.int32)


WORLDS = {"emoji": pictures, "moving_emoji": clips}

"""What the stages of pretraining share: their data, the record that a stage returns, text encoders'
configs, and the files that they write.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax import programs, strict_json
from dancegrpo_jax.checkpoints import weights
from dancegrpo_jax.data import emoji, tokenizer
from dancegrpo_jax.types import PyTree


class Data(NamedTuple):
  """The pretraining split in memory.

  Attributes:
    images: pictures or clips, uint8 `[n, (frames,) size, size, 3]`.
    captions: n texts.
    tokens: the captions for CLIP, int32 `[n, tokens]`.
    caption: the number of each sample's caption, int32 `[n]`. Samples of one caption are together.
    group: the number of each sample's group, int32 `[n]`. The captions of a group are hard to tell
      apart, so that CLIP is asked to do so. Where every caption is a group of its own, these are
      the numbers of `caption`.
  """

  images: np.ndarray
  captions: list[str]
  tokens: np.ndarray
  caption: np.ndarray
  group: np.ndarray


class Stage(NamedTuple):
  """What is trained.

  Attributes:
    name: of the stage, and of its section in the config.
    params: the parameters to start from.
    loss: `(params, batch, key) -> (loss, metrics)`.
    batch: `(step) -> batch`, a dict of host arrays.
    export: `(params) -> None` writes the trained networks.
  """

  name: str
  params: PyTree
  loss: Callable
  batch: Callable
  export: Callable


def initial(network, key: jax.Array, *inputs: jax.Array) -> dict:
  """`network.init` as one program. Layer by layer it would compile hundreds."""
  return programs.compiled(network.init)(key, *inputs)


def stratified(key: jax.Array, count: int, margin: float = 0.0) -> jax.Array:
  """One uniform number from each of `count` equal parts of [0, 1], which lowers the variance of a
  loss that averages over them.

  Args:
    key: of the draw.
    count: number of parts.
    margin: share of each part that is left out at both of its ends.
  """
  offsets = jax.random.uniform(key, (count,), minval=margin, maxval=1 - margin)
  return (jnp.arange(count) + offsets) / count


def token_ids(folder: Path) -> dict:
  """The size of a tokenizer's vocabulary and its special ids, as a text encoder's config.json has
  them.
  """
  vocab = json.loads((folder / "vocab.json").read_text())
  eos = vocab[tokenizer.EOS]
  return {
    "vocab_size": len(vocab),
    "bos_token_id": vocab[tokenizer.BOS],
    "eos_token_id": eos,
    "pad_token_id": eos,
  }


def text_encoder_json(settings: ConfigDict, tokenizer_folder: Path) -> dict:
  """config.json of a text encoder of CLIP's."""
  return {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    **settings.to_dict(),
    **token_ids(tokenizer_folder),
  }


def all_captions() -> list[str]:
  """The captions of all pictures, also of those that are held out."""
  return [emoji.caption(name, colour) for name in emoji.NAMES for colour in emoji.COLOURS]


def write_tokenizer_files(folder: Path, captions: list[str] | None = None) -> None:
  """Writes CLIP's tokenizer of some captions, by default of `all_captions`. Text encoders and the
  reward have the same vocabulary.
  """
  tokenizer.write_tokenizer(all_captions() if captions is None else captions, str(folder))


def write_json(path: Path, value: dict) -> None:
  """Writes a JSON file, and makes the folder that it lies in."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(strict_json.dumps(value, indent=2, sort_keys=True) + "\n")


def save_component(folder: Path, config_json: dict, params: PyTree) -> None:
  """Writes one network's folder.

  The networks of diffusers are written in float16, which halves their size; its relative error of
  1e-3 can't be seen in a sample. diffusers read them as float32 again. transformers would keep
  float16, which does not go together with the rest of a pipeline: theirs are written in float32.
  """
  name = config_json.get("_class_name") or config_json["architectures"][0]
  dtype = np.float16 if "_class_name" in config_json else np.float32
  weights.save(folder, name, params, config_json, dtype=dtype)

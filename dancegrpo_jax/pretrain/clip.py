"""Pretrains CLIP, which is the reward of the embedded models. Of a clip it sees a contact sheet."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dancegrpo_jax.models import clip
from dancegrpo_jax.pretrain import shared
from dancegrpo_jax.pretrain.shared import Data, Stage
from dancegrpo_jax.rewards import frames

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of pixels in OpenAI's training data
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_stage(config: ConfigDict, data: Data, out: Path) -> Stage:
  """CLIP: the symmetric contrastive loss over a batch of distinct captions (arXiv 2103.00020).

  Args:
    config: of pretraining.
    data: the training split.
    out: the folder of the models; the folder `config.clip.folder` is written.
  """
  stage, folder = config.clip, out / config.clip.folder
  config_json = _config_json(stage, out / config.tokenizer)
  network = clip.Clip.from_json(config_json)
  images = frames.sheet(data.images) if data.images.ndim == 5 else data.images
  first = np.concatenate([[0], np.flatnonzero(np.diff(data.caption)) + 1])  # of each caption
  variants = len(data.caption) // len(first)
  groups = np.unique(data.group)

  def loss(params, batch, key):
    noise_key, level_key = jax.random.split(key)
    x = batch["images"].astype(jnp.float32) / 255.0
    level = stage.pixel_noise * jax.random.uniform(level_key, (x.shape[0], 1, 1, 1))
    x = jnp.clip(x + level * jax.random.normal(noise_key, x.shape), 0.0, 1.0)
    x = (x - jnp.array(CLIP_MEAN).reshape(1, 1, 1, 3)) / jnp.array(CLIP_STD).reshape(1, 1, 1, 3)
    text, image, scale = network.apply({"params": params}, batch["tokens"], x)
    return _contrastive(text, image, scale)

  def batch(step: int) -> dict:
    rng = np.random.default_rng([config.seed, 1, step])
    chosen = rng.choice(groups, stage.batch * len(groups) // len(first), replace=False)
    captions = first[np.isin(data.group[first], chosen)]
    rows = captions + rng.integers(variants, size=len(captions))
    return {"images": images[rows], "tokens": data.tokens[rows]}

  def export(params) -> None:
    shared.save_component(folder, config_json, params)
    size = stage.vision.image_size
    shared.write_json(folder / "preprocessor_config.json", clip_preprocessor(size))
    for file in (out / config.tokenizer).iterdir():
      shutil.copy(file, folder)

  key, tokens = jax.random.key(config.seed), jnp.asarray(data.tokens[:1])
  picture = jnp.zeros((1, *images.shape[1:]))
  params = shared.initial(network, key, tokens, picture)["params"]
  return Stage(name="clip", params=params, loss=loss, batch=batch, export=export)


def _contrastive(text: jax.Array, image: jax.Array, scale: jax.Array) -> tuple[jax.Array, dict]:
  """The mean cross-entropy of finding a text's image and an image's text, and metrics.

  Args:
    text, image: unit vectors `[n, d]`; row i of one belongs to row i of the other.
    scale: of the logits; 100 at most counts.
  """
  logits = jnp.minimum(scale, 100.0) * image @ text.T
  labels = jnp.arange(len(logits))
  by_image, by_text = (
    optax.softmax_cross_entropy_with_integer_labels(side, labels).mean()
    for side in (logits, logits.T)
  )
  accuracy = (logits.argmax(1) == labels).mean()
  cosine = jnp.diag(image @ text.T).mean()
  return (by_image + by_text) / 2, {"accuracy": accuracy, "cosine": cosine, "scale": scale}


def _config_json(stage: ConfigDict, tokenizer_folder: Path) -> dict:
  """config.json of the CLIP folder."""
  return {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": stage.projection_dim,
    "logit_scale_init_value": 2.6592,
    "text_config": {
      **stage.text.to_dict(),
      **shared.token_ids(tokenizer_folder),
      "model_type": "clip_text_model",
      "projection_dim": stage.projection_dim,
    },
    "vision_config": {
      **stage.vision.to_dict(),
      "model_type": "clip_vision_model",
      "projection_dim": stage.projection_dim,
    },
  }


def clip_preprocessor(size: int) -> dict:
  """preprocessor_config.json of the CLIP folder."""
  return {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": size},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": size, "width": size},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "do_convert_rgb": True,
  }

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
from dancegrpo_jax.types import PyTree

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of pixels in OpenAI's training data
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_stage(config: ConfigDict, data: Data, out: Path) -> Stage:
  """CLIP: the symmetric contrastive loss over a batch of distinct captions (arXiv 2103.00020).

  Each sample also meets `config.clip.negatives` other captions of its group. Those of a clip name
  another motion, which a batch of distinct emoji would hardly ask for.

  Args:
    config: of pretraining.
    data: the training split.
    out: the folder of the models; the folder `config.clip.folder` is written.

  Raises:
    ValueError: a group has too few captions for the negatives.
  """
  stage, folder = config.clip, out / config.clip.folder
  config_json = _config_json(stage, out / config.tokenizer)
  network = clip.Clip.from_json(config_json)
  images = frames.sheet(data.images) if data.images.ndim == 5 else data.images
  first = np.concatenate([[0], np.flatnonzero(np.diff(data.caption)) + 1])  # of each caption
  variants = len(data.caption) // len(first)
  group = data.group[first]
  fewest = int(np.unique(group, return_counts=True)[1].min()) - 1
  if stage.negatives > fewest:
    raise ValueError(
      f"config.clip.negatives = {stage.negatives}: must be at most {fewest}, as many other captions"
      " as a group has"
    )

  def loss(params, batch, key):
    noise_key, level_key = jax.random.split(key)
    x = batch["images"].astype(jnp.float32) / 255.0
    level = stage.pixel_noise * jax.random.uniform(level_key, (x.shape[0], 1, 1, 1))
    x = jnp.clip(x + level * jax.random.normal(noise_key, x.shape), 0.0, 1.0)
    x = (x - jnp.array(CLIP_MEAN).reshape(1, 1, 1, 3)) / jnp.array(CLIP_STD).reshape(1, 1, 1, 3)
    text, image, scale = network.apply({"params": params}, batch["tokens"], x)
    text, others = text[: len(x)], text[len(x) :]
    negatives = others.reshape(len(x), stage.negatives, text.shape[-1])
    return _contrastive(text, image, scale, negatives)

  def batch(step: int) -> dict:
    rng = np.random.default_rng([config.seed, 1, step])
    chosen = np.sort(rng.choice(len(first), stage.batch, replace=False))
    others = [
      rng.choice(np.setdiff1d(np.flatnonzero(group == group[own]), own), stage.negatives, False)
      for own in chosen
    ]
    rows = first[chosen] + rng.integers(variants, size=len(chosen))
    captions = first[np.concatenate([chosen, *others]).astype(int)]
    return {"images": images[rows], "tokens": data.tokens[captions]}

  def export(params) -> None:
    shared.save_component(folder, config_json, params)
    size = stage.vision.image_size
    shared.write_json(folder / "preprocessor_config.json", clip_preprocessor(size))
    for file in (out / config.tokenizer).iterdir():
      shutil.copy(file, folder)

  key, tokens = jax.random.key(config.seed), jnp.asarray(data.tokens[:1])
  picture = jnp.zeros((1, *images.shape[1:]))
  params = shared.initial(network, key, tokens, picture)["params"]
  params = _with_larger_positions(params, stage.position_std / clip.POSITION_STD)
  return Stage(name="clip", params=params, loss=loss, batch=batch, export=export)


def _with_larger_positions(params: PyTree, factor: float) -> PyTree:
  """Parameters whose position embeddings of images are multiplied by `factor`."""
  tower = params["vision_model"]
  positions = jax.tree.map(lambda x: factor * x, tower["embeddings"]["position_embedding"])
  embeddings = {**tower["embeddings"], "position_embedding": positions}
  return {**params, "vision_model": {**tower, "embeddings": embeddings}}


def _contrastive(
  text: jax.Array, image: jax.Array, scale: jax.Array, negatives: jax.Array
) -> tuple[jax.Array, dict]:
  """The mean cross-entropy of finding a text's image and an image's text, and metrics.

  Args:
    text, image: unit vectors `[n, d]`; row i of one belongs to row i of the other.
    scale: of the logits; 100 at most counts.
    negatives: unit vectors of further texts `[n, k, d]`, which only their own image meets.
  """
  scale = jnp.minimum(scale, 100.0)
  logits = scale * image @ text.T
  more = scale * jnp.einsum("nd,nkd->nk", image, negatives)
  labels = jnp.arange(len(logits))
  by_image, by_text = (
    optax.softmax_cross_entropy_with_integer_labels(side, labels).mean()
    for side in (jnp.concatenate([logits, more], axis=1), logits.T)
  )
  own = jnp.diag(logits)
  metrics = {
    "accuracy": (logits.argmax(1) == labels).mean(),
    "in_group": (own > more.max(axis=1, initial=-jnp.inf)).mean(),
    "cosine": jnp.diag(image @ text.T).mean(),
    "scale": scale,
  }
  return (by_image + by_text) / 2, metrics


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

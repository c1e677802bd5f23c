"""Pretrains the autoencoder of pictures or clips, on whose latents the denoisers are trained."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax import programs
from dancegrpo_jax.checkpoints import weights
from dancegrpo_jax.models import autoencoder, autoencoder_hunyuan_video
from dancegrpo_jax.pretrain import shared
from dancegrpo_jax.pretrain.shared import Data, Stage
from dancegrpo_jax.types import PyTree

Network = autoencoder.AutoencoderKL | autoencoder_hunyuan_video.AutoencoderKLHunyuanVideo


def vae_stage(config: ConfigDict, data: Data, out: Path) -> Stage:
  """The autoencoder: the absolute error of pixels and of their differences, plus a small KL.

  With `config.vae.crop` all steps but the last ones see crops. A small emoji on a large background
  is a small part of the loss, and of what is computed; in a crop it is a large part of both.

  Args:
    config: of pretraining.
    data: the training split.
    out: the folder of the models; the folder vae inside `config.folder` is written.
  """
  stage = config.vae
  network = network_of(stage.network.to_dict())

  def loss(params, batch, key):
    x = to_signed(batch["images"])
    mean, log_variance = network.apply({"params": params}, x, method="encode")
    latents = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
    error = network.apply({"params": params}, latents, method="decode") - x
    pixels = jnp.abs(error).mean()
    # The error of differences between neighbours along the frames, the height and the width. The
    # absolute error alone leaves edges soft, and motion too.
    edges = sum(jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in range(1, x.ndim - 1))
    kl = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance).mean()
    return pixels + 0.5 * edges + stage.kl_weight * kl, {"pixels": pixels, "kl": kl}

  def batch(step: int) -> dict:
    rng = np.random.default_rng([config.seed, step])
    if not stage.crop or step >= stage.steps - stage.whole_steps:
      return {"images": data.images[rng.choice(len(data.images), stage.batch, replace=False)]}
    rows = rng.choice(len(data.images), stage.crop_batch, replace=False)
    return {"images": crops(rng, data.images[rows], stage.crop)}

  def export(params) -> None:
    latents = encode_all(network, params, data.images)
    config_json = {**stage.network.to_dict(), "scaling_factor": round(float(1 / latents.std()), 5)}
    shared.save_component(out / config.folder / "vae", config_json, params)

  sample = jnp.zeros((1, *data.images.shape[1:]))
  params = shared.initial(network, jax.random.key(config.seed), sample)["params"]
  return Stage(name="vae", params=params, loss=loss, batch=batch, export=export)


def crops(rng: np.random.Generator, images: np.ndarray, side: int) -> np.ndarray:
  """A square around the middle of each picture or clip, `[n, (f,) side, side, 3]`.

  It is moved by up to half of the largest distance at which it still lies inside.
  """
  room = (images.shape[-2] - side) // 2
  starts = room + rng.integers(-(room // 2), room // 2 + 1, size=(len(images), 2))
  return np.stack(
    [
      image[..., y : y + side, x : x + side, :]
      for image, (y, x) in zip(images, starts, strict=True)
    ]
  )


def network_of(config_json: dict) -> Network:
  """The autoencoder of a config.json, by its class."""
  if config_json["_class_name"] == "AutoencoderKLHunyuanVideo":
    return autoencoder_hunyuan_video.from_json(config_json)
  return autoencoder.from_json(config_json)


def to_signed(images: jax.Array) -> jax.Array:
  """uint8 pixels as float32 in [-1, 1]."""
  return images.astype(jnp.float32) / 127.5 - 1.0


def encode_all(
  network: Network, params: PyTree, images: np.ndarray, chunk: int = 256
) -> np.ndarray:
  """The posterior means of all pictures or clips, `[n, (f,) h, w, z]`, unscaled; `chunk` of them
  are encoded at once.
  """
  encode = programs.compiled(
    lambda p, x: network.apply({"params": p}, to_signed(x), method="encode")[0]
  )
  chunk = min(chunk, len(images))
  padded = np.concatenate([images, np.zeros((-len(images) % chunk, *images.shape[1:]), np.uint8)])
  rows = [np.asarray(encode(params, padded[i : i + chunk])) for i in range(0, len(padded), chunk)]
  return np.concatenate(rows)[: len(images)]


def load_vae(folder: Path, shape: tuple[int, ...]) -> tuple[dict, PyTree]:
  """config.json and the parameters of an autoencoder's folder; `shape` is that of a sample."""
  config_json = weights.read_config(folder)
  network = network_of(config_json)
  abstract = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *shape)))["params"]
  return config_json, weights.load(folder, config_json["_class_name"], abstract)


def scaled_latents(folder: Path, images: np.ndarray) -> np.ndarray:
  """The samples as a denoiser sees them: posterior means times scaling_factor, float32."""
  config_json, params = load_vae(folder, images.shape[1:])
  latents = encode_all(network_of(config_json), params, images)
  return latents * config_json["scaling_factor"]

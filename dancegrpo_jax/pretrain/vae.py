"""Pretrains the autoencoder of pictures or clips, on whose latents the denoisers are trained."""

from collections.abc import Callable
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


def frames_stage(config: ConfigDict, data: Data, out: Path) -> Stage:
  """The autoencoder of clips on crops of single frames, which cost a tenth of a clip's.

  Args:
    config: of pretraining.
    data: the training split, of clips.
    out: the folder of the models; the folder vae inside `config.frames.folder` is written.
  """
  stage = config.frames

  def batch(step: int) -> dict:
    rng = np.random.default_rng([config.seed, 5, step])
    rows = rng.choice(len(data.images), stage.batch, replace=False)
    frames = rng.integers(data.images.shape[1], size=stage.batch)
    return {"images": crops(rng, data.images[rows, frames][:, None], stage.crop)}

  def export(params) -> None:
    shared.save_component(out / stage.folder / "vae", config.vae.network.to_dict(), params)

  params = _initial_params(config, data)
  return Stage(name="frames", params=params, loss=_loss(config), batch=batch, export=export)


def vae_stage(config: ConfigDict, data: Data, out: Path) -> Stage:
  """The autoencoder of pictures or clips.

  With `config.vae.from_frames` it starts from the weights of the stage `frames`. Its first
  `config.vae.crop_steps` then see crops: a small emoji on a large background is a small part of the
  loss, and of what is computed; in a crop it is a large part of both. The other steps see whole
  clips, because a network's norms take their means over the whole clip.

  Args:
    config: of pretraining.
    data: the training split.
    out: the folder of the models; the folder vae inside `config.folder` is written.

  Raises:
    ValueError: the weights of `frames` are missing.
  """
  stage = config.vae
  network = network_of(stage.network.to_dict())

  def batch(step: int) -> dict:
    rng = np.random.default_rng([config.seed, step])
    on_crops = step < stage.crop_steps
    count = stage.crop_batch if on_crops else stage.batch
    images = data.images[rng.choice(len(data.images), count, replace=False)]
    return {"images": crops(rng, images, stage.crop) if on_crops else images}

  def export(params) -> None:
    latents = encode_all(network, params, data.images)
    config_json = {**stage.network.to_dict(), "scaling_factor": round(float(1 / latents.std()), 5)}
    shared.save_component(out / config.folder / "vae", config_json, params)

  if stage.from_frames:
    folder = out / config.frames.folder / "vae"
    params = inflated(load_vae(folder, data.images.shape[1:], made_by="frames")[1])
  else:
    params = _initial_params(config, data)
  return Stage(name="vae", params=params, loss=_loss(config), batch=batch, export=export)


def _loss(config: ConfigDict) -> Callable:
  """`(params, batch, key) -> (loss, metrics)`: the error of pixels, plus a small KL.

  Raises:
    ValueError: `config.vae.error` is not a key of `ERRORS`.
  """
  stage = config.vae
  network = network_of(stage.network.to_dict())
  if stage.error not in ERRORS:
    raise ValueError(f"config.vae.error = {stage.error!r}: must be one of {', '.join(ERRORS)}")
  error_of = ERRORS[stage.error]

  def loss(params, batch, key):
    x = to_signed(batch["images"])
    mean, log_variance = network.apply({"params": params}, x, method="encode")
    latents = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
    error = network.apply({"params": params}, latents, method="decode") - x
    kl = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance).mean()
    metrics = {"pixels": jnp.abs(error).mean(), "kl": kl}
    return error_of(error) + stage.kl_weight * kl, metrics

  return loss


def _initial_params(config: ConfigDict, data: Data) -> PyTree:
  """Random parameters, with posteriors whose log-variance is `config.vae.log_variance`."""
  network = network_of(config.vae.network.to_dict())
  sample = jnp.zeros((1, *data.images.shape[1:]))
  params = shared.initial(network, jax.random.key(config.seed), sample)["params"]
  return _with_log_variance(params, config.vae.log_variance)


def _with_log_variance(params: PyTree, value: float) -> PyTree:
  """Parameters whose posteriors begin with a log-variance of about `value`."""
  layer = params["quant_conv"]
  half = len(layer["bias"]) // 2  # of the channels are means
  return {**params, "quant_conv": {**layer, "bias": layer["bias"].at[half:].set(value)}}


def inflated(params: PyTree) -> PyTree:
  """An autoencoder that was trained on single frames, as one that treats each frame of a clip so.

  A single frame is repeated in front of itself, so a convolution applies the sum of its kernel's
  three frames to it. In a clip, that sum belongs to the frame itself, which is the last of the
  three; the earlier ones start at zero.
  """

  def moved(kernel: jax.Array) -> jax.Array:
    if kernel.ndim != 5:
      return kernel
    last = jnp.arange(len(kernel)).reshape(-1, 1, 1, 1, 1) == len(kernel) - 1
    return jnp.where(last, kernel.sum(0), 0.0)

  return jax.tree.map(moved, params)


def _absolute(error: jax.Array) -> jax.Array:
  """The mean absolute error of pixels, and of the differences between neighbours along the frames,
  the height and the width. Alone, the first leaves edges soft, and motion too.
  """
  axes = [axis for axis in range(1, error.ndim - 1) if error.shape[axis] > 1]
  edges = sum(jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in axes)
  return jnp.abs(error).mean() + 0.5 * edges


def _squared(error: jax.Array) -> jax.Array:
  """Four times the mean squared error of pixels, which are in [-1, 1].

  Where a small subject is on a plain background, the absolute error is content with the background
  for a long time: it is the median of most pixels.
  """
  return 4.0 * jnp.square(error).mean()


ERRORS = {"absolute": _absolute, "squared": _squared}


def crops(rng: np.random.Generator, images: np.ndarray, side: int) -> np.ndarray:
  """A square around the middle of each picture or clip, `[n, (f,) side, side, 3]`.

  It is moved by up to half of the largest distance at which it still lies inside.

  Raises:
    ValueError: the samples are smaller than the square.
  """
  if side > images.shape[-2]:
    raise ValueError(
      f"a stage's crop = {side}: must be at most config.size, which is {images.shape[-2]}"
    )
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


def load_vae(folder: Path, shape: tuple[int, ...], made_by: str = "vae") -> tuple[dict, PyTree]:
  """config.json and the parameters of an autoencoder's folder.

  Args:
    folder: of the autoencoder.
    shape: of a sample.
    made_by: the stage that writes this folder.

  Raises:
    ValueError: the folder is missing.
  """
  if not (folder / "config.json").is_file():
    raise ValueError(f"{folder}: no autoencoder; run --stage={made_by} first, with the same --out")
  config_json = weights.read_config(folder)
  network = network_of(config_json)
  abstract = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *shape)))["params"]
  return config_json, weights.load(folder, config_json["_class_name"], abstract)


def scaled_latents(folder: Path, images: np.ndarray) -> np.ndarray:
  """The samples as a denoiser sees them: posterior means times scaling_factor, float32."""
  config_json, params = load_vae(folder, images.shape[1:])
  latents = encode_all(network_of(config_json), params, images)
  return latents * config_json["scaling_factor"]

"""What pretrain.py trains: each embedded model as a loss, its batches, initial parameters and how
they are written.

`vae` (autoencoder), `clip` (contrastive), `denoiser` (Stable Diffusion's UNet and text encoder) and
`flow` (FLUX's transformer and both its text encoders). The last two are trained on the
autoencoder's latents, so they need its folder.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dancegrpo_jax import programs
from dancegrpo_jax.checkpoints import weights
from dancegrpo_jax.data import emoji, t5_tokenizer, tokenizer
from dancegrpo_jax.diffusion import schedules
from dancegrpo_jax.models import autoencoder, clip, flux, t5, unet
from dancegrpo_jax.types import PyTree

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # openai's pixel statistics
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Data(NamedTuple):
  """The pretraining split in memory: `images` uint8 [n, size, size, 3], `captions` and their
  `tokens` int32 [n, tokens] for CLIP, `pair` int32 [n]."""

  images: np.ndarray
  captions: list[str]
  tokens: np.ndarray
  pair: np.ndarray


class Stage(NamedTuple):
  """What `fit` needs: initial parameters, `loss(params, batch, key)`, `batch(step)`, and
  `export(params)`.
  """

  name: str
  params: PyTree
  loss: Callable
  batch: Callable
  export: Callable


def to_signed(images: jax.Array) -> jax.Array:
  """uint8 pixels to [-1, 1]."""
  return images.astype(jnp.float32) / 127.5 - 1.0


def vae_stage(config, data: Data, out: Path) -> Stage:
  """AutoencoderKL: absolute error of pixels and of their differences, plus a small KL."""
  stage = config.vae
  network = autoencoder.from_json(stage.network.to_dict())

  def loss(params, batch, key):
    x = to_signed(batch["images"])
    mean, log_variance = network.apply({"params": params}, x, method="encode")
    latents = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
    error = network.apply({"params": params}, latents, method="decode") - x
    pixels = jnp.abs(error).mean()
    # Differences of neighbours: an absolute error alone leaves edges soft.
    edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
    kl = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance).mean()
    return pixels + 0.5 * edges + stage.kl_weight * kl, {"pixels": pixels, "kl": kl}

  def batch(step: int) -> dict:
    rows = np.random.default_rng([config.seed, step]).choice(
      len(data.images), stage.batch, replace=False
    )
    return {"images": data.images[rows]}

  def export(params) -> None:
    latents = encode_all(network, params, data.images)
    config_json = {**stage.network.to_dict(), "scaling_factor": round(float(1 / latents.std()), 5)}
    save_component(out / "emoji-sd" / "vae", config_json, params)

  params = initial(
    network, jax.random.key(config.seed), jnp.zeros((1, config.size, config.size, 3))
  )["params"]
  return Stage("vae", params, loss, batch, export)


def initial(network, key: jax.Array, *inputs: jax.Array) -> dict:
  """`network.init` as one program: layer by layer it would compile hundreds."""
  return programs.compiled(network.init)(key, *inputs)


def encode_all(
  network: autoencoder.AutoencoderKL, params: PyTree, images: np.ndarray, chunk: int = 256
) -> np.ndarray:
  """Posterior means of all images, `[n, h, w, z]`, unscaled."""
  encode = programs.compiled(
    lambda p, x: network.apply({"params": p}, to_signed(x), method="encode")[0]
  )
  chunk = min(chunk, len(images))
  padded = np.concatenate([images, np.zeros((-len(images) % chunk, *images.shape[1:]), np.uint8)])
  rows = [np.asarray(encode(params, padded[i : i + chunk])) for i in range(0, len(padded), chunk)]
  return np.concatenate(rows)[: len(images)]


def clip_stage(config, data: Data, out: Path) -> Stage:
  """CLIP: symmetric contrastive loss over a batch of distinct pairs (arXiv 2103.00020)."""
  stage = config.clip
  ids = token_ids(out / "emoji-sd" / "tokenizer")
  config_json = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": stage.projection_dim,
    "logit_scale_init_value": 2.6592,
    "text_config": {
      **stage.text.to_dict(),
      **ids,
      "model_type": "clip_text_model",
      "projection_dim": stage.projection_dim,
    },
    "vision_config": {
      **stage.vision.to_dict(),
      "model_type": "clip_vision_model",
      "projection_dim": stage.projection_dim,
    },
  }
  network = clip.Clip.from_json(config_json)
  first = np.concatenate([[0], np.flatnonzero(np.diff(data.pair)) + 1])
  variants = len(data.pair) // len(first)

  def loss(params, batch, key):
    noise_key, level_key = jax.random.split(key)
    x = batch["images"].astype(jnp.float32) / 255.0
    level = stage.pixel_noise * jax.random.uniform(level_key, (x.shape[0], 1, 1, 1))
    x = jnp.clip(x + level * jax.random.normal(noise_key, x.shape), 0.0, 1.0)
    x = (x - jnp.array(CLIP_MEAN).reshape(1, 1, 1, 3)) / jnp.array(CLIP_STD).reshape(1, 1, 1, 3)
    text, image, scale = network.apply({"params": params}, batch["tokens"], x)
    logits = jnp.minimum(scale, 100.0) * image @ text.T
    labels = jnp.arange(len(logits))
    value = (
      sum(
        optax.softmax_cross_entropy_with_integer_labels(side, labels).mean()
        for side in (logits, logits.T)
      )
      / 2
    )
    accuracy = (logits.argmax(1) == labels).mean()
    return value, {"accuracy": accuracy, "cosine": jnp.diag(image @ text.T).mean(), "scale": scale}

  def batch(step: int) -> dict:
    rng = np.random.default_rng([config.seed, 1, step])
    rows = rng.choice(first, stage.batch, replace=False) + rng.integers(variants, size=stage.batch)
    return {"images": data.images[rows], "tokens": data.tokens[rows]}

  def export(params) -> None:
    folder = out / "emoji-clip"
    save_component(folder, config_json, params)
    write_json(folder / "preprocessor_config.json", clip_preprocessor(config.size))
    write_tokenizer_files(folder)

  pixels = jnp.zeros((1, config.size, config.size, 3))
  params = initial(network, jax.random.key(config.seed), jnp.asarray(data.tokens[:1]), pixels)[
    "params"
  ]
  return Stage("clip", params, loss, batch, export)


def denoiser_stage(config, data: Data, out: Path) -> Stage:
  """UNet and its text encoder together: mean squared error of the predicted noise (DDPM, arXiv
  2006.11239).
  """
  stage = config.denoiser
  ids = token_ids(out / "emoji-sd" / "tokenizer")
  text_json = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    **stage.text.to_dict(),
    **ids,
  }
  network, text = unet.from_json(stage.network.to_dict()), clip.ClipText.from_json(text_json)
  latents = scaled_latents(out / "emoji-sd" / "vae", data.images)
  empty = tokenizer.load_tokenizer(str(out / "emoji-sd" / "tokenizer"))([""])[0]
  alphas = jnp.asarray(
    schedules.alphas_cumprod(
      **{
        key: stage.scheduler[key]
        for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
      }
    ),
    jnp.float32,
  )

  def loss(params, batch, key):
    time_key, noise_key = jax.random.split(key)
    x0 = batch["latents"]
    # Stratified times: one from each of `batch` equal parts, which lowers the loss's variance.
    part = (jnp.arange(len(x0)) + jax.random.uniform(time_key, (len(x0),))) / len(x0)
    t = (part * len(alphas)).astype(jnp.int32)
    noise = jax.random.normal(noise_key, x0.shape)
    alpha = alphas[t].reshape(-1, 1, 1, 1)
    x = jnp.sqrt(alpha) * x0 + jnp.sqrt(1 - alpha) * noise
    context = text.apply({"params": params["text_encoder"]}, batch["tokens"])[0]
    predicted = network.apply({"params": params["unet"]}, x, t.astype(jnp.float32), context)
    return jnp.square(predicted - noise).mean(), {}

  def batch(step: int) -> dict:
    rng = np.random.default_rng([config.seed, 2, step])
    rows = rng.choice(len(latents), stage.batch, replace=False)
    dropped = rng.uniform(size=(stage.batch, 1)) < stage.caption_dropout
    return {"latents": latents[rows], "tokens": np.where(dropped, empty, data.tokens[rows])}

  def export(params) -> None:
    folder = out / "emoji-sd"
    save_component(folder / "unet", stage.network.to_dict(), params["unet"])
    save_component(folder / "text_encoder", text_json, params["text_encoder"])
    write_json(folder / "scheduler" / "scheduler_config.json", stage.scheduler.to_dict())
    write_json(folder / "model_index.json", model_index())

  keys = jax.random.split(jax.random.key(config.seed))
  context = jnp.zeros((1, config.tokens, stage.text.hidden_size))
  params = {
    "unet": initial(network, keys[0], jnp.asarray(latents[:1]), jnp.zeros((1,)), context)["params"],
    "text_encoder": initial(text, keys[1], jnp.asarray(data.tokens[:1]))["params"],
  }
  return Stage("denoiser", params, loss, batch, export)


def flow_stage(config, data: Data, out: Path) -> Stage:
  """FLUX's transformer and its text encoders together: mean squared error of the velocity
  (rectified flow, arXiv 2209.03003).

  Times are logit-normal, as FLUX's family was trained (arXiv 2403.03206, section 3.1).
  """
  stage, folder = config.flow, out / "emoji-flux"
  write_tokenizer_files(folder / "tokenizer")
  t5_tokenizer.write_t5_tokenizer(all_captions(), str(folder / "tokenizer_2"), stage.text_length)
  ids = token_ids(folder / "tokenizer")
  pooler_json = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    **stage.pooler.to_dict(),
    **ids,
  }
  vocabulary = len(t5_tokenizer.vocabulary(all_captions()))
  text_json = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    **stage.text.to_dict(),
    "vocab_size": vocabulary,
  }
  network, pooler = flux.from_json(stage.network.to_dict()), clip.ClipText.from_json(pooler_json)
  text = t5.from_json(text_json)
  latents = scaled_latents(out / "emoji-sd" / "vae", data.images)
  tokenize = t5_tokenizer.load_t5_tokenizer(str(folder / "tokenizer_2"))
  words = tokenize(data.captions, stage.text_length)

  def loss(params, batch, key):
    time_key, noise_key = jax.random.split(key)
    x0 = batch["latents"]
    # Stratified: one time from each of `batch` equal parts of the distribution, which lowers the
    # loss's variance.
    part = (
      jnp.arange(len(x0)) + jax.random.uniform(time_key, (len(x0),), minval=1e-3, maxval=1 - 1e-3)
    ) / len(x0)
    t = jax.nn.sigmoid(jax.scipy.stats.norm.ppf(part))
    noise = jax.random.normal(noise_key, x0.shape)
    at = t.reshape(-1, 1, 1, 1)
    pooled = pooler.apply({"params": params["text_encoder"]}, batch["tokens"])[1]
    states = text.apply({"params": params["text_encoder_2"]}, batch["words"])
    velocity = network.apply(
      {"params": params["transformer"]}, (1 - at) * x0 + at * noise, 1000 * t, states, pooled
    )
    return jnp.square(velocity - (noise - x0)).mean(), {}

  def batch(step: int) -> dict:
    rows = np.random.default_rng([config.seed, 3, step]).choice(
      len(latents), stage.batch, replace=False
    )
    return {"latents": latents[rows], "tokens": data.tokens[rows], "words": words[rows]}

  def export(params) -> None:
    save_component(folder / "transformer", stage.network.to_dict(), params["transformer"])
    save_component(folder / "text_encoder", pooler_json, params["text_encoder"])
    save_component(folder / "text_encoder_2", text_json, params["text_encoder_2"])
    # FluxPipeline adds shift_factor, which Stable Diffusion's autoencoders don't have.
    vae_json, vae = load_vae(out / "emoji-sd" / "vae", data.images.shape[1:])
    save_component(folder / "vae", {**vae_json, "shift_factor": 0.0}, vae)
    write_json(folder / "scheduler" / "scheduler_config.json", stage.scheduler.to_dict())
    write_json(folder / "model_index.json", flux_index())

  keys = jax.random.split(jax.random.key(config.seed), 3)
  states = jnp.zeros((1, stage.text_length, stage.text.d_model))
  pooled = jnp.zeros((1, stage.pooler.hidden_size))
  params = {
    "transformer": initial(
      network, keys[0], jnp.asarray(latents[:1]), jnp.zeros((1,)), states, pooled
    ),
    "text_encoder": initial(pooler, keys[1], jnp.asarray(data.tokens[:1])),
    "text_encoder_2": initial(text, keys[2], jnp.asarray(words[:1])),
  }
  params = {name: value["params"] for name, value in params.items()}
  params["transformer"] = without_modulation(params["transformer"])
  return Stage("flow", params, loss, batch, export)


def without_modulation(params: PyTree) -> PyTree:
  """FLUX's transformer with every block an identity at first: what makes shifts, scales and gates
  is 0 (adaLN-Zero, arXiv 2212.09748), and so is the last projection."""

  def is_zero(path: tuple) -> bool:
    names = [str(entry.key) for entry in path]
    return (
      names[-2] == "linear"
      and names[-3].startswith("norm")
      or names[-2] == "proj_out"
      and len(names) == 2
    )

  return jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.zeros_like(x) if is_zero(path) else x, params
  )


def token_ids(folder: Path) -> dict:
  """vocab_size and the special ids that the towers' config.json carry, from a tokenizer folder."""
  vocab = json.loads((folder / "vocab.json").read_text())
  eos = vocab[tokenizer.EOS]
  return {
    "vocab_size": len(vocab),
    "bos_token_id": vocab[tokenizer.BOS],
    "eos_token_id": eos,
    "pad_token_id": eos,
  }


def load_vae(folder: Path, shape: tuple[int, ...]) -> tuple[dict, PyTree]:
  """config.json and parameters of an autoencoder's folder; `shape` is that of a picture."""
  config_json = weights.read_config(folder)
  network = autoencoder.from_json(config_json)
  abstract = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *shape)))["params"]
  return config_json, weights.load(folder, "AutoencoderKL", abstract)


def scaled_latents(folder: Path, images: np.ndarray) -> np.ndarray:
  """The data set as the denoiser sees it: posterior means times scaling_factor, float32."""
  config_json, params = load_vae(folder, images.shape[1:])
  return (
    encode_all(autoencoder.from_json(config_json), params, images) * config_json["scaling_factor"]
  )


def save_component(folder: Path, config_json: dict, params: PyTree) -> None:
  """One network's folder, float16: half the size, and 1e-3 relative changes nothing that a sample
  shows.
  """
  name = config_json.get("_class_name") or config_json["architectures"][0]
  weights.save(folder, name, params, config_json, dtype=np.float16)


def write_json(path: Path, value: dict) -> None:
  """A JSON file and the folder above it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def all_captions() -> list[str]:
  """Of every pair, held-out ones too."""
  return [emoji.caption(name, colour) for name in emoji.NAMES for colour in emoji.COLOURS]


def write_tokenizer_files(folder: Path) -> None:
  """The captions' tokenizer: the same vocabulary for the text encoder and for CLIP."""
  tokenizer.write_tokenizer(all_captions(), str(folder))


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


def model_index() -> dict:
  """model_index.json of the Stable Diffusion folder."""
  return {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
  }


def flux_index() -> dict:
  """model_index.json of the FLUX folder."""
  return {
    "_class_name": "FluxPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
  }


STAGES = {"vae": vae_stage, "clip": clip_stage, "denoiser": denoiser_stage, "flow": flow_stage}

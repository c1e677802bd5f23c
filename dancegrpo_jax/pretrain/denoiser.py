"""Pretrains Stable Diffusion's UNet together with its text encoder."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dancegrpo_jax.data import tokenizer
from dancegrpo_jax.diffusion import schedules
from dancegrpo_jax.models import clip, unet
from dancegrpo_jax.pretrain import shared, vae
from dancegrpo_jax.pretrain.shared import Data, Stage


def denoiser_stage(config: ConfigDict, data: Data, out: Path) -> Stage:
  """UNet and text encoder: the mean squared error of the predicted noise (DDPM, arXiv 2006.11239).

  Args:
    config: of pretraining.
    data: the training split.
    out: the folder of the models; emoji-sd/vae is read, and the rest of emoji-sd is written.
  """
  stage, folder = config.denoiser, out / "emoji-sd"
  text_json = shared.text_encoder_json(stage.text, folder / "tokenizer")
  network, text = unet.from_json(stage.network.to_dict()), clip.ClipText.from_json(text_json)
  latents = vae.scaled_latents(folder / "vae", data.images)
  empty = tokenizer.load_tokenizer(str(folder / "tokenizer"))([""])[0]
  alphas = _alphas_cumprod(stage.scheduler)

  def loss(params, batch, key):
    time_key, noise_key = jax.random.split(key)
    x0 = batch["latents"]
    t = (shared.stratified(time_key, len(x0)) * len(alphas)).astype(jnp.int32)
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
    shared.save_component(folder / "unet", stage.network.to_dict(), params["unet"])
    shared.save_component(folder / "text_encoder", text_json, params["text_encoder"])
    shared.write_json(folder / "scheduler" / "scheduler_config.json", stage.scheduler.to_dict())
    shared.write_json(folder / "model_index.json", model_index())

  unet_key, text_key = jax.random.split(jax.random.key(config.seed))
  latent, time = jnp.asarray(latents[:1]), jnp.zeros((1,))
  context = jnp.zeros((1, config.tokens, stage.text.hidden_size))
  params = {
    "unet": shared.initial(network, unet_key, latent, time, context)["params"],
    "text_encoder": shared.initial(text, text_key, jnp.asarray(data.tokens[:1]))["params"],
  }
  return Stage(name="denoiser", params=params, loss=loss, batch=batch, export=export)


def _alphas_cumprod(scheduler: ConfigDict) -> jax.Array:
  """The share of signal, alpha-bar, at every training step of a scheduler."""
  fields = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
  return jnp.asarray(
    schedules.alphas_cumprod(**{field: scheduler[field] for field in fields}), jnp.float32
  )


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

"""Stable Diffusion 1.x and 2.x: CLIP text encoder, UNet, AutoencoderKL, in diffusers' folder
layout.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dancegrpo_jax.conversion.tables import stable_diffusion as tables
from dancegrpo_jax.diffusion import schedules
from dancegrpo_jax.models import autoencoder, clip, unet
from dancegrpo_jax.models.lora import variables
from dancegrpo_jax.pipelines import networks
from dancegrpo_jax.pipelines.base import (
  Family,
  ModelSettings,
  Pipeline,
  adapted,
  text_inputs,
)
from dancegrpo_jax.pipelines.layout import INDEX, Component, Network
from dancegrpo_jax.pipelines.networks import abstract
from dancegrpo_jax.types import Media, PyTree

FILES = {
  "unet": "unet/config.json",
  "vae": "vae/config.json",
  "text_encoder": "text_encoder/config.json",
  "scheduler": "scheduler/scheduler_config.json",
}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


def build(
  jsons: dict[str, dict],
  tokenizers: dict[str, Callable[[list[str]], np.ndarray]],
  settings: ModelSettings,
) -> Pipeline:
  """The pipeline of a checkpoint's JSON files.

  Args:
    jsons: parsed files, by the keys of `FILES`.
    tokenizers: by folder name, texts -> ids `[n, tokens]`.
    settings: `scan_blocks` stacks the layers of the text encoder.

  Raises:
    ValueError: a size that the autoencoder does not divide, adapters of nothing, or a config.json
      that asks for what is not implemented.
  """
  frozen = jnp.dtype(settings.frozen_dtype)
  denoiser = unet.from_json(
    jsons["unet"],
    dtype=jnp.dtype(settings.dtype),
    param_dtype=settings.stored,
    remat=settings.remat,
    impl=settings.attention,
  )
  vae = autoencoder.from_json(jsons["vae"], dtype=frozen, param_dtype=frozen)
  text = clip.ClipText.from_json(
    jsons["text_encoder"],
    dtype=frozen,
    param_dtype=frozen,
    scan_layers=settings.scan_blocks,
    impl=settings.attention,
  )
  size = tuple(settings.size)
  scheduler = jsons["scheduler"]
  factor = 2 ** (len(vae.block_out_channels) - 1)
  multiple = factor * 2 ** (len(denoiser.block_out_channels) - 1)
  if any(side % multiple for side in size):
    raise ValueError(
      f"config.model.size = {size}: height and width must be multiples of {multiple} for"
      " this checkpoint"
    )
  if scheduler.get("prediction_type", "epsilon") not in _PREDICTIONS:
    raise ValueError(
      f"scheduler: prediction_type {scheduler['prediction_type']!r} is not one of"
      f" {', '.join(_PREDICTIONS)}"
    )
  latent_shape = (size[0] // factor, size[1] // factor, vae.latent_channels)

  def encode(params: PyTree, tokens: Int[Array, "n t"]) -> Float[Array, "n t d"]:
    return text.apply({"params": params["text_encoder"]}, tokens)[0]

  def denoise(
    params: PyTree, x: Float[Array, "b h w c"], time: Float[Array, "b"], rows: Float[Array, "b t d"]
  ) -> Array:
    return denoiser.apply(variables(params, settings.lora), x, time, rows)

  def decode(params: PyTree, latents: Float[Array, "b h w c"]) -> Media:
    return Media(autoencoder.pixels_of(vae, params["decoder"], latents))

  def schedule(steps: int, shift: float) -> schedules.Schedule:
    del shift  # rectified flow's
    return schedules.diffusion_schedule(
      steps,
      num_train_timesteps=scheduler["num_train_timesteps"],
      beta_start=scheduler["beta_start"],
      beta_end=scheduler["beta_end"],
      beta_schedule=scheduler["beta_schedule"],
      spacing=scheduler.get("timestep_spacing", "leading"),
      steps_offset=scheduler.get("steps_offset", 0),
      set_alpha_to_one=scheduler.get("set_alpha_to_one", True),
    )

  base = Pipeline(
    prepare=text_inputs(tokenizers["tokenizer"]),
    encode=encode,
    denoise=denoise,
    decode=decode,
    schedule=schedule,
    prediction=_PREDICTIONS[scheduler.get("prediction_type", "epsilon")],
    latent_shape=latent_shape,
    sample_shape=(*size, vae.out_channels),
    components=_components(denoiser, vae, text, latent_shape),
  )
  return adapted(base, settings.lora)


def _components(denoiser, vae, text, latent_shape: tuple[int, ...]) -> dict[str, Component]:
  """What to load, with shapes from the networks themselves."""
  length = text.max_position_embeddings
  pixels = (1, 8 * latent_shape[0], 8 * latent_shape[1], vae.in_channels)
  return {
    "denoiser": Component(
      folder="unet",
      table=tables.UNET,
      abstract=abstract(denoiser, (1, *latent_shape), (1,), (1, length, text.hidden_size)),
    ),
    "decoder": Component(folder="vae", table=tables.AUTOENCODER, abstract=abstract(vae, pixels)),
    "text_encoder": Component(
      folder="text_encoder",
      table=networks.CLIP_TEXT.table,
      abstract=abstract(text, (1, length), dtype=jnp.int32),
    ),
  }


def _unet(config: dict) -> PyTree:
  network = unet.from_json(config)
  latents = (1, 64, 64, network.in_channels)
  return abstract(network, latents, (1,), (1, 1, network.cross_attention_dim))


FAMILY = Family(
  files=FILES,
  tokenizers={"tokenizer": "clip"},
  paradigm="diffusion",
  build=build,
  networks={
    "UNet2DConditionModel": Network(table=tables.UNET, abstract=_unet),
    "AutoencoderKL": networks.AUTOENCODER,
    "CLIPTextModel": networks.CLIP_TEXT,
  },
  text_length=lambda jsons: jsons["text_encoder"].get("max_position_embeddings", 77),
  index=INDEX,
)

"""Stable Diffusion 1.x and 2.x: CLIP's text encoder, UNet and AutoencoderKL, in the layout of
diffusers' folders.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dancegrpo_jax.conversion.tables import stable_diffusion as tables
from dancegrpo_jax.diffusion import schedules
from dancegrpo_jax.models import autoencoder, clip, unet
from dancegrpo_jax.models.lora import Lora, variables
from dancegrpo_jax.pipelines.base import (
  Family,
  ModelSettings,
  Pipeline,
  adapted,
  text_inputs,
)
from dancegrpo_jax.pipelines.layout import INDEX, Component, Network
from dancegrpo_jax.pipelines.networks import (
  AUTOENCODER,
  CLIP_TEXT,
  abstract,
  decode_images,
  latent_shape,
)
from dancegrpo_jax.types import PyTree

FILES = {
  "unet": "unet/config.json",
  "vae": "vae/config.json",
  "text_encoder": "text_encoder/config.json",
  "scheduler": "scheduler/scheduler_config.json",
}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


class Networks(NamedTuple):
  """The networks of a checkpoint, by the names of the components that hold their parameters."""

  denoiser: unet.UNet2DConditionModel
  decoder: autoencoder.AutoencoderKL
  text_encoder: clip.ClipText


def build(
  jsons: dict[str, dict],
  tokenizers: dict[str, Callable[[list[str]], np.ndarray]],
  settings: ModelSettings,
) -> Pipeline:
  """The pipeline of a checkpoint's JSON files.

  Args:
    jsons: the parsed files, by the keys of `FILES`.
    tokenizers: functions from texts to ids `[n, tokens]`, by folder.
    settings: `scan_blocks` stacks the layers of the text encoder.

  Raises:
    ValueError: the height or width doesn't fit the networks, the adapters match no layer, or a
      config.json has a value that is not implemented.
  """
  networks = _networks(jsons, settings)
  halvings = len(networks.denoiser.block_out_channels) - 1
  latents = latent_shape(networks.decoder, settings.size, multiple=2**halvings)
  pipeline = Pipeline(
    prepare=text_inputs(tokenizers["tokenizer"]),
    encode=partial(_encode, networks.text_encoder),
    denoise=partial(_denoise, networks.denoiser, settings.lora),
    decode=partial(decode_images, networks.decoder),
    schedule=partial(_schedule, jsons["scheduler"]),
    prediction=_prediction(jsons["scheduler"]),
    latent_shape=latents,
    sample_shape=(*settings.size, networks.decoder.out_channels),
    components=_components(networks, latents, settings.size),
  )
  return adapted(pipeline, settings.lora)


def _networks(jsons: dict[str, dict], settings: ModelSettings) -> Networks:
  """The networks that the JSON files describe."""
  frozen = jnp.dtype(settings.frozen_dtype)
  types = {"dtype": frozen, "param_dtype": frozen}
  return Networks(
    denoiser=unet.from_json(
      jsons["unet"],
      dtype=jnp.dtype(settings.dtype),
      param_dtype=settings.stored,
      remat=settings.remat,
      impl=settings.attention,
    ),
    decoder=autoencoder.from_json(jsons["vae"], **types),
    text_encoder=clip.ClipText.from_json(
      jsons["text_encoder"], scan_layers=settings.scan_blocks, impl=settings.attention, **types
    ),
  )


def _prediction(scheduler: dict) -> str:
  """What the denoiser predicts, as `Pipeline.prediction` names it."""
  kind = scheduler.get("prediction_type", "epsilon")
  if kind not in _PREDICTIONS:
    raise ValueError(f"scheduler: prediction_type {kind!r} is not one of {', '.join(_PREDICTIONS)}")
  return _PREDICTIONS[kind]


def _encode(
  text_encoder: clip.ClipText, params: PyTree, tokens: Int[Array, "n t"]
) -> Float[Array, "n t d"]:
  """The text states."""
  return text_encoder.apply({"params": params["text_encoder"]}, tokens)[0]


def _denoise(
  denoiser: unet.UNet2DConditionModel,
  lora: Lora | None,
  params: PyTree,
  x: Float[Array, "b h w c"],
  time: Float[Array, "b"],
  rows: Float[Array, "b t d"],
) -> Float[Array, "b h w c"]:
  """The prediction; `rows` are the text states."""
  return denoiser.apply(variables(params, lora), x, time, rows)


def _schedule(scheduler: dict, steps: int, shift: float) -> schedules.Schedule:
  """The schedule of the scheduler's config."""
  del shift  # for rectified flow only
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


def _components(
  networks: Networks, latents: tuple[int, ...], size: tuple[int, int]
) -> dict[str, Component]:
  """The weights to load, with the shapes of the networks' parameters."""
  denoiser, vae, text_encoder = networks
  length = text_encoder.max_position_embeddings
  return {
    "denoiser": Component(
      folder="unet",
      table=tables.UNET,
      abstract=abstract(denoiser, (1, *latents), (1,), (1, length, text_encoder.hidden_size)),
    ),
    "decoder": Component(
      folder="vae",
      table=AUTOENCODER.table,
      abstract=abstract(vae, (1, *size, vae.in_channels)),
    ),
    "text_encoder": Component(
      folder="text_encoder",
      table=CLIP_TEXT.table,
      abstract=abstract(text_encoder, (1, length), dtype=jnp.int32),
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
    "AutoencoderKL": AUTOENCODER,
    "CLIPTextModel": CLIP_TEXT,
  },
  text_length=lambda jsons: jsons["text_encoder"].get("max_position_embeddings", 77),
  index_file=INDEX,
)

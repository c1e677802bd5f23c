"""Stable Diffusion 1.x and 2.x: CLIP's text encoder, UNet and AutoencoderKL, in the layout of
diffusers' folders.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from dancegrpo_jax import published
from dancegrpo_jax.conversion.tables import stable_diffusion as tables
from dancegrpo_jax.diffusion import schedules
from dancegrpo_jax.models import autoencoder, clip, unet
from dancegrpo_jax.models.lora import Lora, variables
from dancegrpo_jax.pipelines.base import (
  DiffusersCall,
  Family,
  ModelSettings,
  Pipeline,
  adapted,
  image_arguments,
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
_SOLVER = "how a step is taken is the config's sampler"
# The grid is that of diffusers' DDIMScheduler, and so are the defaults. The file may be of another
# class with the same chain, as PNDMScheduler or EulerDiscreteScheduler.
SCHEDULER = published.Keys(
  used={
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "rescale_betas_zero_snr": False,
  },
  neutral={
    "trained_betas": (None,),
    "thresholding": (False,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "final_sigmas_type": ("zero",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "shift_terminal": (None,),
    "variance_type": (None, "fixed_small", "fixed_large", "fixed_small_log", "fixed_large_log"),
  },
  harmless={
    "clip_sample": "diffusers' pipeline switches it off for latents",
    "clip_sample_range": "of clip_sample",
    "sample_max_value": "of thresholding",
    "dynamic_thresholding_ratio": "of thresholding",
    "flow_shift": "of use_flow_sigmas",
    "time_shift_type": "of use_dynamic_shifting",
    "lambda_min_clipped": "of DPM-Solver with a learned variance",
    "original_inference_steps": "of LCM's own grid, which distilled checkpoints sample with",
    "timestep_scaling": "of LCM's boundary condition, which DDIM does not have",
  }
  | dict.fromkeys(
    (
      "skip_prk_steps",
      "solver_order",
      "solver_type",
      "solver_p",
      "algorithm_type",
      "lower_order_final",
      "euler_at_final",
      "predict_x0",
      "disable_corrector",
    ),
    _SOLVER,
  ),
)


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
  networks, scheduler = _networks(jsons, settings), read_scheduler(jsons["scheduler"])
  halvings = len(networks.denoiser.block_out_channels) - 1
  latents = latent_shape(networks.decoder, settings.size, multiple=2**halvings)
  pipeline = Pipeline(
    prepare=text_inputs(tokenizers["tokenizer"]),
    encode=partial(_encode, networks.text_encoder),
    denoise=partial(_denoise, networks.denoiser, settings.lora),
    decode=partial(decode_images, networks.decoder),
    schedule=partial(_schedule, scheduler),
    prediction=_PREDICTIONS[scheduler["prediction_type"]],
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


def read_scheduler(given: dict) -> dict:
  """The values of a scheduler_config.json that the grid is made of.

  Raises:
    ValueError: a key or a value that is not implemented.
  """
  file = FILES["scheduler"]
  scheduler = published.read(file, given, SCHEDULER)
  kind = scheduler["prediction_type"]
  if kind not in _PREDICTIONS:
    raise ValueError(f"{file}: prediction_type {kind!r} is not one of {', '.join(_PREDICTIONS)}")
  if scheduler["rescale_betas_zero_snr"] and kind == "epsilon":
    raise ValueError(
      f"{file}: rescale_betas_zero_snr needs prediction_type 'v_prediction': the first step starts"
      " from pure noise, in which an epsilon network sees no sample"
    )
  if scheduler["_class_name"].startswith("FlowMatch"):
    raise ValueError(
      f"{file}: {scheduler['_class_name']} is of a rectified-flow model, which this family is not"
    )
  return scheduler


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
  """The schedule of a scheduler that `read_scheduler` has read."""
  del shift  # for rectified flow only
  return schedules.diffusion_schedule(
    steps,
    num_train_timesteps=scheduler["num_train_timesteps"],
    beta_start=scheduler["beta_start"],
    beta_end=scheduler["beta_end"],
    beta_schedule=scheduler["beta_schedule"],
    spacing=scheduler["timestep_spacing"],
    steps_offset=scheduler["steps_offset"],
    set_alpha_to_one=scheduler["set_alpha_to_one"],
    rescale_betas_zero_snr=scheduler["rescale_betas_zero_snr"],
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


def _diffusers_call(config: ConfigDict, tokenizers: dict[str, Callable]) -> DiffusersCall:
  """DDIM with eta 0 is the deterministic sampler of evaluations."""
  del tokenizers
  return DiffusersCall(
    scheduler="DDIMScheduler.from_config(pipeline.scheduler.config)",
    arguments=image_arguments(config) | {"guidance_scale": config.sampler.guidance_scale},
  )


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
  diffusers_call=_diffusers_call,
  pipelines=("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
)

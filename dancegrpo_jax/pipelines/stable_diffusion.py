"""Stable Diffusion 1.x and 2.x: CLIP text encoder, UNet, AutoencoderKL, in diffusers' folder
layout.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dancegrpo_jax.diffusion import schedules
from dancegrpo_jax.models import autoencoder, clip, unet
from dancegrpo_jax.models.lora import Lora, variables
from dancegrpo_jax.pipelines.base import Component, Pipeline, adapted
from dancegrpo_jax.types import PyTree

FILES = {
  "unet": "unet/config.json",
  "vae": "vae/config.json",
  "text_encoder": "text_encoder/config.json",
  "scheduler": "scheduler/scheduler_config.json",
}
TOKENIZERS = ("tokenizer",)
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


def build(
  jsons: dict[str, dict],
  tokenize: dict[str, Callable[[list[str]], np.ndarray]],
  *,
  size: tuple[int, int],
  dtype: str,
  frozen_dtype: str,
  remat: bool,
  attention: str,
  scan_blocks: bool = False,
  lora: Lora | None = None,
) -> Pipeline:
  """The pipeline of a checkpoint's JSON files (those of `FILES`).

  Args:
    jsons: parsed files, by the keys of `FILES`.
    tokenize: by folder name (`TOKENIZERS`), texts -> ids `[n, tokens]`.
    size: height and width of the samples, pixels.
    dtype: what the UNet computes in; its parameters are float32 where they are trained.
    frozen_dtype: of the text encoder and the autoencoder, stored and computed; under adapters the
      UNet's parameters too.
    remat: recompute the UNet's blocks in the backward pass.
    attention: see `models.attention.attention`.
    scan_blocks: stack the layers of the text encoder.
    lora: adapters to train in place of the UNet's parameters.

  Raises:
    ValueError: a size that the autoencoder does not divide, adapters of nothing, or a config.json
      that asks for what is not implemented.
  """
  frozen = jnp.dtype(frozen_dtype)
  stored = frozen if lora else jnp.dtype("float32")
  denoiser = unet.from_json(
    jsons["unet"], dtype=jnp.dtype(dtype), param_dtype=stored, remat=remat, impl=attention
  )
  vae = autoencoder.from_json(jsons["vae"], dtype=frozen, param_dtype=frozen)
  text = clip.ClipText.from_json(
    jsons["text_encoder"], dtype=frozen, param_dtype=frozen, scan_layers=scan_blocks, impl=attention
  )
  scheduler = jsons["scheduler"]
  factor = 2 ** (len(vae.block_out_channels) - 1)
  multiple = factor * 2 ** (len(denoiser.block_out_channels) - 1)
  if any(side % multiple for side in size):
    raise ValueError(
      f"config.model.size = {tuple(size)}: height and width must be multiples of {multiple} for"
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
    return denoiser.apply(variables(params, lora), x, time, rows)

  def decode(params: PyTree, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
    return autoencoder.pixels_of(vae, params["decoder"], latents)

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
    tokenize=tokenize["tokenizer"],
    encode=encode,
    denoise=denoise,
    decode=decode,
    schedule=schedule,
    prediction=_PREDICTIONS[scheduler.get("prediction_type", "epsilon")],
    latent_shape=latent_shape,
    components=_components(denoiser, vae, text, latent_shape),
  )
  return adapted(base, lora)


def _components(denoiser, vae, text, latent_shape: tuple[int, ...]) -> dict[str, Component]:
  """What to load, with shapes from the networks themselves."""
  key = jax.random.key(0)
  latents = jax.ShapeDtypeStruct((1, *latent_shape), jnp.float32)
  tokens = jax.ShapeDtypeStruct((1, text.max_position_embeddings), jnp.int32)
  rows = jax.ShapeDtypeStruct((1, text.max_position_embeddings, text.hidden_size), jnp.float32)
  time = jax.ShapeDtypeStruct((1,), jnp.float32)
  pixels = jax.ShapeDtypeStruct(
    (1, 8 * latent_shape[0], 8 * latent_shape[1], vae.in_channels), jnp.float32
  )
  return {
    "denoiser": Component(
      "unet",
      "UNet2DConditionModel",
      jax.eval_shape(denoiser.init, key, latents, time, rows)["params"],
    ),
    "decoder": Component("vae", "AutoencoderKL", jax.eval_shape(vae.init, key, pixels)["params"]),
    "text_encoder": Component(
      "text_encoder", "CLIPTextModel", jax.eval_shape(text.init, key, tokens)["params"]
    ),
  }

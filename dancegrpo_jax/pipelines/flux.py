"""FLUX.1: CLIP's pooled text, T5's states, FluxTransformer2DModel, AutoencoderKL, in diffusers'
folder layout.

Latents are `[h / 8, w / 8, 16]`; the network packs them. A guidance-distilled checkpoint (dev) is
told one guidance scale in rollout and training alike, so there is one forward pass a step; schnell
has none.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dancegrpo_jax.conversion.tables import flux as tables
from dancegrpo_jax.diffusion import schedules
from dancegrpo_jax.models import autoencoder, clip, t5
from dancegrpo_jax.models import flux as transformer
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
  "transformer": "transformer/config.json",
  "vae": "vae/config.json",
  "text_encoder": "text_encoder/config.json",
  "text_encoder_2": "text_encoder_2/config.json",
  "scheduler": "scheduler/scheduler_config.json",
}
# keys of the scheduler's config that would change the grid, with the values under which they don't
_NEUTRAL = {
  "shift_terminal": None,
  "invert_sigmas": False,
  "use_karras_sigmas": False,
  "use_exponential_sigmas": False,
  "use_beta_sigmas": False,
  "stochastic_sampling": False,
}


def build(
  jsons: dict[str, dict],
  tokenizers: dict[str, Callable[..., np.ndarray]],
  settings: ModelSettings,
  *,
  text_length: int,
  guidance: float,
) -> Pipeline:
  """The pipeline of a checkpoint's JSON files.

  Args:
    jsons: parsed files, by the keys of `FILES`.
    tokenizers: by folder name, texts -> ids; T5's takes the number of tokens too.
    settings: `scan_blocks` stacks the blocks of the transformer, of T5 and of CLIP's text encoder.
    text_length: of T5's tokens.
    guidance: what a guidance-distilled transformer is told.

  Raises:
    ValueError: a size that does not divide, a dtype that T5 does not stand, networks that don't fit
      each other, adapters of nothing, or a config.json that asks for what is not implemented.
  """
  if settings.frozen_dtype == "float16":
    raise ValueError(
      "config.model.frozen_dtype = 'float16': T5's activations overflow it; use 'bfloat16' or"
      " 'float32'"
    )
  frozen = jnp.dtype(settings.frozen_dtype)
  dtypes = {"dtype": frozen, "param_dtype": frozen}
  denoiser = transformer.from_json(
    jsons["transformer"],
    dtype=jnp.dtype(settings.dtype),
    param_dtype=settings.stored,
    scan_blocks=settings.scan_blocks,
    remat=settings.remat,
    impl=settings.attention,
  )
  vae = autoencoder.from_json(jsons["vae"], **dtypes)
  pooler = clip.ClipText.from_json(
    jsons["text_encoder"], **dtypes, scan_layers=settings.scan_blocks, impl=settings.attention
  )
  encoder = t5.from_json(jsons["text_encoder_2"], **dtypes, scan_blocks=settings.scan_blocks)
  size = tuple(settings.size)
  _check_widths(denoiser, vae, pooler, encoder)
  factor = 2 ** (len(vae.block_out_channels) - 1)
  if any(side % (2 * factor) for side in size):
    raise ValueError(
      f"config.model.size = {size}: height and width must be multiples of {2 * factor}"
      " for this checkpoint"
    )
  latent_shape = (size[0] // factor, size[1] // factor, vae.latent_channels)
  own_shift = scheduler_shift(jsons["scheduler"], latent_shape[0] // 2 * (latent_shape[1] // 2))

  def both_tokenizers(texts: list[str]) -> dict[str, np.ndarray]:
    return {
      "clip": tokenizers["tokenizer"](texts),
      "t5": tokenizers["tokenizer_2"](texts, text_length),
    }

  def encode(params: PyTree, tokens: dict[str, Array]) -> dict[str, Array]:
    pooled = pooler.apply({"params": params["text_encoder"]}, tokens["clip"])[1]
    return {
      "text": encoder.apply({"params": params["text_encoder_2"]}, tokens["t5"]),
      "pooled": pooled,
    }

  def denoise(
    params: PyTree, x: Float[Array, "b h w c"], time: Float[Array, "b"], rows: dict[str, Array]
  ) -> Array:
    told = jnp.full(time.shape, guidance, jnp.float32) if denoiser.guidance_embeds else None
    return denoiser.apply(
      variables(params, settings.lora), x, time, rows["text"], rows["pooled"], told
    )

  def decode(params: PyTree, latents: Float[Array, "b h w c"]) -> Media:
    return Media(autoencoder.pixels_of(vae, params["decoder"], latents))

  def schedule(steps: int, shift: float) -> schedules.Schedule:
    return schedules.flow_schedule(
      steps, shift or own_shift, jsons["scheduler"].get("num_train_timesteps", 1000)
    )

  base = Pipeline(
    prepare=text_inputs(both_tokenizers),
    encode=encode,
    denoise=denoise,
    decode=decode,
    schedule=schedule,
    prediction="velocity",
    latent_shape=latent_shape,
    sample_shape=(*size, vae.out_channels),
    components=_components(denoiser, vae, pooler, encoder, latent_shape, size),
    encoders=("text_encoder", "text_encoder_2"),
  )
  return adapted(base, settings.lora)


def scheduler_shift(config: dict, tokens: int) -> float:
  """The time shift of a FlowMatchEulerDiscreteScheduler's config for samples of this many tokens:
  dynamic, or constant.

  Raises:
    ValueError: a key asks for another kind of grid.
  """
  wrong = [
    f"{key} = {config[key]!r}" for key, value in _NEUTRAL.items() if config.get(key, value) != value
  ]
  if wrong:
    raise ValueError(f"scheduler: {', '.join(wrong)} is not implemented")
  if not config.get("use_dynamic_shifting", False):
    return config.get("shift", 1.0)
  return schedules.resolution_shift(
    tokens,
    base_tokens=config.get("base_image_seq_len", 256),
    max_tokens=config.get("max_image_seq_len", 4096),
    base_shift=config.get("base_shift", 0.5),
    max_shift=config.get("max_shift", 1.15),
    kind=config.get("time_shift_type", "exponential"),
  )


def _check_widths(denoiser, vae, pooler, encoder) -> None:
  """ValueError where the networks of a folder don't belong together."""
  pairs = (
    (
      "in_channels / 4",
      denoiser.in_channels // 4,
      "the autoencoder's latent_channels",
      vae.latent_channels,
    ),
    ("joint_attention_dim", denoiser.joint_attention_dim, "T5's d_model", encoder.d_model),
    (
      "pooled_projection_dim",
      denoiser.pooled_projection_dim,
      "CLIP's hidden_size",
      pooler.hidden_size,
    ),
  )
  wrong = [
    f"{name} {value} is not {other} {theirs}"
    for name, value, other, theirs in pairs
    if value != theirs
  ]
  if wrong:
    raise ValueError(f"transformer/config.json: {'; '.join(wrong)}")


def _components(
  denoiser, vae, pooler, encoder, latent_shape: tuple[int, ...], size: tuple[int, int]
) -> dict[str, Component]:
  """What to load, with shapes from the networks themselves."""
  return {
    "denoiser": Component(
      folder="transformer", table=tables.FLUX, abstract=_abstract(denoiser, latent_shape)
    ),
    "decoder": Component(
      folder="vae",
      table=networks.AUTOENCODER.table,
      abstract=abstract(vae, (1, *size, vae.in_channels)),
    ),
    "text_encoder": Component(
      folder="text_encoder",
      table=networks.CLIP_TEXT.table,
      abstract=abstract(pooler, (1, 1), dtype=jnp.int32),
    ),
    "text_encoder_2": Component(
      folder="text_encoder_2",
      table=networks.T5.table,
      abstract=abstract(encoder, (1, 1), dtype=jnp.int32),
    ),
  }


def _abstract(denoiser, latent_shape: tuple[int, ...]) -> PyTree:
  """Shapes and dtypes of a transformer's parameters."""
  shapes = [
    (1, *latent_shape),
    (1,),
    (1, 1, denoiser.joint_attention_dim),
    (1, denoiser.pooled_projection_dim),
  ]
  if denoiser.guidance_embeds:
    shapes.append((1,))
  return abstract(denoiser, *shapes)


def _transformer(config: dict) -> PyTree:
  network = transformer.from_json(config)
  return _abstract(network, (2, 2, network.in_channels // 4))


FAMILY = Family(
  files=FILES,
  tokenizers={"tokenizer": "clip", "tokenizer_2": "t5"},
  paradigm="flow",
  build=build,
  networks={
    "FluxTransformer2DModel": Network(table=tables.FLUX, abstract=_transformer),
    "AutoencoderKL": networks.AUTOENCODER,
    "CLIPTextModel": networks.CLIP_TEXT,
    "T5EncoderModel": networks.T5,
  },
  options=lambda config: {
    "text_length": config.model.text_length,
    "guidance": config.sampler.embedded_guidance,
  },
  text_length=lambda jsons: jsons["text_encoder"].get("max_position_embeddings", 77),
  index=INDEX,
)

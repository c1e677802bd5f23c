"""FLUX.1: CLIP's pooled text, T5's states, FluxTransformer2DModel and AutoencoderKL, in the layout
of diffusers' folders.

Latents are `[h / 8, w / 8, 16]`; the network packs them. A guidance-distilled checkpoint (dev) gets
one guidance scale as an input, in rollout and training alike, so there is one forward pass a step.
schnell has no such input.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dancegrpo_jax.conversion.tables import flux as tables
from dancegrpo_jax.models import autoencoder, clip, t5
from dancegrpo_jax.models import flux as transformer
from dancegrpo_jax.models.lora import Lora, variables
from dancegrpo_jax.pipelines import flow_match
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
  T5,
  abstract,
  decode_images,
  latent_shape,
)
from dancegrpo_jax.types import PyTree

FILES = {
  "transformer": "transformer/config.json",
  "vae": "vae/config.json",
  "text_encoder": "text_encoder/config.json",
  "text_encoder_2": "text_encoder_2/config.json",
  "scheduler": flow_match.FILE,
}


class Networks(NamedTuple):
  """The networks of a checkpoint, by the names of the components that hold their parameters."""

  denoiser: transformer.FluxTransformer2DModel
  decoder: autoencoder.AutoencoderKL
  text_encoder: clip.ClipText
  text_encoder_2: t5.T5Encoder


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
    jsons: the parsed files, by the keys of `FILES`.
    tokenizers: functions from texts to ids, by folder; T5's takes the number of tokens too.
    settings: `scan_blocks` stacks the blocks of the transformer, of T5 and of CLIP's text encoder.
    text_length: the number of T5's tokens.
    guidance: the guidance scale that a guidance-distilled transformer gets as an input.

  Raises:
    ValueError: the height or width doesn't fit the networks, T5 overflows in the dtype, the
      networks don't fit each other, the adapters match no layer, or a config.json has a value that
      is not implemented.
  """
  networks = _networks(jsons, settings)
  _check_widths(networks)
  latents = latent_shape(networks.decoder, settings.size, multiple=2)
  scheduler = flow_match.read_scheduler(jsons["scheduler"])
  shift = flow_match.scheduler_shift(scheduler, tokens=latents[0] // 2 * (latents[1] // 2))
  pipeline = Pipeline(
    prepare=text_inputs(partial(_tokenize, tokenizers, text_length)),
    encode=partial(_encode, networks),
    denoise=partial(_denoise, networks.denoiser, settings.lora, guidance),
    decode=partial(decode_images, networks.decoder),
    schedule=partial(flow_match.schedule, scheduler, shift),
    prediction="velocity",
    latent_shape=latents,
    sample_shape=(*settings.size, networks.decoder.out_channels),
    components=_components(networks, latents, settings.size),
    encoders=("text_encoder", "text_encoder_2"),
  )
  return adapted(pipeline, settings.lora)


def _networks(jsons: dict[str, dict], settings: ModelSettings) -> Networks:
  """The networks that the JSON files describe."""
  if settings.frozen_dtype == "float16":
    raise ValueError(
      "config.model.frozen_dtype = 'float16': T5's activations overflow it; use 'bfloat16' or"
      " 'float32'"
    )
  frozen = jnp.dtype(settings.frozen_dtype)
  types = {"dtype": frozen, "param_dtype": frozen}
  return Networks(
    denoiser=transformer.from_json(
      jsons["transformer"],
      dtype=jnp.dtype(settings.dtype),
      param_dtype=settings.stored,
      scan_blocks=settings.scan_blocks,
      remat=settings.remat,
      impl=settings.attention,
    ),
    decoder=autoencoder.from_json(jsons["vae"], **types),
    text_encoder=clip.ClipText.from_json(
      jsons["text_encoder"], scan_layers=settings.scan_blocks, impl=settings.attention, **types
    ),
    text_encoder_2=t5.from_json(jsons["text_encoder_2"], scan_blocks=settings.scan_blocks, **types),
  )


def _check_widths(networks: Networks) -> None:
  """Checks that the networks of a checkpoint fit each other.

  Raises:
    ValueError: they don't; the message names every width that differs.
  """
  denoiser, vae, pooler, t5_encoder = networks
  wrong = []
  if (channels := denoiser.in_channels // 4) != vae.latent_channels:
    wrong.append(
      f"in_channels / 4 {channels} is not the autoencoder's latent_channels {vae.latent_channels}"
    )
  if (width := denoiser.joint_attention_dim) != t5_encoder.d_model:
    wrong.append(f"joint_attention_dim {width} is not T5's d_model {t5_encoder.d_model}")
  if (width := denoiser.pooled_projection_dim) != pooler.hidden_size:
    wrong.append(f"pooled_projection_dim {width} is not CLIP's hidden_size {pooler.hidden_size}")
  if wrong:
    raise ValueError(f"transformer/config.json: {'; '.join(wrong)}")


def _tokenize(
  tokenizers: dict[str, Callable[..., np.ndarray]], text_length: int, texts: list[str]
) -> dict[str, np.ndarray]:
  """The tokens of both text encoders."""
  return {
    "clip": tokenizers["tokenizer"](texts),
    "t5": tokenizers["tokenizer_2"](texts, text_length),
  }


def _encode(networks: Networks, params: PyTree, tokens: dict[str, Array]) -> dict[str, Array]:
  """T5's states and CLIP's pooled text."""
  text = networks.text_encoder_2.apply({"params": params["text_encoder_2"]}, tokens["t5"])
  _, pooled = networks.text_encoder.apply({"params": params["text_encoder"]}, tokens["clip"])
  return {"text": text, "pooled": pooled}


def _denoise(
  denoiser: transformer.FluxTransformer2DModel,
  lora: Lora | None,
  guidance: float,
  params: PyTree,
  x: Float[Array, "b h w c"],
  time: Float[Array, "b"],
  rows: dict[str, Array],
) -> Float[Array, "b h w c"]:
  """The velocity; `rows` are those of `_encode`."""
  scale = jnp.full(time.shape, guidance, jnp.float32) if denoiser.guidance_embeds else None
  return denoiser.apply(variables(params, lora), x, time, rows["text"], rows["pooled"], scale)


def _components(
  networks: Networks, latents: tuple[int, ...], size: tuple[int, int]
) -> dict[str, Component]:
  """The weights to load, with the shapes of the networks' parameters."""
  denoiser, vae, pooler, t5_encoder = networks
  return {
    "denoiser": Component(
      folder="transformer", table=tables.FLUX, abstract=_abstract_transformer(denoiser, latents)
    ),
    "decoder": Component(
      folder="vae",
      table=AUTOENCODER.table,
      abstract=abstract(vae, (1, *size, vae.in_channels)),
    ),
    "text_encoder": Component(
      folder="text_encoder",
      table=CLIP_TEXT.table,
      abstract=abstract(pooler, (1, 1), dtype=jnp.int32),
    ),
    "text_encoder_2": Component(
      folder="text_encoder_2",
      table=T5.table,
      abstract=abstract(t5_encoder, (1, 1), dtype=jnp.int32),
    ),
  }


def _abstract_transformer(
  denoiser: transformer.FluxTransformer2DModel, latents: tuple[int, ...]
) -> PyTree:
  """Shapes and dtypes of a transformer's parameters."""
  shapes = [
    (1, *latents),
    (1,),
    (1, 1, denoiser.joint_attention_dim),
    (1, denoiser.pooled_projection_dim),
  ]
  if denoiser.guidance_embeds:
    shapes.append((1,))
  return abstract(denoiser, *shapes)


def _transformer(config: dict) -> PyTree:
  network = transformer.from_json(config)
  return _abstract_transformer(network, (2, 2, network.in_channels // 4))


def _diffusers_call(config: ConfigDict, tokenizers: dict[str, Callable]) -> DiffusersCall:
  del tokenizers
  arguments = image_arguments(config)
  arguments["guidance_scale"] = config.sampler.embedded_guidance
  arguments["max_sequence_length"] = config.model.text_length
  return DiffusersCall(
    scheduler=flow_match.diffusers_scheduler(config.sampler.shift),
    arguments=arguments | flow_match.true_guidance(config),
  )


FAMILY = Family(
  files=FILES,
  tokenizers={"tokenizer": "clip", "tokenizer_2": "t5"},
  paradigm="flow",
  build=build,
  networks={
    "FluxTransformer2DModel": Network(table=tables.FLUX, abstract=_transformer),
    "AutoencoderKL": AUTOENCODER,
    "CLIPTextModel": CLIP_TEXT,
    "T5EncoderModel": T5,
  },
  options=lambda config: {
    "text_length": config.model.text_length,
    "guidance": config.sampler.embedded_guidance,
  },
  text_length=lambda jsons: jsons["text_encoder"].get("max_position_embeddings", 77),
  index_file=INDEX,
  diffusers_call=_diffusers_call,
  pipelines=("FluxPipeline", "FluxImg2ImgPipeline"),
)

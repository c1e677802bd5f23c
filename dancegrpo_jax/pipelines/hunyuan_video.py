"""HunyuanVideo (arXiv 2412.03603): Llama's states, CLIP's pooled text,
HunyuanVideoTransformer3DModel and AutoencoderKLHunyuanVideo, in the layout of diffusers' folders.

Latents are `[(frames - 1) / 4 + 1, h / 8, w / 8, 16]`. A sample of one frame is an image. The
published checkpoint is guidance-distilled: it gets one guidance scale as an input, in rollout and
training alike, so that there is one forward pass a step.

The prompt stands in a template, of whose tokens the language model's states are cut off. The states
are those before the last two of its layers, without the norm that follows the last one.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from dancegrpo_jax.conversion.tables.language_models import last_layers, without_last_layers
from dancegrpo_jax.models import autoencoder_hunyuan_video as autoencoder
from dancegrpo_jax.models import clip, decoder_lm, video_tiles
from dancegrpo_jax.models import hunyuan_video as transformer
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
from dancegrpo_jax.pipelines.layout import INDEX, PADDING, Component, Tokenizer
from dancegrpo_jax.pipelines.networks import (
  AUTOENCODER_HUNYUAN_VIDEO,
  CLIP_TEXT,
  HUNYUAN_VIDEO,
  LLAMA,
  LLAMA_CAUSAL,
  abstract,
  abstract_hunyuan_video,
)
from dancegrpo_jax.pipelines.templates import NAMED, Template, template_of
from dancegrpo_jax.types import Media, PyTree

FILES = {
  "transformer": "transformer/config.json",
  "vae": "vae/config.json",
  "text_encoder": "text_encoder/config.json",
  "text_encoder_2": "text_encoder_2/config.json",
  "scheduler": flow_match.FILE,
}
SKIPPED_LAYERS = 2  # the last ones of the language model, which are not run


class Networks(NamedTuple):
  """The networks of a checkpoint, by the names of the components that hold their parameters."""

  denoiser: transformer.HunyuanVideoTransformer3DModel
  decoder: autoencoder.AutoencoderKLHunyuanVideo
  text_encoder: decoder_lm.DecoderLM
  text_encoder_2: clip.ClipText


class Clips(NamedTuple):
  """What is drawn, from the config's section `model`.

  Attributes:
    frames: of a sample; 1 draws images.
    fps: frames a second.
    tiling: how a sample is decoded, see `video_tiles.TILINGS`.
  """

  frames: int
  fps: float
  tiling: str


def build(
  jsons: dict[str, dict],
  tokenizers: dict[str, Callable[..., np.ndarray]],
  settings: ModelSettings,
  *,
  clips: Clips,
  text_length: int,
  template: str,
  guidance: float,
) -> Pipeline:
  """The pipeline of a checkpoint's JSON files.

  Args:
    jsons: the parsed files, by the keys of `FILES`.
    tokenizers: functions from texts to ids, by folder; Llama's takes the number of tokens too.
    settings: `scan_blocks` stacks the blocks of the transformer and of both text encoders.
    clips: what is drawn.
    text_length: the number of Llama's tokens, from the prompt's first one on.
    template: the name of a template, or its text, see `templates.template_of`.
    guidance: the guidance scale that a guidance-distilled transformer gets as an input.

  Raises:
    ValueError: the frames, height or width don't fit the networks, the networks don't fit each
      other, the tokenizer lacks a mark of the template, the adapters match no layer, or a
      config.json has a value that is not implemented.
  """
  networks = _networks(jsons, settings)
  _check_widths(networks)
  latents = _latent_shape(networks.decoder, settings.size, clips.frames)
  scheduler = flow_match.read_scheduler(jsons["scheduler"])
  shift = flow_match.scheduler_shift(scheduler, tokens=latents[1] // 2 * (latents[2] // 2))
  around = template_of(template)
  _check_marks(around, tokenizers["tokenizer"])
  crop = _tokens_before(around, tokenizers["tokenizer"])
  sample = (*settings.size, networks.decoder.out_channels)
  pipeline = Pipeline(
    prepare=text_inputs(partial(_tokenize, tokenizers, around, crop, text_length)),
    encode=partial(_encode, networks, crop),
    denoise=partial(_denoise, networks.denoiser, settings.lora, guidance),
    decode=partial(_decode, networks.decoder, clips),
    schedule=partial(flow_match.schedule, scheduler, shift),
    prediction="velocity",
    latent_shape=latents,
    sample_shape=sample if clips.frames == 1 else (clips.frames, *sample),
    components=_components(networks, jsons["text_encoder"]),
    encoders=("text_encoder", "text_encoder_2"),
  )
  return adapted(pipeline, settings.lora)


def _networks(jsons: dict[str, dict], settings: ModelSettings) -> Networks:
  """The networks that the JSON files describe."""
  frozen = jnp.dtype(settings.frozen_dtype)
  types = {"dtype": frozen, "param_dtype": frozen}
  language_model = decoder_lm.from_json(
    jsons["text_encoder"],
    scan_blocks=settings.scan_blocks,
    impl=settings.attention,
    layers=max(1, jsons["text_encoder"].get("num_hidden_layers", 32) - SKIPPED_LAYERS),
    final_norm=False,
    **types,
  )
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
    text_encoder=language_model,
    text_encoder_2=clip.ClipText.from_json(
      jsons["text_encoder_2"], scan_layers=settings.scan_blocks, impl=settings.attention, **types
    ),
  )


def _check_widths(networks: Networks) -> None:
  """Checks that the networks of a checkpoint fit each other.

  Raises:
    ValueError: they don't; the message names every width that differs.
  """
  denoiser, vae, language_model, pooler = networks
  wrong = []
  if (channels := denoiser.in_channels) != vae.latent_channels:
    wrong.append(
      f"in_channels {channels} is not the autoencoder's latent_channels {vae.latent_channels}"
    )
    if channels == 2 * vae.latent_channels:
      wrong[-1] += (
        " but twice as many: image-to-video is not implemented; take a text-to-video checkpoint"
      )
  if (width := denoiser.text_embed_dim) != language_model.hidden_size:
    wrong.append(f"text_embed_dim {width} is not Llama's hidden_size {language_model.hidden_size}")
  if (width := denoiser.pooled_projection_dim) != pooler.hidden_size:
    wrong.append(f"pooled_projection_dim {width} is not CLIP's hidden_size {pooler.hidden_size}")
  if wrong:
    raise ValueError(f"transformer/config.json: {'; '.join(wrong)}")


def _latent_shape(
  vae: autoencoder.AutoencoderKLHunyuanVideo, size: tuple[int, int], frames: int
) -> tuple[int, int, int, int]:
  """Frames, height, width and channels of one sample's latents.

  Raises:
    ValueError: the height or width, or the frames, can't be compressed by the autoencoder and be
      cut into the denoiser's tokens.
  """
  (height, width), every = size, vae.temporal_compression_ratio
  problems = []
  if (frames - 1) % every:
    below = frames - (frames - 1) % every
    problems.append(
      f"config.model.frames = {frames}: must be {every} n + 1; use {below} or {below + every}"
    )
  multiple = 2 * vae.spatial_compression_ratio
  if height % multiple or width % multiple:
    problems.append(
      f"config.model.size = {(height, width)}: height and width must be multiples of {multiple}"
      " for this checkpoint"
    )
  if problems:
    raise ValueError("\n".join(problems))
  latent_frames, ratio = (frames - 1) // every + 1, vae.spatial_compression_ratio
  return latent_frames, height // ratio, width // ratio, vae.latent_channels


# Texts


def _check_marks(template: Template, tokenizer: Callable) -> None:
  """Checks that the marks of the template, such as <|eot_id|>, are tokens.

  Otherwise they would be spelled letter by letter, and the prompt's states would be others.

  Raises:
    ValueError: one of them is no token.
  """
  if isinstance(tokenizer, Tokenizer):
    missing = sorted(set(re.findall(r"<\|\w+\|>", template.text)) - tokenizer.marks)
    if missing:
      raise ValueError(
        f"tokenizer/tokenizer.json: {', '.join(missing)} of config.model.template is not among its"
        " added tokens; take the tokenizer of the checkpoint's language model, or another template"
      )


def _tokens_before(template: Template, tokenizer: Callable) -> int:
  """The number of tokens before the prompt, BOS included."""
  if isinstance(tokenizer, Tokenizer):
    return tokenizer.lengths([template.before])[0]
  return template.tokens


def _tokenize(
  tokenizers: dict[str, Callable[..., np.ndarray]],
  template: Template,
  crop: int,
  text_length: int,
  texts: list[str],
) -> dict[str, np.ndarray]:
  """The tokens of both text encoders, and the number of Llama's that belong to the prompt.

  At least one does: the mark that ends it.
  """
  filled = [template.filled(text) for text in texts]
  ids = tokenizers["tokenizer"](filled, crop + text_length)
  return {
    "llama": np.maximum(ids, 0),  # The language model is causal, so padding changes no state.
    "lengths": ((ids != PADDING).sum(axis=1) - crop).astype(np.int32),
    "clip": tokenizers["tokenizer_2"](texts),
  }


def _encode(
  networks: Networks, crop: int, params: PyTree, tokens: dict[str, Array]
) -> dict[str, Array]:
  """Llama's states from the prompt's first token on, their number, and CLIP's pooled text."""
  states = networks.text_encoder.apply({"params": params["text_encoder"]}, tokens["llama"])
  _, pooled = networks.text_encoder_2.apply({"params": params["text_encoder_2"]}, tokens["clip"])
  return {"text": states[:, crop:], "lengths": tokens["lengths"], "pooled": pooled}


# Samples


def _denoise(
  denoiser: transformer.HunyuanVideoTransformer3DModel,
  lora: Lora | None,
  guidance: float,
  params: PyTree,
  x: Float[Array, "b f h w c"],
  time: Float[Array, "b"],
  rows: dict[str, Array],
) -> Float[Array, "b f h w c"]:
  """The velocity; `rows` are those of `_encode`."""
  scale = jnp.full(time.shape, guidance, jnp.float32) if denoiser.guidance_embeds else None
  return denoiser.apply(
    variables(params, lora), x, time, rows["text"], rows["lengths"], rows["pooled"], scale
  )


def _decode(
  vae: autoencoder.AutoencoderKLHunyuanVideo,
  clips: Clips,
  params: PyTree,
  latents: Float[Array, "b f h w c"],
) -> Media:
  """Clips, or images where a sample has one frame."""
  pixels = video_tiles.pixels_of(vae, params["decoder"], latents, tiling=clips.tiling)
  if clips.frames == 1:
    return Media(pixels[:, 0])
  return Media(pixels, clips.fps)


def _components(networks: Networks, language_json: dict) -> dict[str, Component]:
  """The weights to load, with the shapes of the networks' parameters.

  Args:
    networks: of the checkpoint.
    language_json: the config.json of the language model, not all of whose layers are run.
  """
  denoiser, vae, language_model, pooler = networks
  layers = language_model.layers, language_json["num_hidden_layers"]
  has_head = "LlamaForCausalLM" in (language_json.get("architectures") or ())
  side = vae.spatial_compression_ratio
  return {
    "denoiser": Component(
      folder="transformer", table=HUNYUAN_VIDEO.table, abstract=abstract_hunyuan_video(denoiser)
    ),
    "decoder": Component(
      folder="vae",
      table=AUTOENCODER_HUNYUAN_VIDEO.table,
      abstract=abstract(vae, (1, 1, side, side, vae.in_channels)),
    ),
    "text_encoder": Component(
      folder="text_encoder",
      table=without_last_layers(LLAMA.table, *layers),
      abstract=abstract(language_model, (1, 1), dtype=jnp.int32),
      unread=last_layers(*layers) + (LLAMA_CAUSAL.unread if has_head else ()),
    ),
    "text_encoder_2": Component(
      folder="text_encoder_2",
      table=CLIP_TEXT.table,
      abstract=abstract(pooler, (1, 1), dtype=jnp.int32),
    ),
  }


def _options(config: ConfigDict) -> dict:
  """The arguments of `build` beside the common settings."""
  model = config.model
  return {
    "clips": Clips(frames=model.frames, fps=model.fps, tiling=model.decode_tiling),
    "text_length": model.text_length,
    "template": model.template,
    "guidance": config.sampler.embedded_guidance,
  }


def _diffusers_call(config: ConfigDict, tokenizers: dict[str, Callable]) -> DiffusersCall:
  """diffusers take the template for videos and its 95 tokens, unless they are told otherwise."""
  model = config.model
  arguments = image_arguments(config) | {
    "num_frames": model.frames,
    "guidance_scale": config.sampler.embedded_guidance,
    "max_sequence_length": model.text_length,
    **flow_match.true_guidance(config),
  }
  around = template_of(model.template)
  crop = _tokens_before(around, tokenizers["tokenizer"])
  if (around.text, crop) != (NAMED["video"].text, NAMED["video"].tokens):
    arguments["prompt_template"] = {"template": around.text, "crop_start": crop}
  is_image = model.frames == 1
  return DiffusersCall(
    scheduler=flow_match.diffusers_scheduler(config.sampler.shift),
    arguments=arguments,
    result="frames[0][0]" if is_image else "frames[0]",
    fps=0.0 if is_image else model.fps,
  )


FAMILY = Family(
  files=FILES,
  tokenizers={"tokenizer": "llama", "tokenizer_2": "clip"},
  paradigm="flow",
  build=build,
  networks={
    "HunyuanVideoTransformer3DModel": HUNYUAN_VIDEO,
    "AutoencoderKLHunyuanVideo": AUTOENCODER_HUNYUAN_VIDEO,
    "LlamaModel": LLAMA,
    "LlamaForCausalLM": LLAMA_CAUSAL,
    "CLIPTextModel": CLIP_TEXT,
  },
  options=_options,
  text_length=lambda jsons: jsons["text_encoder_2"].get("max_position_embeddings", 77),
  index_file=INDEX,
  diffusers_call=_diffusers_call,
  pipelines=("HunyuanVideoPipeline",),
  videos=True,
)

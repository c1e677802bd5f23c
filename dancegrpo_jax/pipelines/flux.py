"""FLUX.1: CLIP's pooled text, T5's states, FluxTransformer2DModel, AutoencoderKL, in diffusers'
folder layout.

Latents are `[h / 8, w / 8, 16]`; the network packs them. A guidance-distilled checkpoint (dev) is
told one guidance scale in rollout and training alike, so there is one forward pass a step; schnell
has none.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dancegrpo_jax.diffusion import schedules
from dancegrpo_jax.models import autoencoder, clip, t5
from dancegrpo_jax.models import flux as transformer
from dancegrpo_jax.models.lora import Lora, variables
from dancegrpo_jax.pipelines.base import Component, Pipeline, adapted
from dancegrpo_jax.types import PyTree

FILES = {
  "transformer": "transformer/config.json",
  "vae": "vae/config.json",
  "text_encoder": "text_encoder/config.json",
  "text_encoder_2": "text_encoder_2/config.json",
  "scheduler": "scheduler/scheduler_config.json",
}
TOKENIZERS = ("tokenizer",)
T5_TOKENIZERS = ("tokenizer_2",)
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
  tokenize: dict[str, Callable[..., np.ndarray]],
  *,
  size: tuple[int, int],
  dtype: str,
  frozen_dtype: str,
  remat: bool,
  attention: str,
  scan_blocks: bool,
  text_length: int,
  guidance: float,
  lora: Lora | None = None,
) -> Pipeline:
  """The pipeline of a checkpoint's JSON files (those of `FILES`).

  Args:
    jsons: parsed files, by the keys of `FILES`.
    tokenize: by folder name, texts -> ids for `TOKENIZERS` and (texts, length) -> ids for
      `T5_TOKENIZERS`.
    size: height and width of the samples, pixels.
    dtype: what the transformer computes in; its parameters are float32 where they are trained.
    frozen_dtype: of the text encoders and the autoencoder, stored and computed; under adapters the
      transformer's parameters too.
    remat: recompute the transformer's blocks in the backward pass.
    attention: see `models.attention.attention`.
    scan_blocks: stack the blocks of the transformer, of T5 and of CLIP's text encoder.
    text_length: of T5's tokens.
    guidance: what a guidance-distilled transformer is told.
    lora: adapters to train in place of the transformer's parameters.

  Raises:
    ValueError: a size that does not divide, a dtype that T5 does not stand, networks that don't fit
      each other, adapters of nothing, or a config.json that asks for what is not implemented.
  """
  if frozen_dtype == "float16":
    raise ValueError(
      "config.model.frozen_dtype = 'float16': T5's activations overflow it; use 'bfloat16' or"
      " 'float32'"
    )
  frozen = {"dtype": jnp.dtype(frozen_dtype), "param_dtype": jnp.dtype(frozen_dtype)}
  stored = jnp.dtype(frozen_dtype if lora else "float32")
  denoiser = transformer.from_json(
    jsons["transformer"],
    dtype=jnp.dtype(dtype),
    param_dtype=stored,
    scan_blocks=scan_blocks,
    remat=remat,
    impl=attention,
  )
  vae = autoencoder.from_json(jsons["vae"], **frozen)
  pooler = clip.ClipText.from_json(
    jsons["text_encoder"], **frozen, scan_layers=scan_blocks, impl=attention
  )
  encoder = t5.from_json(jsons["text_encoder_2"], **frozen, scan_blocks=scan_blocks)
  _check_widths(denoiser, vae, pooler, encoder)
  factor = 2 ** (len(vae.block_out_channels) - 1)
  if any(side % (2 * factor) for side in size):
    raise ValueError(
      f"config.model.size = {tuple(size)}: height and width must be multiples of {2 * factor}"
      " for this checkpoint"
    )
  latent_shape = (size[0] // factor, size[1] // factor, vae.latent_channels)
  own_shift = scheduler_shift(jsons["scheduler"], latent_shape[0] // 2 * (latent_shape[1] // 2))

  def both_tokenizers(texts: list[str]) -> dict[str, np.ndarray]:
    return {"clip": tokenize["tokenizer"](texts), "t5": tokenize["tokenizer_2"](texts, text_length)}

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
    return denoiser.apply(variables(params, lora), x, time, rows["text"], rows["pooled"], told)

  def decode(params: PyTree, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
    return autoencoder.pixels_of(vae, params["decoder"], latents)

  def schedule(steps: int, shift: float) -> schedules.Schedule:
    return schedules.flow_schedule(
      steps, shift or own_shift, jsons["scheduler"].get("num_train_timesteps", 1000)
    )

  base = Pipeline(
    tokenize=both_tokenizers,
    encode=encode,
    denoise=denoise,
    decode=decode,
    schedule=schedule,
    prediction="velocity",
    latent_shape=latent_shape,
    components=_components(denoiser, vae, pooler, encoder, latent_shape, size),
    encoders=("text_encoder", "text_encoder_2"),
  )
  return adapted(base, lora)


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

  def abstract(network, *shapes: tuple[int, ...], dtype=jnp.float32) -> PyTree:
    return jax.eval_shape(
      network.init, jax.random.key(0), *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    )["params"]

  told = ((1,),) * denoiser.guidance_embeds
  text, pooled = (1, 1, denoiser.joint_attention_dim), (1, denoiser.pooled_projection_dim)
  return {
    "denoiser": Component(
      "transformer",
      "FluxTransformer2DModel",
      abstract(denoiser, (1, *latent_shape), (1,), text, pooled, *told),
    ),
    "decoder": Component("vae", "AutoencoderKL", abstract(vae, (1, *size, vae.in_channels))),
    "text_encoder": Component(
      "text_encoder", "CLIPTextModel", abstract(pooler, (1, 1), dtype=jnp.int32)
    ),
    "text_encoder_2": Component(
      "text_encoder_2", "T5EncoderModel", abstract(encoder, (1, 1), dtype=jnp.int32)
    ),
  }

"""What several families and rewards share: networks as PyTorch libraries publish them, and images
from latents.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dancegrpo_jax.conversion.tables import clip as clip_tables
from dancegrpo_jax.conversion.tables import flux as flux_tables
from dancegrpo_jax.conversion.tables import hunyuan_video as hunyuan_video_tables
from dancegrpo_jax.conversion.tables import hunyuan_video_vae as hunyuan_video_vae_tables
from dancegrpo_jax.conversion.tables import language_models
from dancegrpo_jax.conversion.tables import stable_diffusion as stable_diffusion_tables
from dancegrpo_jax.models import (
  autoencoder,
  autoencoder_hunyuan_video,
  clip,
  decoder_lm,
  hunyuan_video,
  t5,
)
from dancegrpo_jax.pipelines.layout import Network
from dancegrpo_jax.types import Media, PyTree


def abstract(network: Any, *shapes: tuple[int, ...], dtype: Any = jnp.float32) -> PyTree:
  """Shapes and dtypes of a network's parameters, without computing any.

  Args:
    network: a linen module.
    shapes: the shapes of the arguments of its init.
    dtype: the dtype of these arguments.
  """
  return abstract_of(network, *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))


def abstract_of(network: Any, *arguments: jax.ShapeDtypeStruct) -> PyTree:
  """`abstract` of a network whose init takes arguments of several dtypes."""
  tree = _traced(network, arguments, jax.sharding.get_abstract_mesh())
  return jax.tree.map(lambda leaf: leaf, tree)  # dicts of its own for each caller


@functools.lru_cache(maxsize=64)
def _traced(network: Any, arguments: tuple[jax.ShapeDtypeStruct, ...], mesh: Any) -> PyTree:
  """The tree of `abstract_of`. Tracing a network takes seconds, and a command asks several times.

  The mesh of the context is an argument because what is traced in one belongs to it.
  """
  del mesh
  return jax.eval_shape(network.init, jax.random.key(0), *arguments)["params"]


def latent_shape(
  vae: autoencoder.AutoencoderKL, size: tuple[int, int], multiple: int
) -> tuple[int, int, int]:
  """Height, width and channels of one sample's latents.

  Args:
    vae: the autoencoder.
    size: height and width of the sample, in pixels.
    multiple: what the denoiser needs height and width of the latents to be multiples of.

  Raises:
    ValueError: height or width is no such multiple.
  """
  height, width = size
  factor = 2 ** (len(vae.block_out_channels) - 1)
  if height % (factor * multiple) or width % (factor * multiple):
    raise ValueError(
      f"config.model.size = {(height, width)}: height and width must be multiples of"
      f" {factor * multiple} for this checkpoint"
    )
  return height // factor, width // factor, vae.latent_channels


def decode_images(
  vae: autoencoder.AutoencoderKL, params: PyTree, latents: Float[Array, "b h w c"]
) -> Media:
  """`Pipeline.decode` of a model of images with an AutoencoderKL."""
  return Media(autoencoder.pixels_of(vae, params["decoder"], latents))


def _pixels(tower: clip.ClipVision) -> jax.ShapeDtypeStruct:
  shape = (1, tower.image_size, tower.image_size, 3)
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _autoencoder(config: dict) -> PyTree:
  network = autoencoder.from_json(config)
  return abstract(network, (1, 64, 64, network.in_channels))


def _autoencoder_hunyuan_video(config: dict) -> PyTree:
  network = autoencoder_hunyuan_video.from_json(config)
  side = network.spatial_compression_ratio
  return abstract(network, (1, 1, side, side, network.in_channels))


def _clip_text(config: dict) -> PyTree:
  return abstract(clip.ClipText.from_json(config), (1, 1), dtype=jnp.int32)


def _clip_vision(config: dict) -> PyTree:
  network = clip.ClipVision.from_json(config)
  return abstract(network, _pixels(network).shape)


def _clip(config: dict) -> PyTree:
  network = clip.Clip.from_json(config)
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  pixels = _pixels(network.vision_model)
  return abstract_of(network, tokens, pixels)


def _t5(config: dict) -> PyTree:
  return abstract(t5.from_json(config), (1, 1), dtype=jnp.int32)


def _llama(config: dict) -> PyTree:
  return abstract(decoder_lm.from_json(config), (1, 1), dtype=jnp.int32)


def abstract_hunyuan_video(network: hunyuan_video.HunyuanVideoTransformer3DModel) -> PyTree:
  """Shapes and dtypes of a HunyuanVideo transformer's parameters."""

  def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)

  arguments = [
    shape(1, 1, 2, 2, network.in_channels),
    shape(1),
    shape(1, 1, network.text_embed_dim),
    jax.ShapeDtypeStruct((1,), jnp.int32),
    shape(1, network.pooled_projection_dim),
  ]
  if network.guidance_embeds:
    arguments.append(shape(1))
  return abstract_of(network, *arguments)


def _hunyuan_video(config: dict) -> PyTree:
  return abstract_hunyuan_video(hunyuan_video.from_json(config))


AUTOENCODER = Network(table=stable_diffusion_tables.AUTOENCODER, abstract=_autoencoder)
AUTOENCODER_HUNYUAN_VIDEO = Network(
  table=hunyuan_video_vae_tables.AUTOENCODER, abstract=_autoencoder_hunyuan_video
)
CLIP_TEXT = Network(table=clip_tables.CLIP_TEXT, abstract=_clip_text)
CLIP_VISION = Network(table=clip_tables.CLIP_VISION, abstract=_clip_vision)
CLIP = Network(table=clip_tables.CLIP, abstract=_clip)
T5 = Network(table=flux_tables.T5, abstract=_t5)
LLAMA = Network(table=language_models.LLAMA, abstract=_llama)
# The same network with a head, which gives probabilities of words.
LLAMA_CAUSAL = LLAMA._replace(unread=("lm_head.weight",))
HUNYUAN_VIDEO = Network(table=hunyuan_video_tables.HUNYUAN_VIDEO, abstract=_hunyuan_video)

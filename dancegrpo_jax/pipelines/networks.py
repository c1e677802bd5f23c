"""Networks that several families and rewards share, as PyTorch libraries publish them."""

from typing import Any

import jax
import jax.numpy as jnp

from dancegrpo_jax.conversion.tables import clip as clip_tables
from dancegrpo_jax.conversion.tables import flux as flux_tables
from dancegrpo_jax.conversion.tables import stable_diffusion as stable_diffusion_tables
from dancegrpo_jax.models import autoencoder, clip, t5
from dancegrpo_jax.pipelines.layout import Network
from dancegrpo_jax.types import PyTree


def abstract(network: Any, *shapes: tuple[int, ...], dtype: Any = jnp.float32) -> PyTree:
  """Shapes and dtypes of the parameters of a linen network, without making any.

  Args:
    network: linen module.
    shapes: of the arguments of its init.
    dtype: of these arguments.
  """
  arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
  return jax.eval_shape(network.init, jax.random.key(0), *arguments)["params"]


def _pixels(tower: clip.ClipVision) -> jax.ShapeDtypeStruct:
  shape = (1, tower.image_size, tower.image_size, tower.num_channels)
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _autoencoder(config: dict) -> PyTree:
  network = autoencoder.from_json(config)
  return abstract(network, (1, 64, 64, network.in_channels))


def _clip_text(config: dict) -> PyTree:
  return abstract(clip.ClipText.from_json(config), (1, 1), dtype=jnp.int32)


def _clip_vision(config: dict) -> PyTree:
  network = clip.ClipVision.from_json(config)
  return abstract(network, _pixels(network).shape)


def _clip(config: dict) -> PyTree:
  network = clip.Clip.from_json(config)
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(network.init, jax.random.key(0), tokens, _pixels(network.vision_model))[
    "params"
  ]


def _t5(config: dict) -> PyTree:
  return abstract(t5.from_json(config), (1, 1), dtype=jnp.int32)


AUTOENCODER = Network(table=stable_diffusion_tables.AUTOENCODER, abstract=_autoencoder)
CLIP_TEXT = Network(table=clip_tables.CLIP_TEXT, abstract=_clip_text)
CLIP_VISION = Network(table=clip_tables.CLIP_VISION, abstract=_clip_vision)
CLIP = Network(table=clip_tables.CLIP, abstract=_clip)
T5 = Network(table=flux_tables.T5, abstract=_t5)

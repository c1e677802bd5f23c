"""From a published config.json to the parameters that its network wants, without making any."""

import jax
import jax.numpy as jnp

from dancegrpo_jax.errors import ConversionError
from dancegrpo_jax.models import autoencoder, clip, flux, t5, unet
from dancegrpo_jax.types import PyTree


def _unet(config: dict) -> tuple:
  network = unet.from_json(config)
  latents = jnp.zeros((1, 64, 64, network.in_channels))
  return network, (latents, jnp.zeros(1), jnp.zeros((1, 1, network.cross_attention_dim)))


def _flux(config: dict) -> tuple:
  network = flux.from_json(config)
  latents, text = (
    jnp.zeros((1, 2, 2, network.in_channels // 4)),
    jnp.zeros((1, 1, network.joint_attention_dim)),
  )
  guidance = jnp.zeros(1) if network.guidance_embeds else None
  return network, (
    latents,
    jnp.zeros(1),
    text,
    jnp.zeros((1, network.pooled_projection_dim)),
    guidance,
  )


def _autoencoder(config: dict) -> tuple:
  network = autoencoder.from_json(config)
  return network, (jnp.zeros((1, 64, 64, network.in_channels)),)


def _ids() -> jax.Array:
  return jnp.zeros((1, 1), jnp.int32)


def _pixels(tower: clip.ClipVision) -> jax.Array:
  return jnp.zeros((1, tower.image_size, tower.image_size, tower.num_channels))


def _text(config: dict) -> tuple:
  return clip.ClipText.from_json(config), (_ids(),)


def _t5(config: dict) -> tuple:
  return t5.from_json(config), (_ids(),)


def _vision(config: dict) -> tuple:
  network = clip.ClipVision.from_json(config)
  return network, (_pixels(network),)


def _clip(config: dict) -> tuple:
  network = clip.Clip.from_json(config)
  return network, (_ids(), _pixels(network.vision_model))


# config -> (linen network, arguments of its init)
NETWORKS = {
  "UNet2DConditionModel": _unet,
  "FluxTransformer2DModel": _flux,
  "AutoencoderKL": _autoencoder,
  "CLIPTextModel": _text,
  "T5EncoderModel": _t5,
  "CLIPVisionModel": _vision,
  "CLIPModel": _clip,
}


def class_name(config: dict) -> str:
  """The network's class: diffusers' `_class_name` or transformers' first `architectures`; "" if the
  file names none.
  """
  return config.get("_class_name") or (config.get("architectures") or [""])[0]


def abstract_params(config: dict) -> PyTree:
  """The parameter tree of the network that a config.json describes, as shapes and dtypes.

  Raises:
    ConversionError: the class, or a value in the file, is not implemented.
  """
  name = class_name(config)
  if name not in NETWORKS:
    raise ConversionError(f"config.json names the class {name!r}; known: {', '.join(NETWORKS)}")
  try:
    network, arguments = NETWORKS[name](config)
    return jax.eval_shape(network.init, jax.random.key(0), *arguments)["params"]
  except (ValueError, KeyError, TypeError) as error:
    raise ConversionError(
      f"{name}: config.json does not describe a network that is implemented: {error}"
    ) from error

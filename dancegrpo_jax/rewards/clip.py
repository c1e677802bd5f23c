"""CLIP score: cosine between image and prompt embeddings, by a model in transformers' CLIPModel layout."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dancegrpo_jax.models.clip import Clip
from dancegrpo_jax.pipelines.base import Component
from dancegrpo_jax.rewards.base import Reward
from dancegrpo_jax.types import Example, Media, PyTree

FILES = {"clip": "config.json", "preprocessor": "preprocessor_config.json"}
TOKENIZERS = ("",)


def preprocess(pixels: Float[Array, "b h w 3"], size: int, mean: tuple, std: tuple) -> Float[Array, "b s s 3"]:
  """Shortest side to `size` (antialiased bicubic, a = -0.5), centre crop, normalisation: CLIPImageProcessor on floats."""
  b, h, w, _ = pixels.shape
  if min(h, w) != size:
    scale = size / min(h, w)
    h, w = (size if side == min(h, w) else int(scale * side) for side in (h, w))
    pixels = jnp.clip(jax.image.resize(pixels, (b, h, w, 3), "cubic", antialias=True), 0.0, 1.0)
  top, left = (h - size) // 2, (w - size) // 2
  pixels = pixels[:, top : top + size, left : left + size]
  return (pixels - jnp.array(mean).reshape(1, 1, 1, 3)) / jnp.array(std).reshape(1, 1, 1, 3)


def normalise(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
  """Rows to length 1, float32."""
  x = x.astype(jnp.float32)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def build(folder: str, jsons: dict[str, dict], tokenize: dict[str, Callable[[list[str]], np.ndarray]], dtype: str) -> Reward:
  """The reward of a CLIPModel folder.

  Args:
    folder: of the checkpoint.
    jsons: config.json and preprocessor_config.json, parsed.
    tokenize: texts -> ids, under "".
    dtype: stored and computed.
  """
  kind = jnp.dtype(dtype)
  network = Clip.from_json(jsons["clip"], dtype=kind, param_dtype=kind)
  size = network.vision_model.image_size
  mean, std = (tuple(jsons["preprocessor"][key]) for key in ("image_mean", "image_std"))

  def prepare(examples: list[Example]) -> np.ndarray:
    return tokenize[""]([example.prompt for example in examples])

  def features(params: PyTree, tokens: Array) -> Float[Array, "n d"]:
    return normalise(network.apply({"params": params}, tokens, method="text_features"))

  def embed(params: PyTree, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
    return normalise(network.apply({"params": params}, preprocess(pixels, size, mean, std), method="image_features"))

  def score(params: PyTree, media: Media, text: Float[Array, "b d"]) -> dict[str, Float[Array, "b"]]:
    return {"clip": jnp.sum(embed(params, media.pixels) * text, axis=-1)}

  tokens = jax.ShapeDtypeStruct((1, network.text_model.max_position_embeddings), jnp.int32)
  pixels = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  abstract = jax.eval_shape(network.init, jax.random.key(0), tokens, pixels)["params"]
  return Reward("clip", "device", prepare, features, score, folder, Component("", "CLIPModel", abstract), embed)

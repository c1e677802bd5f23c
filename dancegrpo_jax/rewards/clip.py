"""CLIP score: cosine between image and prompt embeddings, by a checkpoint in transformers' or in
open_clip's layout.

`build` also makes what differs from it in weights and preprocessing alone: HPS-v2.1 (hps.py) and
PickScore (pickscore.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dancegrpo_jax.models.clip import Clip
from dancegrpo_jax.pipelines.base import Component
from dancegrpo_jax.rewards.base import Reward, images
from dancegrpo_jax.rewards.preprocess import (
  Preprocessing,
  from_open_clip,
  from_transformers,
  preprocess,
)
from dancegrpo_jax.types import Example, Media, PyTree

FILES = {
  "clip": "config.json",
  "preprocessor": "preprocessor_config.json",
}  # of the transformers layout
OPEN_CLIP_FILE = "open_clip_config.json"
TOKENIZERS = ("",)


class Checkpoint(NamedTuple):
  """A two-tower checkpoint, not yet read.

  Attributes:
    location: of its weights: a folder, a file, or "random:..." (weights are drawn).
    table: the conversion table's name.
    config: the network, as a CLIPModel config.json says it.
    preprocessing: of its images.
  """

  location: str
  table: str
  config: dict[str, Any]
  preprocessing: Preprocessing


def transformers_checkpoint(location: str, jsons: dict[str, dict]) -> Checkpoint:
  """openai/clip-vit-large-patch14 and its kind. ValueError: a preprocessing that is not
  implemented.
  """
  config = jsons["clip"]
  size = Clip.from_json(config).vision_model.image_size
  return Checkpoint(location, "CLIPModel", config, from_transformers(jsons["preprocessor"], size))


def open_clip_checkpoint(location: str, config: dict[str, Any]) -> Checkpoint:
  """DFN5B, LAION and their kind, from open_clip_config.json. ValueError: a network that is not
  implemented.
  """
  return Checkpoint(location, "open_clip", clip_config(config["model_cfg"]), from_open_clip(config))


# What open_clip's `model_cfg` and its towers may say, with open_clip's defaults; None has none.
_MODEL = {"embed_dim": None, "quick_gelu": False, "vision_cfg": None, "text_cfg": None}
_VISION = {
  "image_size": 224,
  "patch_size": 16,
  "width": 768,
  "layers": 12,
  "head_width": 64,
  "mlp_ratio": 4.0,
}
_TEXT = {
  "context_length": 77,
  "vocab_size": 49408,
  "width": 512,
  "heads": 8,
  "layers": 12,
  "mlp_ratio": 4.0,
}


def _fields(name: str, given: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
  """`given` over the defaults. ValueError: a field that no code here reads, so that the network
  would be another one.
  """
  unknown = sorted(set(given) - set(known))
  missing = sorted(key for key, value in known.items() if value is None and key not in given)
  if unknown or missing:
    what = [f"not supported: {', '.join(unknown)}"] * bool(unknown) + [
      f"missing: {', '.join(missing)}"
    ] * bool(missing)
    raise ValueError(f"open_clip_config.json, {name}: {'; '.join(what)}")
  return known | given


def clip_config(model_cfg: dict[str, Any]) -> dict[str, Any]:
  """The CLIPModel config.json of the network that open_clip's `model_cfg` describes. ValueError:
  not implemented.
  """
  model = _fields("model_cfg", model_cfg, _MODEL)
  vision = _fields("vision_cfg", model["vision_cfg"], _VISION)
  text = _fields("text_cfg", model["text_cfg"], _TEXT)

  def tower(cfg: dict[str, Any], heads: int) -> dict[str, Any]:
    width, act = cfg["width"], "quick_gelu" if model["quick_gelu"] else "gelu"
    return {
      "hidden_size": width,
      "intermediate_size": int(width * cfg["mlp_ratio"]),
      "num_hidden_layers": cfg["layers"],
      "num_attention_heads": heads,
      "hidden_act": act,
      "layer_norm_eps": 1e-5,
    }

  return {
    "projection_dim": model["embed_dim"],
    "vision_config": tower(vision, vision["width"] // vision["head_width"])
    | {"image_size": vision["image_size"], "patch_size": vision["patch_size"], "num_channels": 3},
    "text_config": tower(text, text["heads"])
    | {"vocab_size": text["vocab_size"], "max_position_embeddings": text["context_length"]}
    | {"eos_token_id": 2},  # pools at the row's highest id, as open_clip does: see ClipText
  }


def normalise(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
  """Rows to length 1, float32."""
  x = x.astype(jnp.float32)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def network_of(
  checkpoint: Checkpoint, dtype: str, attention: str = "auto", scan_layers: bool = False
) -> tuple[Clip, Component]:
  """The towers, computed and stored in `dtype`, and what to load for them. See `build` for the
  rest.
  """
  kind = jnp.dtype(dtype)
  network = Clip.from_json(
    checkpoint.config, dtype=kind, param_dtype=kind, scan_layers=scan_layers, impl=attention
  )
  size = checkpoint.preprocessing.size
  tokens = jax.ShapeDtypeStruct((1, network.text_model.max_position_embeddings), jnp.int32)
  pixels = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  abstract = jax.eval_shape(network.init, jax.random.key(0), tokens, pixels)["params"]
  return network, Component(checkpoint.location, checkpoint.table, abstract)


def build(
  name: str,
  checkpoint: Checkpoint,
  tokenize: Callable[[list[str]], np.ndarray],
  dtype: str,
  attention: str = "auto",
  scan_layers: bool = False,
) -> Reward:
  """The cosine of a two-tower checkpoint as the term `name`.

  Args:
    name: of the reward and its one term.
    checkpoint: from `transformers_checkpoint`, `open_clip_checkpoint`, hps.py or pickscore.py.
    tokenize: texts -> ids.
    dtype: stored and computed; images are prepared in float32.
    attention: see `models.attention.attention`.
    scan_layers: stack the towers' layers.
  """
  network, component = network_of(checkpoint, dtype, attention, scan_layers)

  def prepare(examples: list[Example]) -> np.ndarray:
    return tokenize([example.prompt for example in examples])

  def features(params: PyTree, tokens: Array) -> Float[Array, "n d"]:
    return normalise(network.apply({"params": params["clip"]}, tokens, method="text_features"))

  def embed(params: PyTree, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
    ready = preprocess(pixels, checkpoint.preprocessing)
    return normalise(network.apply({"params": params["clip"]}, ready, method="image_features"))

  def score(
    params: PyTree, media: Media, text: Float[Array, "b d"]
  ) -> dict[str, Float[Array, "b"]]:
    return {name: jnp.sum(embed(params, images(name, media)) * text, axis=-1)}

  return Reward(name, "device", prepare, features, score, {"clip": component}, embed)

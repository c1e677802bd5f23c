"""CLIP's text and vision towers, with the parameter names of transformers' CLIPTextModel,
CLIPVisionModel and CLIPModel.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv
2103.00020. The fields of the towers carry the names of config.json. Their defaults are those of
transformers' config classes, because published files leave them out. Activations are `[batch,
tokens, width]`. Attention weights and norms are computed in float32 whatever `dtype` is.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dancegrpo_jax import published
from dancegrpo_jax.models.attention import attention
from dancegrpo_jax.models.config import (
  TRANSFORMERS_HARMLESS,
  TRANSFORMERS_NEUTRAL,
  from_config,
  keys_of,
)
from dancegrpo_jax.models.layers import Dense, Dtype

POSITION_STD = 0.02  # of position embeddings before training, as in transformers


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """x * sigmoid(1.702 x): OpenAI's approximation of GELU."""
  return x * jax.nn.sigmoid(1.702 * x)


def activation(name: str) -> Callable:
  """The activation that `hidden_act` names.

  Raises:
    ValueError: no CLIP checkpoint uses this activation.
  """
  # transformers' "gelu" is the exact one, and jax.nn.gelu is an approximation by default.
  known = {"quick_gelu": quick_gelu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}
  if name not in known:
    raise ValueError(f"CLIP: hidden_act = {name!r} is not supported; known: {', '.join(known)}")
  return known[name]


def _normalise(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
  """Scales every row to length 1, in float32."""
  x = x.astype(jnp.float32)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class Attention(nn.Module):
  """Multi-head self-attention with biases on all four projections."""

  num_attention_heads: int
  causal: bool
  impl: str
  dtype: Dtype
  param_dtype: Dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    width = x.shape[-1]
    if width % self.num_attention_heads:
      raise ValueError(
        f"CLIP: hidden_size {width} is not divisible by num_attention_heads"
        f" {self.num_attention_heads}"
      )

    def project(name: str) -> Dense:
      return Dense(width, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

    shape = (*x.shape[:-1], self.num_attention_heads, width // self.num_attention_heads)
    q, k, v = (project(f"{name}_proj")(x).reshape(shape) for name in "qkv")
    y = attention(q, k, v, causal=self.causal, impl=self.impl)
    return project("out_proj")(y.reshape(x.shape))


class Mlp(nn.Module):
  """Two dense layers with an activation between them."""

  intermediate_size: int
  hidden_act: str
  dtype: Dtype
  param_dtype: Dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    hidden = activation(self.hidden_act)(Dense(self.intermediate_size, name="fc1", **types)(x))
    return Dense(x.shape[-1], name="fc2", **types)(hidden)


def layer_norm(owner: Any, name: str) -> nn.LayerNorm:
  """torch's LayerNorm: two-pass variance, and the epsilon of `owner`'s config.

  It is Flax's own: layers.LayerNorm multiplies in another order, so its last bit may differ.
  """
  return nn.LayerNorm(
    epsilon=owner.layer_norm_eps,
    use_fast_variance=False,
    dtype=owner.dtype,
    param_dtype=owner.param_dtype,
    name=name,
  )


class Layer(nn.Module):
  """A pre-norm transformer layer, in the (carry, output) form that nn.scan needs.

  The output is a copy of the result where `return_states` asks for it, for callers that take the
  result of an earlier layer than the last.
  """

  num_attention_heads: int
  intermediate_size: int
  hidden_act: str
  layer_norm_eps: float
  causal: bool
  impl: str
  return_states: bool
  dtype: Dtype
  param_dtype: Dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"], _: None) -> tuple:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    attend = Attention(self.num_attention_heads, self.causal, self.impl, name="self_attn", **types)
    mlp = Mlp(self.intermediate_size, self.hidden_act, name="mlp", **types)
    x = x + attend(layer_norm(self, "layer_norm1")(x))
    x = x + mlp(layer_norm(self, "layer_norm2")(x))
    return x, (x if self.return_states else None)


class Encoder(nn.Module):
  """A tower's layers.

  With `scan_layers` their parameters are stacked on axis 0 of `layers`; otherwise they are in
  `layers_0`, `layers_1` and so on.
  """

  num_hidden_layers: int
  num_attention_heads: int
  intermediate_size: int
  hidden_act: str
  layer_norm_eps: float
  causal: bool
  impl: str
  scan_layers: bool
  remat: bool
  dtype: Dtype
  param_dtype: Dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"], layer: int = -1) -> Float[Array, "b n d"]:
    """The result of layer number `layer`, counted from the end: -1 is the last layer.

    Raises:
      ValueError: there is no such layer.
    """
    if not -self.num_hidden_layers <= layer <= -1:
      raise ValueError(f"CLIP: layer {layer} is not one of -{self.num_hidden_layers} .. -1")
    cls = nn.remat(Layer, prevent_cse=not self.scan_layers) if self.remat else Layer
    fields = {
      "num_attention_heads": self.num_attention_heads,
      "intermediate_size": self.intermediate_size,
      "hidden_act": self.hidden_act,
      "layer_norm_eps": self.layer_norm_eps,
      "causal": self.causal,
      "impl": self.impl,
      "return_states": layer != -1,
      "dtype": self.dtype,
      "param_dtype": self.param_dtype,
    }
    if self.scan_layers:
      stack = nn.scan(
        cls, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.num_hidden_layers
      )
      x, states = stack(name="layers", **fields)(x, None)
    else:
      states = []
      for i in range(self.num_hidden_layers):
        x, state = cls(name=f"layers_{i}", **fields)(x, None)
        states.append(state)
    return x if layer == -1 else states[layer]


class TextEmbeddings(nn.Module):
  """Token embeddings plus learned position embeddings."""

  vocab_size: int
  max_position_embeddings: int
  hidden_size: int
  dtype: Dtype
  param_dtype: Dtype

  @nn.compact
  def __call__(self, input_ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
    length = input_ids.shape[1]
    if length > self.max_position_embeddings:
      raise ValueError(
        f"CLIP: {length} tokens, but max_position_embeddings is {self.max_position_embeddings}"
      )

    def embed(rows: int, name: str) -> nn.Embed:
      return nn.Embed(
        rows,
        self.hidden_size,
        embedding_init=nn.initializers.normal(POSITION_STD),
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )

    tokens = embed(self.vocab_size, "token_embedding")(input_ids)
    positions = embed(self.max_position_embeddings, "position_embedding")
    return tokens + positions(jnp.arange(length))[None]


class VisionEmbeddings(nn.Module):
  """A class token, then one token a patch in row order, plus learned position embeddings."""

  image_size: int
  patch_size: int
  hidden_size: int
  dtype: Dtype
  param_dtype: Dtype

  @nn.compact
  def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
    if pixels.shape[1:3] != (self.image_size, self.image_size):
      raise ValueError(
        f"CLIP: pixels are {pixels.shape[1]}x{pixels.shape[2]}, but image_size is {self.image_size}"
      )
    batch, width = pixels.shape[0], self.hidden_size
    normal = nn.initializers.normal(POSITION_STD)
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    patches = nn.Conv(
      width,
      kernel_size=(self.patch_size, self.patch_size),
      strides=(self.patch_size, self.patch_size),
      padding="VALID",
      use_bias=False,
      name="patch_embedding",
      **types,
    )(pixels)
    patches = patches.reshape(batch, -1, width)
    first = self.param("class_embedding", normal, (width,), self.param_dtype)
    first = jnp.broadcast_to(first.astype(patches.dtype), (batch, 1, width))
    tokens = jnp.concatenate([first, patches], axis=1)
    count = tokens.shape[1]
    positions = nn.Embed(count, width, embedding_init=normal, name="position_embedding", **types)
    return tokens + positions(jnp.arange(count))[None]


class ClipText(nn.Module):
  """The text tower (transformers' CLIPTextModel)."""

  vocab_size: int = 49408
  max_position_embeddings: int = 77
  hidden_size: int = 512
  intermediate_size: int = 2048
  num_hidden_layers: int = 12
  num_attention_heads: int = 8
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  eos_token_id: int = 49407
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32
  scan_layers: bool = False
  remat: bool = False
  impl: str = "auto"

  @classmethod
  def from_json(cls, config: dict, **options: Any) -> "ClipText":
    """The tower that a config.json describes.

    Args:
      config: the parsed file.
      options: dtype, param_dtype, scan_layers, remat and impl.

    Raises:
      ValueError: a key has a value that is not implemented.
    """
    return from_config(cls, TEXT_KEYS, config, **options)

  @nn.compact
  def __call__(
    self, input_ids: Int[Array, "b n"], layer: int = -1
  ) -> tuple[Float[Array, "b n d"], Float[Array, "b d"]]:
    """Hidden states after the final norm, and the state of the end-of-text token.

    Attention is causal, so padding after the end-of-text token changes neither its state nor any
    state before it.

    Args:
      input_ids: token ids.
      layer: the layer whose result goes through the final norm; -2 is the penultimate one, which
        diffusers calls `clip_skip = 1`.
    """
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = TextEmbeddings(
      vocab_size=self.vocab_size,
      max_position_embeddings=self.max_position_embeddings,
      hidden_size=self.hidden_size,
      name="embeddings",
      **types,
    )(input_ids)
    x = _encoder(self, causal=True)(x, layer)
    x = layer_norm(self, "final_layer_norm")(x)
    # The configs of OpenAI's towers say eos_token_id = 2 by mistake. transformers then takes the
    # highest id of the row.
    if self.eos_token_id == 2:
      score = input_ids
    else:
      score = (input_ids == self.eos_token_id).astype(jnp.int32)
    index = jnp.argmax(score, axis=-1)  # of equal scores the first, as in torch
    return x, jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]


class ClipVision(nn.Module):
  """The vision tower (transformers' CLIPVisionModel)."""

  image_size: int = 224
  patch_size: int = 32
  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32
  scan_layers: bool = False
  remat: bool = False
  impl: str = "auto"

  @classmethod
  def from_json(cls, config: dict, **options: Any) -> "ClipVision":
    """The tower that a config.json describes.

    Args:
      config: the parsed file.
      options: dtype, param_dtype, scan_layers, remat and impl.

    Raises:
      ValueError: a key has a value that is not implemented.
    """
    return from_config(cls, VISION_KEYS, config, **options)

  @nn.compact
  def __call__(
    self, pixels: Float[Array, "b h w c"], layer: int = -1
  ) -> tuple[Float[Array, "b n d"], Float[Array, "b d"]]:
    """Hidden states, without a final norm as in transformers, and the normed class token.

    Args:
      pixels: `[batch, image_size, image_size, 3]`, normalised with the mean and the
        standard deviation of the checkpoint.
      layer: the layer whose result is returned and pooled; -2 is the penultimate one.
    """
    x = VisionEmbeddings(
      image_size=self.image_size,
      patch_size=self.patch_size,
      hidden_size=self.hidden_size,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name="embeddings",
    )(pixels)
    x = layer_norm(self, "pre_layrnorm")(x)  # every published file has this spelling
    x = _encoder(self, causal=False)(x, layer)
    return x, layer_norm(self, "post_layernorm")(x[:, 0])


def _encoder(tower: ClipText | ClipVision, causal: bool) -> Encoder:
  """The layers of a tower, from the tower's fields."""
  return Encoder(
    num_hidden_layers=tower.num_hidden_layers,
    num_attention_heads=tower.num_attention_heads,
    intermediate_size=tower.intermediate_size,
    hidden_act=tower.hidden_act,
    layer_norm_eps=tower.layer_norm_eps,
    causal=causal,
    impl=tower.impl,
    scan_layers=tower.scan_layers,
    remat=tower.remat,
    dtype=tower.dtype,
    param_dtype=tower.param_dtype,
    name="encoder",
  )


class Clip(nn.Module):
  """Both towers with their projections into one space, and the temperature (transformers'
  CLIPModel).
  """

  text_model: ClipText
  vision_model: ClipVision
  projection_dim: int = 512
  logit_scale_init_value: float = 2.6592  # log(1 / 0.07)

  @classmethod
  def from_json(cls, config: dict, **options: Any) -> "Clip":
    """The model that the config.json of a CLIPModel describes.

    Args:
      config: the parsed file.
      options: dtype, param_dtype, scan_layers, remat and impl, for both towers.

    Raises:
      ValueError: a key has a value that is not implemented.
    """
    fields = published.read("CLIPModel's config.json", config, KEYS)
    # transformers take the older sections, which files of 2022 have beside the newer ones.
    text, vision = (
      fields.pop(f"{tower}_config") if older is None else older
      for tower in ("text", "vision")
      for older in (fields.pop(f"{tower}_config_dict"),)
    )
    return cls(
      text_model=ClipText.from_json(text, **options),
      vision_model=ClipVision.from_json(vision, **options),
      projection_dim=fields["projection_dim"],
      logit_scale_init_value=fields["logit_scale_init_value"],
    )

  def setup(self):
    def projection() -> Dense:
      return Dense(
        self.projection_dim,
        use_bias=False,
        dtype=self.text_model.dtype,
        param_dtype=self.text_model.param_dtype,
      )

    self.text_projection = projection()
    self.visual_projection = projection()
    init = nn.initializers.constant(self.logit_scale_init_value)
    self.logit_scale = self.param("logit_scale", init, (), self.text_model.param_dtype)

  def text_features(self, input_ids: Int[Array, "b n"]) -> Float[Array, "b p"]:
    """Projected text embeddings, not normalised."""
    return self.text_projection(self.text_model(input_ids)[1])

  def image_features(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b p"]:
    """Projected image embeddings, not normalised; for `pixels` see `ClipVision`."""
    return self.visual_projection(self.vision_model(pixels)[1])

  def __call__(
    self, input_ids: Int[Array, "b n"], pixels: Float[Array, "m h w c"]
  ) -> tuple[Float[Array, "b p"], Float[Array, "m p"], Float[Array, ""]]:
    """Text embeddings and image embeddings of length 1, and the factor that turns their products
    into logits, all in float32.
    """
    text = _normalise(self.text_features(input_ids))
    image = _normalise(self.image_features(pixels))
    return text, image, jnp.exp(self.logit_scale.astype(jnp.float32))


_TOWER_HARMLESS = {
  **TRANSFORMERS_HARMLESS,
  "projection_dim": "the projections belong to the CLIPModel",
}
TEXT_KEYS = keys_of(
  ClipText,
  neutral={**TRANSFORMERS_NEUTRAL, "model_type": ("clip_text_model", "clip")},
  harmless=_TOWER_HARMLESS,
)
VISION_KEYS = keys_of(
  ClipVision,
  neutral={
    **TRANSFORMERS_NEUTRAL,
    "model_type": ("clip_vision_model", "clip"),
    "num_channels": (3,),
  },
  harmless={**_TOWER_HARMLESS, "eos_token_id": "pictures have no tokens"},
)
KEYS = published.Keys(
  used={
    "projection_dim": Clip.projection_dim,
    "logit_scale_init_value": Clip.logit_scale_init_value,
    "text_config": {},
    "vision_config": {},
    "text_config_dict": None,
    "vision_config_dict": None,
  },
  neutral={**TRANSFORMERS_NEUTRAL, "model_type": ("clip",)},
  harmless={**TRANSFORMERS_HARMLESS, "eos_token_id": "stands in text_config"},
)

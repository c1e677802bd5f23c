"""CLIP text and vision towers, with the parameter names of transformers' CLIPTextModel,
CLIPVisionModel and CLIPModel.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv
2103.00020. Fields carry the names of config.json; their defaults are those of transformers' config
classes, which published files leave out. Activations are `[batch, tokens, width]`. Attention
weights and norms are computed in float32 whatever `dtype` is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dancegrpo_jax.models.attention import attention


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """x * sigmoid(1.702 x): OpenAI's approximation of GELU."""
  return x * jax.nn.sigmoid(1.702 * x)


def activation(name: str) -> Callable:
  """The activation that `hidden_act` names. ValueError for one that no CLIP checkpoint uses."""
  # "gelu" is the exact one in transformers, while jax.nn.gelu approximates unless told
  known = {"quick_gelu": quick_gelu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}
  if name not in known:
    raise ValueError(f"CLIP: hidden_act = {name!r} is not supported; known: {', '.join(known)}")
  return known[name]


def _fields(cls, config: dict) -> dict:
  """The entries of a config.json that are fields of a module class; the rest (dropout, initialisers
  ...) does not matter here.
  """
  names = {field.name for field in dataclasses.fields(cls)} - {"parent", "name"}
  return {key: value for key, value in config.items() if key in names}


def _normalise(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
  """Rows scaled to length 1, in float32."""
  x = x.astype(jnp.float32)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class Attention(nn.Module):
  """Multi-head self-attention with biases on all four projections."""

  num_attention_heads: int
  causal: bool
  impl: str
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    width = x.shape[-1]
    if width % self.num_attention_heads:
      raise ValueError(
        f"CLIP: hidden_size {width} is not divisible by num_attention_heads"
        f" {self.num_attention_heads}"
      )

    def project(name):
      return nn.Dense(width, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

    shape = (*x.shape[:-1], self.num_attention_heads, width // self.num_attention_heads)
    q, k, v = (project(f"{name}_proj")(x).reshape(shape) for name in "qkv")
    y = attention(q, k, v, causal=self.causal, impl=self.impl)
    return project("out_proj")(y.reshape(x.shape))


class Mlp(nn.Module):
  """Two dense layers with an activation between."""

  intermediate_size: int
  hidden_act: str
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    hidden = activation(self.hidden_act)(nn.Dense(self.intermediate_size, name="fc1", **options)(x))
    return nn.Dense(x.shape[-1], name="fc2", **options)(hidden)


def layer_norm(owner, name: str) -> nn.LayerNorm:
  """torch's LayerNorm: two-pass variance, and the epsilon of `owner`'s config."""
  return nn.LayerNorm(
    epsilon=owner.layer_norm_eps,
    use_fast_variance=False,
    dtype=owner.dtype,
    param_dtype=owner.param_dtype,
    name=name,
  )


class Layer(nn.Module):
  """A pre-norm transformer layer, in the (carry, output) form of nn.scan; the output is the layer's
  own result.
  """

  num_attention_heads: int
  intermediate_size: int
  hidden_act: str
  layer_norm_eps: float
  causal: bool
  impl: str
  keep: bool  # hand out every layer's result, for callers that want an earlier one
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"], _: None) -> tuple:
    options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    attend = Attention(
      self.num_attention_heads, self.causal, self.impl, name="self_attn", **options
    )
    x = x + attend(layer_norm(self, "layer_norm1")(x))
    x = x + Mlp(self.intermediate_size, self.hidden_act, name="mlp", **options)(
      layer_norm(self, "layer_norm2")(x)
    )
    return x, (x if self.keep else None)


class Encoder(nn.Module):
  """The layers; with `scan_layers` their parameters are stacked on axis 0 of `layers`, else in
  `layers_0`, `layers_1` ...
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
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"], layer: int = -1) -> Float[Array, "b n d"]:
    """The result of layer number `layer`, counted from the end: -1 is the last, -2 the one
    before.
    """
    if not -self.num_hidden_layers <= layer <= -1:
      raise ValueError(f"CLIP: layer {layer} is not one of -{self.num_hidden_layers} .. -1")
    keep = layer != -1
    cls = nn.remat(Layer, prevent_cse=not self.scan_layers) if self.remat else Layer
    args = (
      self.num_attention_heads,
      self.intermediate_size,
      self.hidden_act,
      self.layer_norm_eps,
      self.causal,
      self.impl,
      keep,
    )
    options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    if self.scan_layers:
      stack = nn.scan(
        cls, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.num_hidden_layers
      )
      x, states = stack(*args, name="layers", **options)(x, None)
    else:
      states = []
      for i in range(self.num_hidden_layers):
        x, state = cls(*args, name=f"layers_{i}", **options)(x, None)
        states.append(state)
    return states[layer] if keep else x


class TextEmbeddings(nn.Module):
  """Token plus learned position embeddings."""

  vocab_size: int
  max_position_embeddings: int
  hidden_size: int
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, input_ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
    length = input_ids.shape[1]
    if length > self.max_position_embeddings:
      raise ValueError(
        f"CLIP: {length} tokens, but max_position_embeddings is {self.max_position_embeddings}"
      )
    options = {
      "dtype": self.dtype,
      "param_dtype": self.param_dtype,
      "embedding_init": nn.initializers.normal(0.02),
    }
    tokens = nn.Embed(self.vocab_size, self.hidden_size, name="token_embedding", **options)(
      input_ids
    )
    positions = nn.Embed(
      self.max_position_embeddings, self.hidden_size, name="position_embedding", **options
    )
    return tokens + positions(jnp.arange(length))[None]


class VisionEmbeddings(nn.Module):
  """A class token, then one token a patch in row order, plus learned position embeddings."""

  image_size: int
  patch_size: int
  hidden_size: int
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
    if pixels.shape[1:3] != (self.image_size, self.image_size):
      raise ValueError(
        f"CLIP: pixels are {pixels.shape[1]}x{pixels.shape[2]}, but image_size is {self.image_size}"
      )
    normal, options = (
      nn.initializers.normal(0.02),
      {"dtype": self.dtype, "param_dtype": self.param_dtype},
    )
    patch = (self.patch_size, self.patch_size)
    patches = nn.Conv(
      self.hidden_size,
      patch,
      patch,
      padding="VALID",
      use_bias=False,
      name="patch_embedding",
      **options,
    )(pixels)
    patches = patches.reshape(pixels.shape[0], -1, self.hidden_size)
    first = self.param("class_embedding", normal, (self.hidden_size,), self.param_dtype).astype(
      patches.dtype
    )
    tokens = jnp.concatenate(
      [jnp.broadcast_to(first, (pixels.shape[0], 1, self.hidden_size)), patches], axis=1
    )
    positions = nn.Embed(
      tokens.shape[1], self.hidden_size, embedding_init=normal, name="position_embedding", **options
    )
    return tokens + positions(jnp.arange(tokens.shape[1]))[None]


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
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  scan_layers: bool = False
  remat: bool = False
  impl: str = "auto"

  @classmethod
  def from_json(cls, config: dict, **options) -> "ClipText":
    """The tower that a config.json describes; options: dtype, param_dtype, scan_layers, remat,
    impl.
    """
    return cls(**(_fields(cls, config) | options))

  @nn.compact
  def __call__(
    self, input_ids: Int[Array, "b n"], layer: int = -1
  ) -> tuple[Float[Array, "b n d"], Float[Array, "b d"]]:
    """Hidden states after the final norm, and the one at the end-of-text token.

    Attention is causal, so padding after the end-of-text token changes neither its state nor any
    before it.

    Args:
      input_ids: token ids.
      layer: which layer's result goes through the final norm; -2 is the penultimate (`clip_skip =
        1`).
    """
    options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = TextEmbeddings(
      self.vocab_size, self.max_position_embeddings, self.hidden_size, name="embeddings", **options
    )(input_ids)
    x = _encoder(self, causal=True, name="encoder")(x, layer)
    x = layer_norm(self, "final_layer_norm")(x)
    # eos_token_id 2 stands in the configs of OpenAI's towers by mistake; transformers then takes
    # the highest id of the row
    score = (
      input_ids if self.eos_token_id == 2 else (input_ids == self.eos_token_id).astype(jnp.int32)
    )
    index = jnp.argmax(score, axis=-1)  # the first of equals, as in torch
    return x, jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]


class ClipVision(nn.Module):
  """The vision tower (transformers' CLIPVisionModel)."""

  image_size: int = 224
  patch_size: int = 32
  num_channels: int = 3
  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  scan_layers: bool = False
  remat: bool = False
  impl: str = "auto"

  @classmethod
  def from_json(cls, config: dict, **options) -> "ClipVision":
    """The tower that a config.json describes; options: dtype, param_dtype, scan_layers, remat,
    impl.
    """
    return cls(**(_fields(cls, config) | options))

  @nn.compact
  def __call__(
    self, pixels: Float[Array, "b h w c"], layer: int = -1
  ) -> tuple[Float[Array, "b n d"], Float[Array, "b d"]]:
    """Hidden states (without a final norm, as transformers') and the normed class token.

    Args:
      pixels: `[batch, image_size, image_size, num_channels]`, normalised with the checkpoint's mean
        and std.
      layer: which layer's result is returned and pooled; -2 is the penultimate.
    """
    options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = VisionEmbeddings(
      self.image_size, self.patch_size, self.hidden_size, name="embeddings", **options
    )(pixels)
    x = layer_norm(self, "pre_layrnorm")(x)  # sic: the spelling of every published file
    x = _encoder(self, causal=False, name="encoder")(x, layer)
    return x, layer_norm(self, "post_layernorm")(x[:, 0])


def _encoder(tower, causal: bool, name: str) -> Encoder:
  """The layers of a tower, from its fields."""
  return Encoder(
    tower.num_hidden_layers,
    tower.num_attention_heads,
    tower.intermediate_size,
    tower.hidden_act,
    tower.layer_norm_eps,
    causal,
    tower.impl,
    tower.scan_layers,
    tower.remat,
    tower.dtype,
    tower.param_dtype,
    name=name,
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
  def from_json(cls, config: dict, **options) -> "Clip":
    """The model that a CLIPModel config.json describes; options: dtype, param_dtype, scan_layers,
    remat, impl.
    """
    text = ClipText.from_json(config["text_config"], **options)
    vision = ClipVision.from_json(config["vision_config"], **options)
    return cls(
      text,
      vision,
      **_fields(cls, {key: value for key, value in config.items() if not isinstance(value, dict)}),
    )

  def setup(self):
    def projection():
      return nn.Dense(
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
    """Projected image embeddings, not normalised, of pixels normalised with the checkpoint's mean
    and std.
    """
    return self.visual_projection(self.vision_model(pixels)[1])

  def __call__(
    self, input_ids: Int[Array, "b n"], pixels: Float[Array, "m h w c"]
  ) -> tuple[Float[Array, "b p"], Float[Array, "m p"], Float[Array, ""]]:
    """Text and image embeddings of length 1, and the factor that turns their products into logits;
    all float32.
    """
    text, image = _normalise(self.text_features(input_ids)), _normalise(self.image_features(pixels))
    return text, image, jnp.exp(self.logit_scale.astype(jnp.float32))

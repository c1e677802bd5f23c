"""A decoder language model, of which the states of a text are used: LlamaModel, with transformers'
parameter names.

Attention is causal, so that tokens after the end of a text change none of its states, and no mask
is needed. Groups of query heads share a key and value head (arXiv 2305.13245). Norms, rotations,
logits and softmax are computed in float32 whatever `dtype` is.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dancegrpo_jax import published
from dancegrpo_jax.models.attention import attention
from dancegrpo_jax.models.blocks import repeated
from dancegrpo_jax.models.config import TRANSFORMERS_HARMLESS, TRANSFORMERS_NEUTRAL
from dancegrpo_jax.models.layers import Dense, Dtype, RMSNorm
from dancegrpo_jax.models.rotary import Rotation, rotate_halves, rotation


class SelfAttention(nn.Module):
  """Causal attention of `heads` query heads and `kv_heads` key and value heads."""

  heads: int
  kv_heads: int
  head_dim: int
  qkv_bias: bool
  out_bias: bool
  impl: str
  dtype: Dtype
  param_dtype: Dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"], by: Rotation) -> Float[Array, "b n d"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def project(name: str, heads: int) -> Array:
      y = Dense(heads * self.head_dim, use_bias=self.qkv_bias, name=f"{name}_proj", **types)(x)
      return y.reshape(*x.shape[:2], heads, self.head_dim)

    q, k, v = project("q", self.heads), project("k", self.kv_heads), project("v", self.kv_heads)
    q, k = rotate_halves(q, by), rotate_halves(k, by)
    # Not every kernel, and no mesh axis that splits heads, takes fewer heads of keys.
    k, v = (jnp.repeat(y, self.heads // self.kv_heads, axis=2) for y in (k, v))
    y = attention(q, k, v, causal=True, impl=self.impl).reshape(*x.shape[:2], -1)
    return Dense(x.shape[-1], use_bias=self.out_bias, name="o_proj", **types)(y)


class GatedDense(nn.Module):
  """The product of two projections, the first one through silu, is projected back."""

  features: int
  bias: bool
  dtype: Dtype
  param_dtype: Dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    types = {"use_bias": self.bias, "dtype": self.dtype, "param_dtype": self.param_dtype}
    gate = nn.silu(Dense(self.features, name="gate_proj", **types)(x))
    hidden = gate * Dense(self.features, name="up_proj", **types)(x)
    return Dense(x.shape[-1], name="down_proj", **types)(hidden)


class Layer(nn.Module):
  """Attention and feed-forward, each with a norm before it, in the (carry, output) form that
  nn.scan needs.
  """

  heads: int
  kv_heads: int
  head_dim: int
  intermediate_size: int
  epsilon: float
  qkv_bias: bool
  out_bias: bool
  mlp_bias: bool
  impl: str
  dtype: Dtype
  param_dtype: Dtype

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"], by: Rotation) -> tuple:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    attend = SelfAttention(
      heads=self.heads,
      kv_heads=self.kv_heads,
      head_dim=self.head_dim,
      qkv_bias=self.qkv_bias,
      out_bias=self.out_bias,
      impl=self.impl,
      name="self_attn",
      **types,
    )
    x = x + attend(RMSNorm(self.epsilon, name="input_layernorm", **types)(x), by)
    y = RMSNorm(self.epsilon, name="post_attention_layernorm", **types)(x)
    return x + GatedDense(self.intermediate_size, self.mlp_bias, name="mlp", **types)(y), None


class DecoderLM(nn.Module):
  """From token ids to states.

  Attributes:
    layers: the number of layers that are run.
    final_norm: whether the states go through the norm that follows the last layer.
    scan_blocks: whether the parameters of the layers are stacked on axis 0 of `layers`; otherwise
      they are in `layers_0`, `layers_1` and so on.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  epsilon: float
  theta: float
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  final_norm: bool = True
  scan_blocks: bool = False
  impl: str = "auto"
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, input_ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = nn.Embed(self.vocab_size, self.hidden_size, name="embed_tokens", **types)(input_ids)
    by = rotation(np.arange(x.shape[1])[:, None], (self.head_dim,), self.theta)
    blocks = repeated(
      Layer,
      *(self.heads, self.kv_heads, self.head_dim, self.intermediate_size, self.epsilon),
      *(self.qkv_bias, self.out_bias, self.mlp_bias),
      *(self.impl, self.dtype, self.param_dtype),
      count=self.layers,
      name="layers",
      scan_blocks=self.scan_blocks,
      remat=False,
    )
    x = blocks(x, by)
    return RMSNorm(self.epsilon, name="norm", **types)(x) if self.final_norm else x


# The keys of a Llama's config.json, with transformers' defaults.
KEYS = published.Keys(
  used={
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # as many as the others
    "head_dim": None,  # hidden_size / num_attention_heads
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_parameters": None,  # where transformers 5 writes rope_theta
    "attention_bias": False,
    "mlp_bias": False,
  },
  neutral={
    **TRANSFORMERS_NEUTRAL,
    "hidden_act": ("silu",),
    "model_type": ("llama",),
    "pretraining_tp": (1, None),
    "rope_scaling": (None,),
  },
  harmless={
    **TRANSFORMERS_HARMLESS,
    "eos_token_id": "is the tokenizer's business",
    "max_position_embeddings": "positions are angles, and have no end",
  },
  types={
    "num_key_value_heads": (int, type(None)),
    "head_dim": (int, type(None)),
    "rope_parameters": (dict, type(None)),
  },
)
_ROPE_KEYS = published.Keys(
  used={"rope_theta": published.REQUIRED},
  types={"rope_theta": (int, float)},
  neutral={"rope_type": ("default",), "type": ("default",)},
)


def from_json(
  config_json: dict,
  dtype: Dtype = jnp.float32,
  param_dtype: Dtype = jnp.float32,
  scan_blocks: bool = False,
  impl: str = "auto",
  layers: int | None = None,
  final_norm: bool = True,
) -> DecoderLM:
  """The language model that a Llama's config.json describes.

  Args:
    config_json: the parsed file.
    dtype, param_dtype, scan_blocks, impl: fields of the network.
    layers: the number of layers to run; None for all. transformers' hidden_states[-3], which
      HunyuanVideo takes, are the states after all layers but two.
    final_norm: whether the norm after the last layer is applied.

  Raises:
    ValueError: a key has a value that is not implemented, numbers of heads don't divide, or the
      file has fewer layers than `layers`.
  """
  file = "LlamaModel's config.json"
  given = published.read(file, config_json, KEYS)
  heads, kv_heads, head_dim = _heads(file, given)
  total = given["num_hidden_layers"]
  if layers is not None and not 0 < layers <= total:
    raise ValueError(f"{file}: num_hidden_layers is {total}, and {layers} layers are needed")
  return DecoderLM(
    vocab_size=given["vocab_size"],
    hidden_size=given["hidden_size"],
    intermediate_size=given["intermediate_size"],
    layers=total if layers is None else layers,
    heads=heads,
    kv_heads=kv_heads,
    head_dim=head_dim,
    epsilon=given["rms_norm_eps"],
    theta=_theta(file, config_json, given),
    qkv_bias=given["attention_bias"],
    out_bias=given["attention_bias"],
    mlp_bias=given["mlp_bias"],
    final_norm=final_norm,
    scan_blocks=scan_blocks,
    impl=impl,
    dtype=dtype,
    param_dtype=param_dtype,
  )


def _heads(file: str, given: dict) -> tuple[int, int, int]:
  """The number of query heads, that of key and value heads, and their width."""
  heads, width = given["num_attention_heads"], given["hidden_size"]
  kv_heads = given["num_key_value_heads"] or heads
  if heads % kv_heads:
    raise ValueError(
      f"{file}: num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}"
    )
  head_dim = given["head_dim"] or width // heads
  if head_dim % 2 or (given["head_dim"] is None and width % heads):
    raise ValueError(
      f"{file}: hidden_size {width} does not divide into {heads} heads of an even width; head_dim"
      " gives the width otherwise"
    )
  return heads, kv_heads, head_dim


def _theta(file: str, config_json: dict, given: dict) -> float:
  """The base of the rotations, which transformers 5 writes into `rope_parameters`."""
  if given["rope_parameters"] is None:
    return given["rope_theta"]
  name = f"{file}: rope_parameters"
  newer = {"rope_theta": given["rope_theta"], **given["rope_parameters"]}
  theta = published.read(name, newer, _ROPE_KEYS)["rope_theta"]
  if config_json.get("rope_theta", theta) != theta:
    raise ValueError(
      f"{name} have rope_theta {theta}, and rope_theta is {given['rope_theta']}; they must agree"
    )
  return theta

"""UNet2DConditionModel of Stable Diffusion 1.x and 2.x, in diffusers' layout and names."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dancegrpo_jax.models.attention import Transformer2D
from dancegrpo_jax.models.config import from_config, keys_of, require_lengths
from dancegrpo_jax.models.embeddings import TimeEmbedding, sinusoid
from dancegrpo_jax.models.layers import Conv, Downsample, Dtype, GroupNorm, ResnetBlock, Upsample

# Keys of config.json that are not fields. Of each, only this value is implemented, which is
# diffusers' default.
# {kind of block: whether it has attention}.
_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}


class Block(nn.Module):
  """The part that all stages of the UNet share: resnets, each followed by a transformer unless
  `heads` is 0.
  """

  features: int
  resnets: int
  heads: int
  transformer_layers: int
  groups: int
  epsilon: float
  linear_projection: bool
  remat: bool
  impl: str
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  def layer(self, j: int, x: Array, time: Array, context: Array, attend: bool = True) -> Array:
    """Resnet number `j` and, with `attend` and unless `heads` is 0, transformer number `j`."""
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    resnet, transformer = (nn.remat(m) if self.remat else m for m in (ResnetBlock, Transformer2D))
    x = resnet(self.features, self.groups, self.epsilon, name=f"resnets_{j}", **types)(x, time)
    if attend and self.heads:
      x = transformer(
        heads=self.heads,
        layers=self.transformer_layers,
        groups=self.groups,
        linear_projection=self.linear_projection,
        impl=self.impl,
        name=f"attentions_{j}",
        **types,
      )(x, context)
    return x


class DownBlock(Block):
  """A stage that halves height and width at its end, unless it is the last stage.

  It returns the feature maps of the skip connections too.
  """

  downsample: bool = True

  @nn.compact
  def __call__(self, x: Array, time: Array, context: Array) -> tuple[Array, list[Array]]:
    skips = []
    for j in range(self.resnets):
      x = self.layer(j, x, time, context)
      skips.append(x)
    if self.downsample:
      types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
      x = Downsample(self.features, padding=1, name="downsamplers_0", **types)(x)
      skips.append(x)
    return x, skips


class MidBlock(Block):
  """A resnet, a transformer and another resnet."""

  @nn.compact
  def __call__(self, x: Array, time: Array, context: Array) -> Array:
    x = self.layer(0, x, time, context)
    return self.layer(1, x, time, context, attend=False)


class UpBlock(Block):
  """A stage that doubles height and width at its end, unless it is the last stage.

  It uses the feature maps of the skip connections from the last one on.
  """

  upsample: bool = True

  @nn.compact
  def __call__(self, x: Array, skips: list[Array], time: Array, context: Array) -> Array:
    for j in range(self.resnets):
      x = self.layer(j, jnp.concatenate([x, skips[-1 - j]], axis=-1), time, context)
    if self.upsample:
      types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
      x = Upsample(self.features, name="upsamplers_0", **types)(x)
    return x


class UNet2DConditionModel(nn.Module):
  """Predicts noise (or v) from noisy latents, model time and text states.

  The fields are the keys of the published config.json. `attention_head_dim` is the NUMBER of heads,
  a wrong name that diffusers keeps for compatibility. Where `num_attention_heads` is given, it is
  used instead.
  """

  in_channels: int = 4
  out_channels: int = 4
  flip_sin_to_cos: bool = True
  freq_shift: int | float = 0
  down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
  up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  layers_per_block: int = 2
  cross_attention_dim: int = 1280
  attention_head_dim: int | tuple[int, ...] = 8
  num_attention_heads: int | tuple[int, ...] | None = None
  transformer_layers_per_block: int | tuple[int, ...] = 1
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  use_linear_projection: bool = False
  remat: bool = False
  impl: str = "auto"
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, latents: Float[Array, "b h w i"], time: Float[Array, "b"], context: Float[Array, "b n k"]
  ) -> Float[Array, "b h w o"]:
    """The prediction.

    Args:
      latents: `[b, h, w, in_channels]`.
      time: model times from 0 to 999, as floats.
      context: the text states, `[b, tokens, cross_attention_dim]`.
    """
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    widths = tuple(self.block_out_channels)
    stages = len(widths)
    context = context.astype(self.dtype)
    embedded = sinusoid(time, widths[0], self.flip_sin_to_cos, self.freq_shift).astype(self.dtype)
    time = TimeEmbedding(4 * widths[0], name="time_embedding", **types)(embedded)

    x = Conv(widths[0], name="conv_in", **types)(latents)
    skips = [x]
    for i, kind in enumerate(self.down_block_types):
      fields = self._fields_of_stage(i, self.layers_per_block, attend=_DOWN[kind])
      down = DownBlock(**fields, downsample=i < stages - 1, name=f"down_blocks_{i}")
      x, new = down(x, time, context)
      skips += new
    fields = self._fields_of_stage(stages - 1, 2, attend=True)
    x = MidBlock(**fields, name="mid_block")(x, time, context)
    for i, kind in enumerate(self.up_block_types):
      count = self.layers_per_block + 1
      skips, used = skips[:-count], skips[-count:]
      fields = self._fields_of_stage(stages - 1 - i, count, attend=_UP[kind])
      up = UpBlock(**fields, upsample=i < stages - 1, name=f"up_blocks_{i}")
      x = up(x, used, time, context)
    x = nn.silu(GroupNorm(self.norm_num_groups, self.norm_eps, name="conv_norm_out", **types)(x))
    return Conv(self.out_channels, zero_init=True, name="conv_out", **types)(x)

  def _fields_of_stage(self, i: int, resnets: int, attend: bool) -> dict[str, Any]:
    """The fields of the block that works at the width of stage `i`."""
    stages = len(self.block_out_channels)
    heads = self.attention_head_dim
    if self.num_attention_heads is not None:
      heads = self.num_attention_heads
    return {
      "features": self.block_out_channels[i],
      "resnets": resnets,
      "heads": _per_stage(heads, stages)[i] if attend else 0,
      "transformer_layers": _per_stage(self.transformer_layers_per_block, stages)[i],
      "groups": self.norm_num_groups,
      "epsilon": self.norm_eps,
      "linear_projection": self.use_linear_projection,
      "remat": self.remat,
      "impl": self.impl,
      "dtype": self.dtype,
      "param_dtype": self.param_dtype,
    }


def _per_stage(value: int | tuple[int, ...], stages: int) -> tuple[int, ...]:
  return (value,) * stages if isinstance(value, int) else tuple(value)


_NUMBER_A_STAGE = (int, list, tuple)
KEYS = keys_of(
  UNet2DConditionModel,
  neutral={
    "act_fn": ("silu",),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_class_embeds": (None,),
    "only_cross_attention": (False, [False] * 4),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
  },
  harmless={
    "addition_embed_type_num_heads": "belongs to addition_embed_type, which is refused",
    "addition_time_embed_dim": "belongs to addition_embed_type",
    "class_embeddings_concat": "belongs to class_embed_type, which is refused",
    "dropout": "is off here, as in diffusers' pipelines",
    "projection_class_embeddings_input_dim": "belongs to class_embed_type",
    "sample_size": "the size of the pictures is config.model.size",
    "upcast_attention": "attention weights are computed in float32 here",
  },
  types={
    "attention_head_dim": _NUMBER_A_STAGE,
    "freq_shift": (int, float),
    "num_attention_heads": (*_NUMBER_A_STAGE, type(None)),
    "transformer_layers_per_block": _NUMBER_A_STAGE,
  },
)


def from_json(
  config_json: dict,
  dtype: Dtype = jnp.float32,
  param_dtype: Dtype = jnp.float32,
  remat: bool = False,
  impl: str = "auto",
) -> UNet2DConditionModel:
  """The network of a published unet/config.json.

  Raises:
    ValueError: a key has a value that is not implemented.
  """
  network = from_config(
    UNet2DConditionModel,
    KEYS,
    config_json,
    dtype=dtype,
    param_dtype=param_dtype,
    remat=remat,
    impl=impl,
  )
  for key, known in {"down_block_types": _DOWN, "up_block_types": _UP}.items():
    other = set(getattr(network, key)) - set(known)
    if other:
      raise ValueError(
        f"UNet2DConditionModel: {key} holds {sorted(other)}; implemented are {sorted(known)}"
      )
  require_lengths(
    network,
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "attention_head_dim",
    "num_attention_heads",
    "transformer_layers_per_block",
  )
  return network

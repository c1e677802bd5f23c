"""Conversion table of HunyuanVideo's autoencoder.

The names are checked against the inventory of the published file (tests/fixtures/tensors).
"""

from dancegrpo_jax.conversion.table import Table
from dancegrpo_jax.conversion.tables.rows import conv3d, dense, join, norm, under

_RESNET = join(
  norm("norm1"),
  conv3d("conv1.conv"),
  norm("norm2"),
  conv3d("conv2.conv"),
  conv3d("conv_shortcut.conv"),
)

_ATTENTION = join(
  norm("group_norm"), *(dense(name) for name in ("to_q", "to_k", "to_v", "to_out.0"))
)

_RESNETS = under("resnets.{j}", _RESNET)

_HALF = join(
  conv3d("conv_in.conv"),
  under("down_blocks.{i}", join(_RESNETS, conv3d("downsamplers.0.conv.conv"))),
  under("mid_block", join(_RESNETS, under("attentions.{j}", _ATTENTION))),
  under("up_blocks.{i}", join(_RESNETS, conv3d("upsamplers.0.conv.conv"))),
  norm("conv_norm_out"),
  conv3d("conv_out.conv"),
)

AUTOENCODER = Table(
  name="AutoencoderKLHunyuanVideo",
  rows=join(
    under("encoder", _HALF),
    under("decoder", _HALF),
    conv3d("quant_conv"),
    conv3d("post_quant_conv"),
  ),
  file="diffusion_pytorch_model",
)

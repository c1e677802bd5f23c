"""Conversion tables of Stable Diffusion's UNet and of AutoencoderKL.

The names are checked against inventories of the published files (tests/fixtures/tensors).
"""

from dancegrpo_jax.conversion.table import Row, Table
from dancegrpo_jax.conversion.tables import first_release
from dancegrpo_jax.conversion.tables.rows import both, conv, dense, join, norm, tree_path, under

# ---- UNet

RESNET = join(
  norm("norm1"),
  conv("conv1"),
  dense("time_emb_proj"),
  norm("norm2"),
  conv("conv2"),
  conv("conv_shortcut"),
)

ATTENTION = join(*(dense(name, bias=False) for name in ("to_q", "to_k", "to_v")), dense("to_out.0"))

TRANSFORMER_BLOCK = join(
  *(norm(name) for name in ("norm1", "norm2", "norm3")),
  under("attn1", ATTENTION),
  under("attn2", ATTENTION),
  dense("ff.net.0.proj"),
  dense("ff.net.2"),
)

TRANSFORMER_2D = join(
  norm("norm"),
  both("proj_in"),
  under("transformer_blocks.{k}", TRANSFORMER_BLOCK),
  both("proj_out"),
)

UNET_BLOCK = join(under("resnets.{j}", RESNET), under("attentions.{j}", TRANSFORMER_2D))

UNET = Table(
  name="UNet2DConditionModel",
  rows=join(
    conv("conv_in"),
    dense("time_embedding.linear_1"),
    dense("time_embedding.linear_2"),
    under("down_blocks.{i}", join(UNET_BLOCK, conv("downsamplers.0.conv"))),
    under("mid_block", UNET_BLOCK),
    under("up_blocks.{i}", join(UNET_BLOCK, conv("upsamplers.0.conv"))),
    norm("conv_norm_out"),
    conv("conv_out"),
  ),
  file="diffusion_pytorch_model",
  lora_prefix="unet",
  prefixes=("model.diffusion_model.", "diffusion_model.", "unet."),
  dialects=(first_release.UNET,),
)

# ---- Autoencoder

# All projections have biases. They are 1x1 convolutions in the oldest files, which come from the
# latent-diffusion repository, and linear layers in all files of diffusers.
VAE_ATTENTION = join(
  norm("group_norm"),
  *(
    dense(name) + (Row(f"{name}.weight", f"{tree_path(name)}/kernel", "o i 1 1 -> i o"),)
    for name in ("to_q", "to_k", "to_v", "to_out.0")
  ),
)

VAE_BLOCK = join(under("resnets.{j}", RESNET), under("attentions.{j}", VAE_ATTENTION))

AUTOENCODER = Table(
  name="AutoencoderKL",
  rows=join(
    *(
      under(
        half,
        join(
          conv("conv_in"),
          under("down_blocks.{i}", join(VAE_BLOCK, conv("downsamplers.0.conv"))),
          under("mid_block", VAE_BLOCK),
          under("up_blocks.{i}", join(VAE_BLOCK, conv("upsamplers.0.conv"))),
          norm("conv_norm_out"),
          conv("conv_out"),
        ),
      )
      for half in ("encoder", "decoder")
    ),
    conv("quant_conv"),
    conv("post_quant_conv"),
  ),
  # SD 1.x and 2.x were published before diffusers renamed these layers.
  aliases=tuple(
    (f"{half}.mid_block.attentions.0.{old}.{{*}}", f"{half}.mid_block.attentions.0.{new}.{{*}}")
    for half in ("encoder", "decoder")
    for old, new in (
      ("query", "to_q"),
      ("key", "to_k"),
      ("value", "to_v"),
      ("proj_attn", "to_out.0"),
    )
  ),
  file="diffusion_pytorch_model",
  prefixes=("first_stage_model.", "vae."),
  dialects=(first_release.AUTOENCODER,),
)

"""The tables of the networks of Stable Diffusion and FLUX, of CLIP and of T5.

Parameter paths follow the torch names: "." becomes "/", and "_" in front of an index; so most rows need the torch name
alone. Names were checked against the published files' inventories (tests/fixtures/tensors).
"""

import re

from dancegrpo_jax.convert.core import Buffer, Part, Row, Table

Rows = tuple[Row, ...]


def tree_path(name: str) -> str:
  """down_blocks.{i}.resnets.{j}.conv1 -> down_blocks_{i}/resnets_{j}/conv1."""
  return re.sub(r"\.(?=\d|\{)", "_", name).replace(".", "/")


def dense(name: str, bias: bool = True) -> Rows:
  """torch.nn.Linear."""
  weight = Row(f"{name}.weight", f"{tree_path(name)}/kernel", "o i -> i o")
  return (weight, Row(f"{name}.bias", f"{tree_path(name)}/bias", "o -> o")) if bias else (weight,)


def conv(name: str, bias: bool = True) -> Rows:
  """torch.nn.Conv2d."""
  weight = Row(f"{name}.weight", f"{tree_path(name)}/kernel", "o i h w -> h w i o")
  return (weight, Row(f"{name}.bias", f"{tree_path(name)}/bias", "o -> o")) if bias else (weight,)


def norm(name: str) -> Rows:
  """torch.nn.LayerNorm and GroupNorm."""
  return Row(f"{name}.weight", f"{tree_path(name)}/scale", "c -> c"), Row(f"{name}.bias", f"{tree_path(name)}/bias", "c -> c")


def scale(name: str) -> Rows:
  """torch.nn.RMSNorm: a norm without a bias."""
  return norm(name)[:1]


def embedding(name: str) -> Rows:
  """torch.nn.Embedding."""
  return (Row(f"{name}.weight", f"{tree_path(name)}/embedding", "n d -> n d"),)


def both(name: str) -> Rows:
  """A projection that is a 1x1 convolution (SD 1.x) or a linear layer (SD 2.x) in the network as in the file."""
  return conv(name) + dense(name)[:1]


def under(prefix: str, rows: Rows) -> Rows:
  """The rows inside a module."""
  return tuple(r._replace(source=f"{prefix}.{r.source}", target=f"{tree_path(prefix)}/{r.target}") for r in rows)


def join(*groups: Rows) -> Rows:
  return tuple(row for group in groups for row in group)


def layers(source: str, target: str, rows: Rows) -> Rows:
  """The rows of a list of layers, for a network that holds every layer apart and for one that stacks them on axis 0.

  `source` is the list's name in the file, `target` its path in the network; `rows` are those of one layer.
  """
  rows = tuple(r._replace(source=f"{source}.{{i}}.{r.source}") for r in rows)
  apart = tuple(r._replace(target=f"{target}_{{i}}/{r.target}") for r in rows)
  return apart + tuple(r._replace(target=f"{target}/{r.target}", axes=r.axes.replace("->", "-> {i}")) for r in rows)


# ---- Stable Diffusion -----------------------------------------------------------------------------------------------

RESNET = join(norm("norm1"), conv("conv1"), dense("time_emb_proj"), norm("norm2"), conv("conv2"), conv("conv_shortcut"))

ATTENTION = join(*(dense(name, bias=False) for name in ("to_q", "to_k", "to_v")), dense("to_out.0"))

TRANSFORMER_BLOCK = join(
  *(norm(name) for name in ("norm1", "norm2", "norm3")),
  under("attn1", ATTENTION),
  under("attn2", ATTENTION),
  dense("ff.net.0.proj"),
  dense("ff.net.2"),
)

TRANSFORMER_2D = join(norm("norm"), both("proj_in"), under("transformer_blocks.{k}", TRANSFORMER_BLOCK), both("proj_out"))

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
)

# Biases everywhere; 1x1 convolutions in the oldest files of the LDM lineage, linear layers in all diffusers ones.
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
  # SD 1.x and 2.x were published before diffusers renamed these.
  aliases=tuple(
    (f"{half}.mid_block.attentions.0.{old}.{{*}}", f"{half}.mid_block.attentions.0.{new}.{{*}}")
    for half in ("encoder", "decoder")
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
  ),
  file="diffusion_pytorch_model",
)

# ---- FLUX -----------------------------------------------------------------------------------------------------------

FEED_FORWARD = join(dense("net.0.proj"), dense("net.2"))

FLUX_ATTENTION = join(
  *(dense(f"to_{name}") + dense(f"add_{name}_proj") for name in "qkv"),
  *(scale(f"norm_{name}") + scale(f"norm_added_{name}") for name in "qk"),
  dense("to_out.0"),
  dense("to_add_out"),
)

DOUBLE_BLOCK = join(
  dense("norm1.linear"),
  dense("norm1_context.linear"),
  under("attn", FLUX_ATTENTION),
  under("ff", FEED_FORWARD),
  under("ff_context", FEED_FORWARD),
)

SINGLE_BLOCK = join(
  dense("norm.linear"),
  *(dense(f"attn.to_{name}") for name in "qkv"),
  *(scale(f"attn.norm_{name}") for name in "qk"),
  dense("proj_mlp"),
  dense("proj_out"),
)

FLUX = Table(
  name="FluxTransformer2DModel",
  rows=join(
    dense("x_embedder"),
    dense("context_embedder"),
    *(dense(f"time_text_embed.{name}_embedder.linear_{k}") for name in ("timestep", "guidance", "text") for k in (1, 2)),
    layers("transformer_blocks", "transformer_blocks", DOUBLE_BLOCK),
    layers("single_transformer_blocks", "single_transformer_blocks", SINGLE_BLOCK),
    dense("norm_out.linear"),
    dense("proj_out"),
  ),
  file="diffusion_pytorch_model",
)

# ---- T5 -------------------------------------------------------------------------------------------------------------

T5_BLOCK = join(
  under("layer.0", join(scale("layer_norm"), *(dense(f"SelfAttention.{name}", bias=False) for name in "qkvo"))),
  under("layer.1", join(scale("layer_norm"), *(dense(f"DenseReluDense.{name}", bias=False) for name in ("wi_0", "wi_1", "wo")))),
)

T5 = Table(
  name="T5EncoderModel",
  rows=join(
    embedding("shared"),
    layers("encoder.block", "encoder/block", T5_BLOCK),
    (
      # the first layer's in the file, every layer's in the network
      Row(
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "encoder/relative_attention_bias/embedding",
        "n h -> n h",
      ),
    ),
    scale("encoder.final_layer_norm"),
  ),
  copies=(("encoder.embed_tokens.weight", "shared.weight"),),
  others=("decoder.{*}", "lm_head.weight"),
)

# ---- CLIP, transformers' names --------------------------------------------------------------------------------------

CLIP_LAYER = join(
  norm("layer_norm1"),
  *(dense(f"self_attn.{name}_proj") for name in ("q", "k", "v", "out")),
  norm("layer_norm2"),
  dense("mlp.fc1"),
  dense("mlp.fc2"),
)


CLIP_ENCODER = layers("encoder.layers", "encoder/layers", CLIP_LAYER)

TEXT_TOWER = join(
  embedding("embeddings.token_embedding"),
  embedding("embeddings.position_embedding"),
  CLIP_ENCODER,
  norm("final_layer_norm"),
)

VISION_TOWER = join(
  (Row("embeddings.class_embedding", "embeddings/class_embedding", "d -> d"),),
  conv("embeddings.patch_embedding", bias=False),
  embedding("embeddings.position_embedding"),
  norm("pre_layrnorm"),
  CLIP_ENCODER,
  norm("post_layernorm"),
)


def prefixed(prefix: str, rows: Rows) -> Rows:
  """Rows whose tensors carry a prefix that the network's paths lack."""
  return tuple(r._replace(source=prefix + r.source) for r in rows)


def _tower_aliases(prefix: str, modules: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
  """transformers 5.6 dropped the prefix of the single towers; published files and earlier versions have it."""
  return tuple((f"{module}.{{*}}", f"{prefix}{module}.{{*}}") for module in modules)


CLIP_TEXT = Table(
  name="CLIPTextModel",
  rows=prefixed("text_model.", TEXT_TOWER),
  aliases=_tower_aliases("text_model.", ("embeddings", "encoder", "final_layer_norm")),
  buffers=(Buffer("text_model.embeddings.position_ids", "arange"),),
)

CLIP_VISION = Table(
  name="CLIPVisionModel",
  rows=prefixed("vision_model.", VISION_TOWER),
  aliases=_tower_aliases("vision_model.", ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")),
  buffers=(Buffer("vision_model.embeddings.position_ids", "arange"),),
)

CLIP = Table(
  name="CLIPModel",
  rows=join(
    under("text_model", TEXT_TOWER),
    under("vision_model", VISION_TOWER),
    dense("text_projection", bias=False),
    dense("visual_projection", bias=False),
    (Row("logit_scale", "logit_scale", "->"),),
  ),
  buffers=(
    Buffer("text_model.embeddings.position_ids", "arange"),
    Buffer("vision_model.embeddings.position_ids", "arange"),
  ),
)

# ---- CLIP, open_clip's names (LAION, DFN5B, HPS-v2) -----------------------------------------------------------------


def renamed(name: str, rows: Rows) -> Rows:
  """The rows of one module whose tensors have another name in this layout."""
  return tuple(r._replace(source=f"{name}.{r.source.rsplit('.', 1)[-1]}") for r in rows)


def _third(name: str) -> Rows:
  """q, k and v lie one after another along the rows of a single tensor."""
  part = Part("o", "qkv".index(name), "qkv".index(name) + 1, 3)
  return (
    Row("attn.in_proj_weight", f"self_attn/{name}_proj/kernel", "o i -> i o", source_part=part),
    Row("attn.in_proj_bias", f"self_attn/{name}_proj/bias", "o -> o", source_part=part),
  )


OPEN_CLIP_LAYER = join(
  renamed("ln_1", norm("layer_norm1")),
  *(_third(name) for name in "qkv"),
  renamed("attn.out_proj", dense("self_attn.out_proj")),
  renamed("ln_2", norm("layer_norm2")),
  renamed("mlp.c_fc", dense("mlp.fc1")),
  renamed("mlp.c_proj", dense("mlp.fc2")),
)

OPEN_CLIP = Table(
  name="open_clip",
  rows=join(
    (
      Row("token_embedding.weight", "text_model/embeddings/token_embedding/embedding", "n d -> n d"),
      Row("positional_embedding", "text_model/embeddings/position_embedding/embedding", "n d -> n d"),
      Row("text_projection", "text_projection/kernel", "i o -> i o"),
      Row("visual.class_embedding", "vision_model/embeddings/class_embedding", "d -> d"),
      Row("visual.positional_embedding", "vision_model/embeddings/position_embedding/embedding", "n d -> n d"),
      Row("visual.conv1.weight", "vision_model/embeddings/patch_embedding/kernel", "o i h w -> h w i o"),
      Row("visual.proj", "visual_projection/kernel", "i o -> i o"),
      Row("logit_scale", "logit_scale", "->"),
    ),
    renamed("ln_final", norm("text_model.final_layer_norm")),
    renamed("visual.ln_pre", norm("vision_model.pre_layrnorm")),
    renamed("visual.ln_post", norm("vision_model.post_layernorm")),
    layers("transformer.resblocks", "text_model/encoder/layers", OPEN_CLIP_LAYER),
    layers("visual.transformer.resblocks", "vision_model/encoder/layers", OPEN_CLIP_LAYER),
  ),
  file="open_clip_model",
)

# LAION's aesthetic predictor v2: the Linears of a Sequential with dropouts between.
AESTHETIC = Table(name="AestheticHead", rows=dense("layers.{i}"), file="model")

TABLES = {table.name: table for table in (UNET, AUTOENCODER, FLUX, T5, CLIP_TEXT, CLIP_VISION, CLIP, OPEN_CLIP, AESTHETIC)}

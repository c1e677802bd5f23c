"""Conversion tables of FLUX's transformer and of T5's encoder.

The names are checked against inventories of the published files (tests/fixtures/tensors).
"""

from dancegrpo_jax.conversion.table import Row, Table
from dancegrpo_jax.conversion.tables import flux_single_file
from dancegrpo_jax.conversion.tables.flux_lora import FLUX_LORA_NAMES
from dancegrpo_jax.conversion.tables.rows import dense, embedding, join, layers, scale, under

# ---- FLUX

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
    *(
      dense(f"time_text_embed.{name}_embedder.linear_{k}")
      for name in ("timestep", "guidance", "text")
      for k in (1, 2)
    ),
    layers("transformer_blocks", "transformer_blocks", DOUBLE_BLOCK),
    layers("single_transformer_blocks", "single_transformer_blocks", SINGLE_BLOCK),
    dense("norm_out.linear"),
    dense("proj_out"),
  ),
  file="diffusion_pytorch_model",
  lora_names=FLUX_LORA_NAMES,
  prefixes=("model.diffusion_model.", "diffusion_model.", "transformer."),
  dialects=(flux_single_file.FLUX,),
)

# ---- T5

T5_BLOCK = join(
  under(
    "layer.0",
    join(scale("layer_norm"), *(dense(f"SelfAttention.{name}", bias=False) for name in "qkvo")),
  ),
  under(
    "layer.1",
    join(
      scale("layer_norm"),
      *(dense(f"DenseReluDense.{name}", bias=False) for name in ("wi_0", "wi_1", "wo")),
    ),
  ),
)

T5 = Table(
  name="T5EncoderModel",
  rows=join(
    embedding("shared"),
    layers("encoder.block", "encoder/block", T5_BLOCK),
    (
      # The file holds it in the first layer; all layers use it, and the network holds it once.
      Row(
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "encoder/relative_attention_bias/embedding",
        "n h -> n h",
      ),
    ),
    scale("encoder.final_layer_norm"),
  ),
  copies=(("encoder.embed_tokens.weight", "shared.weight"),),
  others=("decoder.{*}", "lm_head.weight", "logit_scale"),
  prefixes=("text_encoders.t5xxl.transformer.", "text_encoder_2."),
)

"""Conversion tables of CLIP, with the names of transformers and of open_clip, and of the aesthetic
head.

The names are checked against inventories of the published files (tests/fixtures/tensors).
"""

from dancegrpo_jax.conversion.table import Buffer, Part, Row, Table
from dancegrpo_jax.conversion.tables import first_release
from dancegrpo_jax.conversion.tables.rows import (
  Rows,
  conv,
  dense,
  embedding,
  join,
  layers,
  norm,
  prefixed,
  renamed,
  under,
)

# ---- CLIP with transformers' names

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


def _tower_aliases(prefix: str, modules: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
  """The spelling of a single tower's tensors since transformers 5.6, which dropped the prefix that
  published files and earlier versions have.
  """
  return tuple((f"{module}.{{*}}", f"{prefix}{module}.{{*}}") for module in modules)


CLIP_TEXT = Table(
  name="CLIPTextModel",
  rows=prefixed("text_model.", TEXT_TOWER),
  aliases=_tower_aliases("text_model.", ("embeddings", "encoder", "final_layer_norm")),
  buffers=(Buffer("text_model.embeddings.position_ids", "arange"),),
  # a CLIPModel's file, and a text encoder's with a projection that its pipeline does not use
  others=("vision_model.{*}", "visual_projection.weight", "text_projection.weight", "logit_scale"),
  prefixes=(
    "cond_stage_model.transformer.",
    "cond_stage_model.model.",
    "text_encoders.clip_l.transformer.",
    "text_encoder.",
  ),
  dialects=(first_release.OPEN_CLIP_TEXT,),
)

CLIP_VISION = Table(
  name="CLIPVisionModel",
  rows=prefixed("vision_model.", VISION_TOWER),
  aliases=_tower_aliases(
    "vision_model.", ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")
  ),
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


# ---- CLIP with open_clip's names (LAION, DFN5B, HPS-v2)


def _third(name: str) -> Rows:
  """The projection q, k or v, which lie one after another along the first axis of one tensor."""
  number = "qkv".index(name)
  part = Part("o", number, number + 1, 3)
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
      Row(
        "token_embedding.weight", "text_model/embeddings/token_embedding/embedding", "n d -> n d"
      ),
      Row(
        "positional_embedding", "text_model/embeddings/position_embedding/embedding", "n d -> n d"
      ),
      Row("text_projection", "text_projection/kernel", "i o -> i o"),
      Row("visual.class_embedding", "vision_model/embeddings/class_embedding", "d -> d"),
      Row(
        "visual.positional_embedding",
        "vision_model/embeddings/position_embedding/embedding",
        "n d -> n d",
      ),
      Row(
        "visual.conv1.weight",
        "vision_model/embeddings/patch_embedding/kernel",
        "o i h w -> h w i o",
      ),
      Row("visual.proj", "visual_projection/kernel", "i o -> i o"),
      Row("logit_scale", "logit_scale", "->"),
    ),
    renamed("ln_final", norm("text_model.final_layer_norm")),
    renamed("visual.ln_pre", norm("vision_model.pre_layrnorm")),
    renamed("visual.ln_post", norm("vision_model.post_layernorm")),
    layers("transformer.resblocks", "text_model/encoder/layers", OPEN_CLIP_LAYER),
    layers("visual.transformer.resblocks", "vision_model/encoder/layers", OPEN_CLIP_LAYER),
  ),
  # open_clip's CustomTextCLIP, which is the same network with its text tower in a module
  aliases=tuple(
    (f"text.{name}", name)
    for name in (
      "token_embedding.{*}",
      "positional_embedding",
      "transformer.{*}",
      "ln_final.{*}",
      "text_projection",
    )
  ),
  # scalars of OpenAI's files, and the mask of causal attention
  others=("input_resolution", "context_length", "vocab_size", "attn_mask", "text.attn_mask"),
  file="open_clip_model",
)

# LAION's aesthetic predictor v2: the Linear layers of a Sequential, with dropouts between them.
AESTHETIC = Table(name="AestheticHead", rows=dense("layers.{i}"), file="model")

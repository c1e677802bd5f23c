"""Conversion table of HunyuanVideo's transformer, whose blocks are FLUX's.

The names are checked against an inventory of the published file (tests/fixtures/tensors).
"""

from dancegrpo_jax.conversion.table import Row, Table
from dancegrpo_jax.conversion.tables.flux import DOUBLE_BLOCK, FEED_FORWARD, SINGLE_BLOCK
from dancegrpo_jax.conversion.tables.hunyuan_video_lora import TENCENT
from dancegrpo_jax.conversion.tables.rows import Rows, dense, join, layers, norm, under


def _embedders(*names: str) -> Rows:
  """The layers that embed the time, the guidance and texts."""
  return join(
    *(dense(f"time_text_embed.{name}_embedder.linear_{k}") for name in names for k in (1, 2))
  )


REFINER_BLOCK = join(
  norm("norm1"),
  under("attn", join(*(dense(name) for name in ("to_q", "to_k", "to_v", "to_out.0")))),
  norm("norm2"),
  under("ff", FEED_FORWARD),
  dense("norm_out.linear"),
)

REFINER = join(
  _embedders("timestep", "text"),
  dense("proj_in"),
  layers("token_refiner.refiner_blocks", "token_refiner/refiner_blocks", REFINER_BLOCK),
)

HUNYUAN_VIDEO = Table(
  name="HunyuanVideoTransformer3DModel",
  rows=join(
    # A convolution over one frame and its 2x2 squares.
    (Row("x_embedder.proj.weight", "x_embedder/proj/kernel", "o c 1 y x -> c y x o"),),
    (Row("x_embedder.proj.bias", "x_embedder/proj/bias", "o -> o"),),
    under("context_embedder", REFINER),
    _embedders("timestep", "guidance", "text"),
    layers("transformer_blocks", "transformer_blocks", DOUBLE_BLOCK),
    layers("single_transformer_blocks", "single_transformer_blocks", SINGLE_BLOCK),
    dense("norm_out.linear"),
    dense("proj_out"),
  ),
  file="diffusion_pytorch_model",
  lora_names=TENCENT,
  prefixes=("transformer.",),
)

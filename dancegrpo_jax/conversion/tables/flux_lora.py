"""What LoRA files call FLUX's layers where they have the names of Black Forest Labs' own code, as
those of kohya's sd-scripts and of ComfyUI, or XLabs' names.

That code holds the projections q, k and v as one layer, and in a single block the first layer of
the feed-forward network with them.
"""

from dancegrpo_jax.conversion.table import LoraName

_DOUBLE, _SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
_IMAGE_QKV = tuple(f"{_DOUBLE}.attn.to_{name}" for name in "qkv")
_TEXT_QKV = tuple(f"{_DOUBLE}.attn.add_{name}_proj" for name in "qkv")
_SINGLE_QKV = tuple(f"{_SINGLE}.attn.to_{name}" for name in "qkv")


def _stream(name: str, attention: tuple[str, ...], out: str, ff: str, norm: str):
  """The layers of a double block for the tokens of the image, or of the text."""
  block = f"double_blocks.{{i}}.{name}"
  return (
    LoraName(f"{block}_attn.qkv", attention),
    LoraName(f"{block}_attn.proj", (f"{_DOUBLE}.attn.{out}",)),
    LoraName(f"{block}_mlp.0", (f"{_DOUBLE}.{ff}.net.0.proj",)),
    LoraName(f"{block}_mlp.2", (f"{_DOUBLE}.{ff}.net.2",)),
    LoraName(f"{block}_mod.lin", (f"{_DOUBLE}.{norm}.linear",)),
  )


def _embedder(name: str, module: str):
  """The two layers that embed the time, the guidance or the pooled text."""
  return (
    LoraName(f"{name}.in_layer", (f"time_text_embed.{module}_embedder.linear_1",)),
    LoraName(f"{name}.out_layer", (f"time_text_embed.{module}_embedder.linear_2",)),
  )


BLACK_FOREST_LABS = (
  *_stream("img", _IMAGE_QKV, "to_out.0", "ff", "norm1"),
  *_stream("txt", _TEXT_QKV, "to_add_out", "ff_context", "norm1_context"),
  LoraName("single_blocks.{i}.linear1", (*_SINGLE_QKV, f"{_SINGLE}.proj_mlp")),
  LoraName("single_blocks.{i}.linear2", (f"{_SINGLE}.proj_out",)),
  LoraName("single_blocks.{i}.modulation.lin", (f"{_SINGLE}.norm.linear",)),
  LoraName("img_in", ("x_embedder",)),
  LoraName("txt_in", ("context_embedder",)),
  *_embedder("time_in", "timestep"),
  *_embedder("guidance_in", "guidance"),
  *_embedder("vector_in", "text"),
  # Their layer gives shift and scale, that of diffusers gives scale and shift.
  LoraName("final_layer.adaLN_modulation.1", ("norm_out.linear",), halves_swapped=True),
  LoraName("final_layer.linear", ("proj_out",)),
)

# 1 is the image's stream and 2 the text's.
_XLABS = (
  LoraName("double_blocks.{i}.qkv1", _IMAGE_QKV),
  LoraName("double_blocks.{i}.proj1", (f"{_DOUBLE}.attn.to_out.0",)),
  LoraName("double_blocks.{i}.qkv2", _TEXT_QKV),
  LoraName("double_blocks.{i}.proj2", (f"{_DOUBLE}.attn.to_add_out",)),
  LoraName("single_blocks.{i}.qkv", _SINGLE_QKV),
  LoraName("single_blocks.{i}.proj", (f"{_SINGLE}.proj_out",)),
)

FLUX_LORA_NAMES = BLACK_FOREST_LABS + _XLABS

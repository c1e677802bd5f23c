"""What LoRA files call HunyuanVideo's layers where they have the names of Tencent's own code, as
those of kohya's musubi-tuner.

That code holds the projections q, k and v as one layer, and in a single block the first layer of
the feed-forward network with them. The names are those that diffusers convert.
"""

from dancegrpo_jax.conversion.table import LoraName

_DOUBLE, _SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
_REFINER = "context_embedder.token_refiner.refiner_blocks.{i}"

Names = tuple[LoraName, ...]


def _qkv(block: str, *names: str) -> tuple[str, ...]:
  """Three layers of a block's attention."""
  return tuple(f"{block}.attn.{name}" for name in names)


_IMAGE_QKV = _qkv(_DOUBLE, "to_q", "to_k", "to_v")
_TEXT_QKV = _qkv(_DOUBLE, "add_q_proj", "add_k_proj", "add_v_proj")
_SINGLE_QKV = _qkv(_SINGLE, "to_q", "to_k", "to_v")
_REFINER_QKV = _qkv(_REFINER, "to_q", "to_k", "to_v")


def _stream(name: str, attention: tuple[str, ...], out: str, ff: str, norm: str) -> Names:
  """The layers of a double block for the tokens of the clip, or of the text."""
  block = f"double_blocks.{{i}}.{name}"
  return (
    LoraName(f"{block}_attn_qkv", attention),
    LoraName(f"{block}_attn_proj", (f"{_DOUBLE}.attn.{out}",)),
    LoraName(f"{block}_mlp.fc1", (f"{_DOUBLE}.{ff}.net.0.proj",)),
    LoraName(f"{block}_mlp.fc2", (f"{_DOUBLE}.{ff}.net.2",)),
    LoraName(f"{block}_mod.linear", (f"{_DOUBLE}.{norm}.linear",)),
  )


def _pair(first: str, second: str, module: str) -> Names:
  """The two layers that embed a number or a text."""
  return LoraName(first, (f"{module}.linear_1",)), LoraName(second, (f"{module}.linear_2",))


def _refiner() -> Names:
  """The layers that refine the text."""
  block, module = "txt_in.individual_token_refiner.blocks.{i}", "context_embedder"
  embedders = f"{module}.time_text_embed"
  return (
    LoraName("txt_in.input_embedder", (f"{module}.proj_in",)),
    *_pair("txt_in.t_embedder.mlp.0", "txt_in.t_embedder.mlp.2", f"{embedders}.timestep_embedder"),
    *_pair(
      "txt_in.c_embedder.linear_1", "txt_in.c_embedder.linear_2", f"{embedders}.text_embedder"
    ),
    LoraName(f"{block}.self_attn_qkv", _REFINER_QKV),
    LoraName(f"{block}.self_attn_proj", (f"{_REFINER}.attn.to_out.0",)),
    LoraName(f"{block}.mlp.fc1", (f"{_REFINER}.ff.net.0.proj",)),
    LoraName(f"{block}.mlp.fc2", (f"{_REFINER}.ff.net.2",)),
    LoraName(f"{block}.adaLN_modulation.1", (f"{_REFINER}.norm_out.linear",)),
  )


TENCENT = (
  *_stream("img", _IMAGE_QKV, "to_out.0", "ff", "norm1"),
  *_stream("txt", _TEXT_QKV, "to_add_out", "ff_context", "norm1_context"),
  LoraName("single_blocks.{i}.linear1", (*_SINGLE_QKV, f"{_SINGLE}.proj_mlp")),
  LoraName("single_blocks.{i}.linear2", (f"{_SINGLE}.proj_out",)),
  LoraName("single_blocks.{i}.modulation.linear", (f"{_SINGLE}.norm.linear",)),
  *_refiner(),
  *_pair("time_in.mlp.0", "time_in.mlp.2", "time_text_embed.timestep_embedder"),
  *_pair("guidance_in.mlp.0", "guidance_in.mlp.2", "time_text_embed.guidance_embedder"),
  *_pair("vector_in.in_layer", "vector_in.out_layer", "time_text_embed.text_embedder"),
  # Their layer gives shift and scale, that of diffusers gives scale and shift.
  LoraName("final_layer.adaLN_modulation.1", ("norm_out.linear",), halves_swapped=True),
  LoraName("final_layer.linear", ("proj_out",)),
)

"""Conversion tables of decoder language models.

The names are checked against inventories of the published files (tests/fixtures/tensors).
"""

from dancegrpo_jax.conversion.table import Table
from dancegrpo_jax.conversion.tables.rows import dense, embedding, join, layers, scale

# Llama has biases nowhere by default; the network then has no such parameters.
LLAMA_LAYER = join(
  scale("input_layernorm"),
  *(dense(f"self_attn.{name}_proj") for name in "qkvo"),
  scale("post_attention_layernorm"),
  *(dense(f"mlp.{name}_proj") for name in ("gate", "up", "down")),
)

LLAMA = Table(
  name="LlamaModel",
  rows=join(embedding("embed_tokens"), layers("layers", "layers", LLAMA_LAYER), scale("norm")),
  aliases=(("language_model.model.{*}", "{*}"), ("model.{*}", "{*}")),
  # The head of a LlamaForCausalLM, and the frequencies that older versions stored.
  others=(
    "lm_head.weight",
    "language_model.lm_head.weight",
    "rotary_emb.inv_freq",
    "{*}.rotary_emb.inv_freq",
  ),
  # in a file that holds a vision tower too
  prefixes=("language_model.model.", "model.language_model."),
)


def last_layers(run: int, total: int) -> tuple[str, ...]:
  """Patterns of the tensors that follow the first `run` of a language model's `total` layers: those
  of the other layers, and of the norm behind the last one.
  """
  return (*(f"layers.{k}.{{*}}" for k in range(run, total)), "norm.weight")


def without_last_layers(table: Table, run: int, total: int) -> Table:
  """The table of a language model of which the first `run` of `total` layers are used, without the
  norm that follows the last one. What comes after them in a file is left out.
  """
  spellings = ("", *(source.removesuffix("{*}") for source, _ in table.aliases))
  others = (prefix + name for name in last_layers(run, total) for prefix in spellings)
  return table._replace(others=(*table.others, *others))

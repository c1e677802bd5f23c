"""The kinds of tokenizers that a layout may name."""

from dancegrpo_jax.data.llama_tokenizer import load_llama_tokenizer
from dancegrpo_jax.data.t5_tokenizer import load_t5_tokenizer
from dancegrpo_jax.data.tokenizer import load_tokenizer
from dancegrpo_jax.pipelines.layout import TokenizerKind

KINDS = {
  "clip": TokenizerKind(
    files=("vocab.json", "merges.txt", "tokenizer_config.json"),
    load=load_tokenizer,
    optional=("special_tokens_map.json",),
    instead=("tokenizer.json", "tokenizer_config.json"),
  ),
  "t5": TokenizerKind(
    files=("tokenizer.json", "tokenizer_config.json"),
    load=load_t5_tokenizer,
    optional=("special_tokens_map.json", "spiece.model"),
  ),
  "llama": TokenizerKind(
    files=("tokenizer.json", "tokenizer_config.json"),
    load=load_llama_tokenizer,
    optional=("special_tokens_map.json",),
  ),
}


def kind_of(kind: str | TokenizerKind) -> TokenizerKind:
  """The kind of a name, or the kind itself. ValueError: the name is not known."""
  if isinstance(kind, TokenizerKind):
    return kind
  if kind not in KINDS:
    raise ValueError(
      f"no tokenizer of the kind {kind!r}; use one of {', '.join(KINDS)}, or a TokenizerKind"
    )
  return KINDS[kind]

"""The kinds of tokenizers that a family may name."""

from dancegrpo_jax.data.t5_tokenizer import load_t5_tokenizer
from dancegrpo_jax.data.tokenizer import load_tokenizer
from dancegrpo_jax.pipelines.layout import TokenizerKind

KINDS = {
  "clip": TokenizerKind(
    files=("vocab.json", "merges.txt", "tokenizer_config.json"),
    load=load_tokenizer,
    optional=("special_tokens_map.json",),
  ),
  "t5": TokenizerKind(
    files=("tokenizer.json", "tokenizer_config.json"),
    load=load_t5_tokenizer,
    optional=("special_tokens_map.json", "spiece.model"),
  ),
}


def kind_of(named: str | TokenizerKind) -> TokenizerKind:
  """The kind of this name, or the kind itself. ValueError: an unknown name."""
  if isinstance(named, TokenizerKind):
    return named
  if named not in KINDS:
    raise ValueError(
      f"no tokenizer of the kind {named!r}; one of {', '.join(KINDS)}, or a TokenizerKind"
    )
  return KINDS[named]

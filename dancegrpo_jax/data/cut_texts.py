"""Tokenizers that can say how long a text is, and the line about the texts that they cut."""

import json
from collections.abc import Callable
from pathlib import Path

from dancegrpo_jax.pipelines.layout import Tokenizer


def require_class(folder: str, *names: str) -> None:
  """Checks that a tokenizer's folder is of one of these classes of transformers.

  transformers would build the class that it is told to, whatever the folder is of.

  Raises:
    ValueError: tokenizer_config.json names another class.
  """
  file = Path(folder) / "tokenizer_config.json"
  kind = json.loads(file.read_text(encoding="utf-8")).get("tokenizer_class")
  if kind is not None and kind not in names:
    raise ValueError(f"{file}: tokenizer_class = {kind!r} is not implemented; {names[0]} is")


def require_fit(name: str, tokenizer: Callable, network: dict, length: bool) -> None:
  """Checks that a text encoder has a row for every id, and for every position of a text.

  Args:
    name: of the tokenizer, for the message.
    tokenizer: any but a `Tokenizer` passes.
    network: the encoder's config.json, of which vocab_size and max_position_embeddings are looked
      at where it has them.
    length: whether the tokenizer itself says how many tokens a text has.

  Raises:
    ValueError: it has not.
  """
  if not isinstance(tokenizer, Tokenizer):
    return
  rows = network.get("vocab_size")
  if rows is not None and tokenizer.ids > rows:
    raise ValueError(
      f"{name} has {tokenizer.ids} ids and its text encoder vocab_size = {rows}; they belong to"
      " different models, or the encoder was saved before tokens were added"
    )
  positions = network.get("max_position_embeddings")
  if length and positions is not None and (tokens := tokenizer([""]).shape[-1]) > positions:
    raise ValueError(
      f"{name} gives {tokens} tokens a text (model_max_length) and its text encoder takes"
      f" max_position_embeddings = {positions}; set model_max_length to {positions}"
    )


def line(tokenizer: Tokenizer, name: str, length: int, groups: dict[str, list[str]]) -> str | None:
  """One line about the texts that a tokenizer cuts; None where it cuts none.

  Args:
    tokenizer: which cuts.
    name: of the tokenizer, for the user.
    length: tokens that texts are cut to.
    groups: texts by what they are, as {"prompts": [...], "held-out prompts": [...]}.
  """
  cut = {
    what: [text for text, n in zip(texts, tokenizer.lengths(texts)) if n > length]
    for what, texts in groups.items()
    if texts
  }
  parts = [f"{len(found)} of {len(groups[what])} {what}" for what, found in cut.items() if found]
  if not parts:
    return None
  first = next(text for found in cut.values() for text in found)
  shown = first if len(first) <= 60 else f"{first[:57]}..."
  verb = "is" if sum(map(len, cut.values())) == 1 else "are"
  return (
    f"{' and '.join(parts)} {verb} cut to {length} tokens by {name} ({tokenizer.kind}): the first"
    f" is {shown!r}"
  )

"""Tokenizers that can say how long a text is, and the line about the texts that they cut."""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A function from texts to ids that also knows how long texts are before it cuts them.

  Attributes:
    kind: for messages, as "CLIP".
    encode: `(texts) -> int32 [n, tokens]`, or with the number of tokens as a second argument.
    lengths: `(texts) -> tokens of each`, with the special ones, where nothing is cut or padded.
  """

  kind: str
  encode: Callable[..., np.ndarray]
  lengths: Callable[[list[str]], list[int]]

  def __call__(self, texts: list[str], *length: int) -> np.ndarray:
    """`encode`."""
    return self.encode(texts, *length)


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

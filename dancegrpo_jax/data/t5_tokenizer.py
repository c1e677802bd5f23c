"""T5's tokenizer: writes a Unigram vocabulary in the layout of transformers' T5Tokenizer, and reads
folders in that layout.

T5's published vocabulary was trained by SentencePiece. The vocabulary that is written here consists
of every word of some captions, and of letters. That needs no training, and is enough for the
embedded models, which have few captions.
"""

import collections
import math
import os

import numpy as np

from dancegrpo_jax.data.cut_texts import require_class
from dancegrpo_jax.data.transformers_classes import tokenizer_class
from dancegrpo_jax.pipelines.layout import Tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json")
PAD, EOS, UNKNOWN, SPACE = "<pad>", "</s>", "<unk>", "▁"
# The log-probability of a letter. It is below that of every word, so that no known word is spelled.
_LETTER = -20.0


def vocabulary(captions: list[str]) -> list[tuple[str, float]]:
  """The pieces of the captions' vocabulary with their log-probabilities: the special pieces, every
  word by falling frequency, a space and all letters.
  """
  counts = collections.Counter(word for caption in captions for word in caption.split())
  total = counts.total()
  words = [
    (SPACE + word, math.log(n / total))
    for word, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
  ]
  letters = sorted(
    {chr(code) for code in range(33, 127)} | {letter for word in counts for letter in word}
  )
  special = [(piece, 0.0) for piece in (PAD, EOS, UNKNOWN)]
  return special + words + [(piece, _LETTER) for piece in (SPACE, *letters)]


def write_t5_tokenizer(captions: list[str], folder: str, length: int) -> None:
  """Writes tokenizer.json and tokenizer_config.json with the captions' vocabulary.

  Args:
    captions: the texts; every one must fit.
    folder: where to write.
    length: tokens that texts are padded and cut to.

  Raises:
    ValueError: a caption needs more than `length` tokens.
  """
  # Here and below transformers is imported late, because it is slow to import.
  tokenizer = tokenizer_class("T5Tokenizer")(
    vocab=vocabulary(captions), extra_ids=0, model_max_length=length
  )
  for caption, ids in zip(captions, tokenizer(captions)["input_ids"] if captions else []):
    if len(ids) > length:
      raise ValueError(
        f"caption needs more than {length} tokens: {caption!r}; shorten it or raise the"
        " tokenizer's length"
      )
  tokenizer.save_pretrained(folder)


def load_t5_tokenizer(folder: str) -> Tokenizer:
  """The tokenizer of a T5Tokenizer folder, of this project or of FLUX, through transformers.

  Returns:
    A function (texts, length) -> ids int32 `[texts, length]`: the text, the end token, padding.
    Long texts are cut, and still finish with the end token.

  Raises:
    FileNotFoundError: names the file that is missing.
  """
  for name in FILES:
    if not os.path.isfile(os.path.join(folder, name)):
      raise FileNotFoundError(
        f"tokenizer file not found: {os.path.join(folder, name)}; a T5 tokenizer folder has"
        f" {' and '.join(FILES)}"
      )
  require_class(folder, "T5Tokenizer", "T5TokenizerFast")
  tokenizer = tokenizer_class("T5Tokenizer").from_pretrained(folder)

  def encode(texts: list[str], length: int) -> np.ndarray:
    rows = tokenizer(
      list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="np"
    )
    return rows["input_ids"].astype(np.int32)

  def lengths(texts: list[str]) -> list[int]:
    return list(map(len, tokenizer(list(texts), verbose=False)["input_ids"]))

  ids = max(tokenizer.get_vocab().values()) + 1
  return Tokenizer(kind="T5", encode=encode, lengths=lengths, ids=ids)

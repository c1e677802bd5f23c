"""T5's tokenizer: a Unigram vocabulary written in the layout of transformers' T5Tokenizer, and
folders of that layout read.

T5's own vocabulary was trained by SentencePiece; the one written here knows every word of its
captions, and letters. That is enough for the embedded models, whose captions are few, and it needs
no training.
"""

import collections
import math
import os
from collections.abc import Callable

import numpy as np

FILES = ("tokenizer.json", "tokenizer_config.json")
PAD, EOS, UNKNOWN, SPACE = "<pad>", "</s>", "<unk>", "▁"
_LETTER = -20.0  # log-probability: below every word's, so that a known word is never spelled


def vocabulary(captions: list[str]) -> list[tuple[str, float]]:
  """(piece, log-probability): the special pieces, every word by falling frequency, a space and all
  letters.
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
  return (
    [(piece, 0.0) for piece in (PAD, EOS, UNKNOWN)]
    + words
    + [(piece, _LETTER) for piece in (SPACE, *letters)]
  )


def write_t5_tokenizer(captions: list[str], folder: str, length: int) -> None:
  """Writes tokenizer.json and tokenizer_config.json with the captions' vocabulary; `length` is what
  texts are padded to.

  Raises:
    ValueError: a caption needs more than `length` tokens.
  """
  from transformers import T5Tokenizer

  tokenizer = T5Tokenizer(vocab=vocabulary(captions), extra_ids=0, model_max_length=length)
  for caption, ids in zip(captions, tokenizer(captions)["input_ids"] if captions else []):
    if len(ids) > length:
      raise ValueError(
        f"caption needs more than {length} tokens: {caption!r}; shorten it or raise the"
        " tokenizer's length"
      )
  tokenizer.save_pretrained(folder)


def load_t5_tokenizer(folder: str) -> Callable[[list[str], int], np.ndarray]:
  """The tokenizer of a T5Tokenizer folder, of this project or of FLUX, through transformers.

  Returns:
    (texts, length) -> ids int32 `[texts, length]`: text, end, padding; long texts are cut and keep
    their end.

  Raises:
    FileNotFoundError: naming the file that is missing.
  """
  from transformers import T5Tokenizer

  for name in FILES:
    if not os.path.isfile(os.path.join(folder, name)):
      needed = " and ".join(FILES)
      raise FileNotFoundError(
        f"tokenizer file not found: {os.path.join(folder, name)}; a T5 tokenizer folder has"
        f" {needed}"
      )
  tokenizer = T5Tokenizer.from_pretrained(folder)

  def encode(texts: list[str], length: int) -> np.ndarray:
    rows = tokenizer(
      list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="np"
    )
    return rows["input_ids"].astype(np.int32)

  return encode

"""Llama-3's tokenizer: writes a small vocabulary in its layout, and reads folders in that layout.

Llama-3's published vocabulary is a byte-level BPE of 128,000 tokens. Its tokenizer.json has
`ignore_merges`: a word that is in the vocabulary is one token, whatever the merges are. The
vocabulary that is written here consists of all bytes and of every word of some texts, and needs no
merges. That is enough for the embedded models, which have few captions.
"""

import json
import os
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from dancegrpo_jax.data.cut_texts import require_class
from dancegrpo_jax.data.transformers_classes import tokenizer_class
from dancegrpo_jax.pipelines.layout import PADDING, Tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json")
BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<pad>"
# The marks of a chat: around the name of who speaks, and at the end of what is said.
CHAT = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# How Llama-3 cuts a text into words, from its tokenizer.json.
PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_REMEDY = "take the original tokenizer.json of the checkpoint's language model"
# The classes that a folder of this kind may name. All of them are read from tokenizer.json alone.
CLASSES = (
  "PreTrainedTokenizerFast",
  "LlamaTokenizerFast",
  "LlamaTokenizer",
  "TokenizersBackend",
)


def write_llama_tokenizer(texts: Iterable[str], folder: str, length: int = 512) -> None:
  """Writes tokenizer.json and tokenizer_config.json with the vocabulary of some texts.

  Args:
    texts: whose words become one token each. Marks such as `CHAT` may stand in them.
    folder: where to write.
    length: tokens that texts are cut to by default.
  """
  # Here and below `tokenizers` and `transformers` are imported late: they are slow to import.
  from tokenizers import (
    AddedToken,
    Regex,
    models,
    pre_tokenizers,
    processors,
  )
  from tokenizers import Tokenizer as Backend

  cut = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  parts = [part for text in texts for part in re.split(r"<\|\w+\|>", text)]
  words = (word for part in parts for word, _ in cut.pre_tokenize_str(part))
  entries = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *words])
  vocab = {entry: number for number, entry in enumerate(entries)}
  backend = Backend(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
  backend.pre_tokenizer = cut
  marks = (BOS, EOS, *CHAT, PAD)
  backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
  backend.post_processor = processors.TemplateProcessing(
    single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
  )
  tokenizer = tokenizer_class("PreTrainedTokenizerFast")(
    tokenizer_object=backend,
    bos_token=BOS,
    eos_token=EOS,
    pad_token=PAD,
    padding_side="right",
    model_max_length=length,
  )
  tokenizer.save_pretrained(folder)


def load_llama_tokenizer(folder: str) -> Tokenizer:
  """The tokenizer of a folder with Llama-3's tokenizer.json, through transformers.

  It is read by transformers' general class. Its LlamaTokenizerFast, which the published folders
  name, drops all spaces since version 5 (huggingface/transformers issue 45488).

  Returns:
    A function (texts, length) -> ids int32 `[texts, length]`, where a text begins with BOS and ends
    where the text ends, and `PADDING` follows. Long texts are cut.

  Raises:
    FileNotFoundError: names the file that is missing.
    ValueError: the tokenizer is of another kind, does not begin a text with one BOS, or drops
      spaces because it was saved by a class of another kind; one line.
  """
  for name in FILES:
    if not os.path.isfile(os.path.join(folder, name)):
      raise FileNotFoundError(
        f"tokenizer file not found: {os.path.join(folder, name)}; a Llama tokenizer folder has"
        f" {' and '.join(FILES)}"
      )
  require_class(folder, *CLASSES)
  tokenizer = _read(folder)

  def encode(texts: list[str], length: int) -> np.ndarray:
    rows = tokenizer(list(texts), truncation=True, max_length=length, verbose=False)["input_ids"]
    ids = np.full((len(texts), length), PADDING, np.int32)
    for row, text in zip(ids, rows, strict=True):
      row[: len(text)] = text
    return ids

  def lengths(texts: list[str]) -> list[int]:
    return list(map(len, tokenizer(list(texts), verbose=False)["input_ids"]))

  return Tokenizer(
    kind="Llama",
    encode=encode,
    lengths=lengths,
    ids=max(tokenizer.get_vocab().values()) + 1,
    marks=frozenset(map(str, tokenizer.get_added_vocab())),
  )


def _read(folder: str) -> Any:
  """The tokenizer in transformers' general class. Raises ValueError as `load_llama_tokenizer`."""
  file = os.path.join(folder, FILES[0])
  try:
    tokenizer = tokenizer_class("PreTrainedTokenizerFast").from_pretrained(folder)
  except Exception as error:  # tokenizers' own class of error is Exception itself
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    raise ValueError(f"{file}: can't be read ({reason}); {_REMEDY}") from error
  if tokenizer.bos_token_id is None:
    raise ValueError(f"{file}: tokenizer_config.json names no bos_token; {_REMEDY}")
  empty, joined, apart = tokenizer(["", "ab", "a b"])["input_ids"]
  if empty != [tokenizer.bos_token_id]:
    raise ValueError(
      f"{file}: an empty text becomes the ids {empty}, where a Llama tokenizer gives that of"
      f" bos_token alone, {tokenizer.bos_token_id}; {_REMEDY}"
    )
  if joined == apart:
    raise ValueError(
      f"{file}: drops spaces: 'a b' and 'ab' become the same ids, as after LlamaTokenizerFast of"
      f" transformers 5 has saved it (huggingface/transformers issue 45488); {_REMEDY}"
    )
  return tokenizer


def special_ids(folder: str) -> dict[str, int]:
  """The ids of BOS, EOS and padding and the size of the vocabulary, as a config.json has them."""
  with open(os.path.join(folder, "tokenizer.json"), encoding="utf-8") as file:
    content = json.load(file)
  added = {token["content"]: token["id"] for token in content["added_tokens"]}
  return {
    "vocab_size": max(*content["model"]["vocab"].values(), *added.values()) + 1,
    "bos_token_id": added[BOS],
    "eos_token_id": added[EOS],
    "pad_token_id": added[PAD],
  }

"""CLIP's byte-level BPE: trained on captions, written in the layout of transformers' CLIPTokenizer,
and read again.

The vocabulary has the order of OpenAI's: 256 bytes, the same 256 bytes as ends of words, the
merges, <|startoftext|>, <|endoftext|>. It contains every byte, so that any text has a tokenisation
and nothing becomes the unknown token. Stable Diffusion's tokenizer folder can be read too.
"""

import json
import os

import numpy as np

from dancegrpo_jax.data.cut_texts import require_class
from dancegrpo_jax.data.transformers_classes import tokenizer_class
from dancegrpo_jax.pipelines.layout import Tokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# OpenAI's pattern: contractions, runs of letters, single digits, runs of anything else.
PATTERN = (
  r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def _split(tokenizer):
  """Makes a tokenizer normalise text and cut it into words as transformers' CLIPTokenizer does, and
  returns it.
  """
  # Here and below `tokenizers` and `transformers` are imported late: they are slow to import.
  from tokenizers import Regex, decoders, normalizers, pre_tokenizers

  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(WORD_END, " ")])
  return tokenizer


def _build(vocab: dict[str, int], merges: list[tuple[str, str]], length: int):
  """A tokenizer that puts bos and eos around a text, and cuts the text or pads it with eos, at the
  end, to `length`.
  """
  from tokenizers import AddedToken, Tokenizer, models, processors

  model = models.BPE(vocab=vocab, merges=merges, end_of_word_suffix=WORD_END, unk_token=EOS)
  tokenizer = _split(Tokenizer(model))
  tokenizer.add_special_tokens(
    [AddedToken(token, special=True, normalized=False) for token in (BOS, EOS)]
  )
  bos, eos = ((token, vocab[token]) for token in (BOS, EOS))
  tokenizer.post_processor = processors.RobertaProcessing(
    eos, bos, trim_offsets=False, add_prefix_space=False
  )
  tokenizer.enable_truncation(length)
  tokenizer.enable_padding(length=length, pad_id=vocab[EOS], pad_token=EOS)
  return tokenizer


def _train_merges(captions: list[str], count: int) -> list[tuple[str, str]]:
  """The first `count` merges of byte-pair encoding on the captions' words; fewer where every word
  has become one token.
  """
  from tokenizers import Tokenizer, models, trainers
  from tokenizers.pre_tokenizers import ByteLevel

  tokenizer = _split(Tokenizer(models.BPE(end_of_word_suffix=WORD_END)))
  alphabet = sorted(ByteLevel.alphabet())
  # Of equally frequent pairs the trainer takes the one with the smallest ids. It numbers letters
  # that end words in the order of a hash table, which differs from process to process. They are
  # given their ids first, as special tokens, so that training is repeatable.
  ends = [letter + WORD_END for letter in alphabet]
  trainer = trainers.BpeTrainer(
    vocab_size=2 * len(alphabet) + count,
    special_tokens=ends,
    initial_alphabet=alphabet,
    end_of_word_suffix=WORD_END,
    show_progress=False,
  )
  tokenizer.train_from_iterator(captions, trainer)
  return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"][:count]]


def train_tokenizer(captions: list[str], length: int = 16, size: int = 1000):
  """Trains a tokenizer on captions.

  Args:
    captions: the texts; every one must fit.
    length: tokens, with bos and eos, that texts are padded and cut to.
    size: the largest number of entries in the vocabulary, at least 514 (the bytes twice, bos, eos).

  Returns:
    A `tokenizers.Tokenizer`. The ids of bos and eos are the last two.

  Raises:
    ValueError: `size` has no room for the bytes, or a caption needs more than `length` tokens.
  """
  from tokenizers.pre_tokenizers import ByteLevel

  letters = sorted(ByteLevel.alphabet())
  entries = letters + [letter + WORD_END for letter in letters]
  room = size - len(entries) - 2
  if room < 0:
    raise ValueError(
      f"tokenizer size {size} is too small: the bytes, bos and eos alone are {len(entries) + 2}"
    )
  merges = _train_merges(captions, room)
  entries += [first + second for first, second in merges] + [BOS, EOS]
  vocab = {token: i for i, token in enumerate(dict.fromkeys(entries))}
  tokenizer = _build(vocab, merges, length)
  for text, encoding in zip(captions, tokenizer.encode_batch(captions), strict=True):
    if encoding.overflowing:
      raise ValueError(
        f"caption needs more than {length} tokens: {text!r}; shorten it or raise the tokenizer's"
        " length"
      )
  return tokenizer


def write_tokenizer(captions: list[str], folder: str, length: int = 16, size: int = 1000):
  """Trains a tokenizer on captions and writes vocab.json, merges.txt, tokenizer_config.json and
  special_tokens_map.json into a folder, which transformers' CLIPTokenizer can load.

  The other arguments, the result and the errors are those of `train_tokenizer`.
  """
  tokenizer = train_tokenizer(captions, length, size)
  model = json.loads(tokenizer.to_str())["model"]
  special = {
    token: {
      "content": text,
      "lstrip": False,
      "normalized": False,
      "rstrip": False,
      "single_word": False,
    }
    for token, text in (("bos_token", BOS), ("eos_token", EOS), ("unk_token", EOS))
  }
  config = {
    "add_prefix_space": False,
    "bos_token": BOS,
    "clean_up_tokenization_spaces": False,
    "do_lower_case": True,
    "eos_token": EOS,
    "errors": "replace",
    "model_max_length": length,
    "pad_token": EOS,
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": EOS,
  }
  os.makedirs(folder, exist_ok=True)
  _write_json(os.path.join(folder, "vocab.json"), model["vocab"])
  _write_json(os.path.join(folder, "tokenizer_config.json"), config)
  _write_json(os.path.join(folder, "special_tokens_map.json"), {**special, "pad_token": EOS})
  with open(os.path.join(folder, "merges.txt"), "w", encoding="utf-8", newline="\n") as file:
    file.writelines(["#version: 0.2\n", *(" ".join(pair) + "\n" for pair in model["merges"])])
  return tokenizer


def _write_json(path: str, value) -> None:
  with open(path, "w", encoding="utf-8", newline="\n") as file:
    json.dump(value, file, indent=1, ensure_ascii=False)
    file.write("\n")


def load_tokenizer(folder: str) -> Tokenizer:
  """The tokenizer of a CLIPTokenizer folder, of this project or of Stable Diffusion, through
  transformers.

  Returns:
    A function texts -> ids int32 `[texts, model_max_length]`: bos, the text, eos, padding. Long
    texts are cut, and still finish with eos.

  Raises:
    FileNotFoundError: names the file that is missing.
    ValueError: the configuration gives no length that can be used.
  """
  if not os.path.isfile(os.path.join(folder, "tokenizer.json")):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
      if not os.path.isfile(os.path.join(folder, name)):
        raise FileNotFoundError(
          f"tokenizer file not found: {os.path.join(folder, name)}; a CLIP tokenizer folder has"
          " tokenizer_config.json, and vocab.json with merges.txt or tokenizer.json"
        )
  require_class(folder, "CLIPTokenizer", "CLIPTokenizerFast")
  tokenizer = tokenizer_class("CLIPTokenizer").from_pretrained(folder)
  length = tokenizer.model_max_length
  if not 0 < length <= 10_000:
    raise ValueError(
      f"{folder}/tokenizer_config.json: model_max_length {length!r} can't be used; set the text"
      " tower's length"
    )

  def encode(texts: list[str]) -> np.ndarray:
    rows = tokenizer(
      list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="np"
    )
    return rows["input_ids"].astype(np.int32)

  def lengths(texts: list[str]) -> list[int]:
    return list(map(len, tokenizer(list(texts), verbose=False)["input_ids"]))

  ids = max(tokenizer.get_vocab().values()) + 1
  return Tokenizer(kind="CLIP", encode=encode, lengths=lengths, ids=ids)

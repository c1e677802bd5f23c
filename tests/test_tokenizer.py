"""The captions' BPE: transformers' CLIPTokenizer loads the folder and gives the same ids."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from dancegrpo_jax.data import emoji, tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[1]
CAPTIONS = [emoji.caption(name, colour) for name in emoji.NAMES for colour in emoji.COLOURS]
STRANGE = [
  "",
  "  A   RED\n\tDog!! ",
  "it's 42 zebras",
  "Zürich ünïcode 漢字 🦊",
  "a dog <|endoftext|> a cat",
  "word " * 40,
  "\x00\x7f</w>",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer")
  tokenizer.write_tokenizer(CAPTIONS, str(path))
  return path


@pytest.fixture(scope="module")
def clip_tokenizer(folder):
  transformers = pytest.importorskip("transformers")
  return transformers.CLIPTokenizer.from_pretrained(str(folder))


def test_files(folder):
  names = {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}
  assert {path.name for path in folder.iterdir()} == names
  vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
  assert len(vocab) <= 1000 and sorted(vocab.values()) == list(range(len(vocab)))
  assert vocab["<|startoftext|>"] == len(vocab) - 2 and vocab["<|endoftext|>"] == len(vocab) - 1
  # transformers' legacy pooling looks for an eos id of 2.
  assert 2 not in (vocab["<|startoftext|>"], vocab["<|endoftext|>"])


def test_transformers_gives_the_same_ids(folder, clip_tokenizer):
  texts = CAPTIONS + STRANGE
  expected = np.array(clip_tokenizer(texts, padding="max_length", truncation=True).input_ids)
  actual = tokenizer.load_tokenizer(str(folder))(texts)
  assert actual.dtype == np.int32 and actual.shape == (len(texts), 16)
  np.testing.assert_array_equal(actual, expected)


def test_transformers_special_tokens(clip_tokenizer):
  size = len(clip_tokenizer)
  assert (clip_tokenizer.bos_token, clip_tokenizer.bos_token_id) == ("<|startoftext|>", size - 2)
  assert (clip_tokenizer.eos_token, clip_tokenizer.eos_token_id) == ("<|endoftext|>", size - 1)
  assert (clip_tokenizer.pad_token, clip_tokenizer.pad_token_id) == ("<|endoftext|>", size - 1)
  assert clip_tokenizer.unk_token_id == size - 1 and clip_tokenizer.model_max_length == 16


def test_every_caption_fits_and_reads_back(folder, clip_tokenizer):
  ids = tokenizer.load_tokenizer(str(folder))(CAPTIONS)
  eos = len(clip_tokenizer) - 1
  assert (ids[:, 0] == eos - 1).all() and (ids[:, -1] == eos).all()
  assert len(np.unique(ids, axis=0)) == len(CAPTIONS)
  for row, caption in zip(ids[::37], CAPTIONS[::37], strict=True):
    assert clip_tokenizer.decode(row, skip_special_tokens=True).strip() == caption


def test_unseen_text_becomes_bytes_never_unknown(clip_tokenizer):
  text = "ünïcodé 漢字 quixotic"
  ids = clip_tokenizer(text).input_ids
  # The unknown token is the end token too.
  assert ids.count(clip_tokenizer.eos_token_id) == 1 and ids[-1] == clip_tokenizer.eos_token_id
  assert clip_tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_common_words_are_single_tokens(clip_tokenizer):
  """Merges work: the words of all captions, and the colours, are single tokens."""
  for word in ("a", "on", "background", *emoji.COLOURS):
    assert clip_tokenizer.tokenize(word) == [word + "</w>"]


def test_long_text_is_cut_and_keeps_eos(folder):
  ids = tokenizer.load_tokenizer(str(folder))(["a dog " * 30])[0]
  assert ids[0] == ids.max() - 1 and ids[-1] == ids.max() and (ids[1:-1] < ids.max() - 1).all()


def test_training_is_deterministic(folder, tmp_path):
  tokenizer.write_tokenizer(CAPTIONS, str(tmp_path))
  for path in folder.iterdir():
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()
  code = (
    "import sys; from dancegrpo_jax.data import tokenizer;"
    f" tokenizer.write_tokenizer({CAPTIONS!r}, sys.argv[1])"
  )
  # Another process writes the same files.
  subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
  for path in folder.iterdir():
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_bpe_by_hand():
  """Two merges by hand: "ab</w>" occurs in both words, then "c" + "ab</w>".

  With room for one merge only the first is made.
  """
  two = tokenizer.train_tokenizer(["ab cab ab"], length=8, size=516)
  assert (
    two.encode("ab cab").tokens == ["<|startoftext|>", "ab</w>", "cab</w>"] + ["<|endoftext|>"] * 5
  )
  one = tokenizer.train_tokenizer(["ab cab ab"], length=8, size=515)
  assert (
    one.encode("ab cab").tokens
    == ["<|startoftext|>", "ab</w>", "c", "ab</w>"] + ["<|endoftext|>"] * 4
  )


def test_pad_token_of_its_own(folder, tmp_path):
  """Stable Diffusion 2.x pads with "!" instead of the end of text."""
  for path in folder.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  config = json.loads((tmp_path / "tokenizer_config.json").read_text())
  added = {
    "content": "!",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
  }
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": added}))
  special = json.loads((tmp_path / "special_tokens_map.json").read_text())
  (tmp_path / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": added}))
  vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
  ids = tokenizer.load_tokenizer(str(tmp_path))(["a dog"])[0]
  assert ids[3] == vocab["<|endoftext|>"] and (ids[4:] == vocab["!"]).all()


def test_errors(folder, tmp_path):
  with pytest.raises(ValueError, match="size 513 is too small.* 514"):
    tokenizer.train_tokenizer(CAPTIONS, size=513)
  with pytest.raises(ValueError, match="more than 6 tokens: 'a dog on a red background'"):
    tokenizer.train_tokenizer(["a dog on a red background"], length=6)
  with pytest.raises(FileNotFoundError, match="vocab.json; a CLIP tokenizer folder has"):
    tokenizer.load_tokenizer(str(tmp_path))
  for name in ("vocab.json", "merges.txt"):
    (tmp_path / name).write_bytes((folder / name).read_bytes())
  (tmp_path / "tokenizer_config.json").write_text("{}")
  with pytest.raises(ValueError, match="model_max_length"):
    tokenizer.load_tokenizer(str(tmp_path))

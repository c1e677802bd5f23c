"""T5's tokenizer: the files that are written, and that transformers reads them alike."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from dancegrpo_jax.data.t5_tokenizer import load_t5_tokenizer, vocabulary, write_t5_tokenizer

CAPTIONS = ["a red cat", "a blue cat", "a red boat"]
TEXTS = ["a red cat", "", "a cat  red", "a red dog!", "a Cat", "été", "a red cat " * 5]


@pytest.fixture
def folder(tmp_path):
  write_t5_tokenizer(CAPTIONS, str(tmp_path), length=8)
  return str(tmp_path)


def test_words_are_pieces_and_the_rest_is_spelled(folder):
  pieces = [piece for piece, _ in vocabulary(CAPTIONS)]
  assert pieces[:8] == ["<pad>", "</s>", "<unk>", "▁a", "▁cat", "▁red", "▁blue", "▁boat"] and len(
    set(pieces)
  ) == len(pieces)
  rows = load_t5_tokenizer(folder)(TEXTS, 8)
  assert rows.shape == (7, 8) and rows.dtype == np.int32
  spelled = [" ".join(pieces[i] for i in row) for row in rows]
  assert spelled[0] == "▁a ▁red ▁cat </s>" + 4 * " <pad>" and spelled[1] == "</s>" + 7 * " <pad>"
  assert spelled[2].startswith("▁a ▁cat ▁red </s>")
  assert spelled[3] == "▁a ▁red ▁ d o g ! </s>" and spelled[4].startswith("▁a ▁ C a t </s>")
  assert spelled[5].startswith("▁ <unk> t <unk> </s>")
  assert spelled[6] == "▁a ▁red ▁cat ▁a ▁red ▁cat ▁a </s>"  # cut to the length, with the end token


def test_transformers_reads_it(folder):
  """As diffusers does, by the class that the folder names, also at another length."""
  tokenizer = AutoTokenizer.from_pretrained(folder)
  assert type(tokenizer).__name__ == "T5Tokenizer" and tokenizer.model_max_length == 8
  for length in (4, 8, 12):
    theirs = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=length)["input_ids"]
    np.testing.assert_array_equal(load_t5_tokenizer(folder)(TEXTS, length), theirs)


def test_the_same_files_each_time(folder, tmp_path_factory):
  again = tmp_path_factory.mktemp("again")
  write_t5_tokenizer(CAPTIONS, str(again), length=8)
  for name in ("tokenizer.json", "tokenizer_config.json"):
    assert (again / name).read_bytes() == (Path(folder) / name).read_bytes()


def test_mistakes(tmp_path):
  with pytest.raises(ValueError, match="needs more than 3 tokens: 'a red cat'"):
    write_t5_tokenizer(CAPTIONS, str(tmp_path), length=3)
  with pytest.raises(FileNotFoundError, match="tokenizer.json; a T5 tokenizer folder has"):
    load_t5_tokenizer(str(tmp_path))

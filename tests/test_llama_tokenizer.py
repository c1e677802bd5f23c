"""Llama's tokenizer: a folder that is written here, and folders as transformers write them.

Expected ids come from the `tokenizers` library on the same tokenizer.json.
"""

import json
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from dancegrpo_jax.data import llama_tokenizer
from dancegrpo_jax.data.llama_tokenizer import BOS, CHAT, load_llama_tokenizer
from dancegrpo_jax.pipelines.layout import PADDING
from dancegrpo_jax.pipelines.templates import NAMED

TEXTS = ["a red cat", "Two cats, 1234 of them!\n\nWhy?", "", "naïve 你好", "the cat" * 30]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("llama")
  llama_tokenizer.write_llama_tokenizer([NAMED["video"].filled("a red cat")], str(path))
  return path


def test_the_ids_are_those_of_tokenizer_json(folder):
  """Of any text, also where its words are not in the vocabulary and are spelled in bytes."""
  backend = Backend.from_file(str(folder / "tokenizer.json"))
  ids = load_llama_tokenizer(str(folder))(TEXTS, 64)
  assert ids.dtype == np.int32 and ids.shape == (len(TEXTS), 64)
  for row, text in zip(ids, TEXTS, strict=True):
    expected = backend.encode(text).ids[:64]
    np.testing.assert_array_equal(row, expected + [PADDING] * (64 - len(expected)))


def test_a_word_of_the_vocabulary_is_one_token(folder):
  tokenizer = load_llama_tokenizer(str(folder))
  assert tokenizer.lengths(["a red cat", "", NAMED["video"].before]) == [4, 1, 95]
  backend = Backend.from_file(str(folder / "tokenizer.json"))
  assert backend.encode("a red cat").tokens == [BOS, "a", "Ġred", "Ġcat"]
  assert set(CHAT) < tokenizer.marks and tokenizer.ids == backend.get_vocab_size()


def test_special_ids(folder):
  backend = Backend.from_file(str(folder / "tokenizer.json"))
  ids = llama_tokenizer.special_ids(str(folder))
  assert ids == {
    "vocab_size": backend.get_vocab_size(),
    "bos_token_id": backend.token_to_id(BOS),
    "eos_token_id": backend.token_to_id("<|end_of_text|>"),
    "pad_token_id": backend.token_to_id("<pad>"),
  }


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "LlamaTokenizer", "TokenizersBackend"])
def test_the_classes_that_published_folders_name(folder, tmp_path, name):
  """The class changes nothing; transformers 5 would drop the spaces for the first two."""
  shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
  file = tmp_path / "tokenizer_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": name}))
  expected = load_llama_tokenizer(str(folder))(TEXTS, 32)
  np.testing.assert_array_equal(load_llama_tokenizer(str(tmp_path))(TEXTS, 32), expected)


def test_a_folder_that_transformers_saved(folder, tmp_path):
  PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path)
  expected = load_llama_tokenizer(str(folder))(TEXTS, 32)
  np.testing.assert_array_equal(load_llama_tokenizer(str(tmp_path))(TEXTS, 32), expected)


def test_what_is_refused(folder, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"tokenizer.json; a Llama tokenizer folder has"):
    load_llama_tokenizer(str(tmp_path))
  shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
  file = tmp_path / "tokenizer_config.json"
  settings = json.loads(file.read_text())
  file.write_text(json.dumps(settings | {"tokenizer_class": "T5Tokenizer"}))
  with pytest.raises(ValueError, match="tokenizer_class = 'T5Tokenizer' is not implemented"):
    load_llama_tokenizer(str(tmp_path))
  file.write_text(json.dumps(settings))
  content = json.loads((tmp_path / "tokenizer.json").read_text())
  (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
  with pytest.raises(ValueError, match=r"tokenizer.json: an empty text becomes the ids \[\]"):
    load_llama_tokenizer(str(tmp_path))

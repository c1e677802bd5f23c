"""Prompt files, and the batches that training takes from them by iteration number."""

import collections
import json

import pytest

from dancegrpo_jax.data.prompts import prompt_batches, read_prompts
from dancegrpo_jax.types import Example


def ids(batch):
  return [example.id for example in batch]


def write(tmp_path, name, content):
  path = tmp_path / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(path)


def test_text_file(tmp_path):
  path = write(tmp_path, "p.txt", "\ufeff# a comment\n\na dog\r\n   a cat  \n#x\nçà # 3\n")
  assert read_prompts(path) == [Example(0, "a dog"), Example(1, "a cat"), Example(2, "çà # 3")]
  assert read_prompts(path, "blurry")[1] == Example(1, "a cat", "blurry")


def test_json_list(tmp_path):
  rows = [
    "a dog",
    {"prompt": "two cats", "negative_prompt": "dog", "metadata": {"count": 2}},
    {"prompt": "# 1"},
  ]
  path = write(tmp_path, "p.json", json.dumps(rows))
  assert read_prompts(path, "blurry") == [
    Example(0, "a dog", "blurry"),
    Example(1, "two cats", "dog", None, {"count": 2}),
    Example(2, "# 1", "blurry"),
  ]


BAD = {
  "empty.txt": ("", "has no prompts: write one a line"),
  "comments.txt": ("# only\n\n  \n", "has no prompts"),
  "latin.txt": ("caf\xe9".encode("latin-1"), r"is not UTF-8 \(byte 3\); convert it"),
  "bad.json": ('["a",\n b]', "is not valid JSON: .* at line 2, column 2; correct it"),
  "empty.json": ("", "has no prompts"),
  "none.json": ("[]", "has no prompts"),
  "object.json": ('{"prompt": "a"}', "holds a dict; it must be a list"),
  "number.json": ('["a", 3]', "entry 1 is a int; it must be a string or an object"),
  "field.json": (
    '[{"prompt": "a", "negative": "b"}]',
    "entry 0 has unknown fields negative; known are prompt, negative_prompt",
  ),
  "missing.json": ('[{"metadata": {}}]', "entry 0: prompt must be a string, not None"),
  "blank.json": ('["a", " "]', "entry 1: prompt is empty; remove"),
  "negative.json": (
    '[{"prompt": "a", "negative_prompt": null}]',
    "negative_prompt must be a string, not None",
  ),
  "metadata.json": ('[{"prompt": "a", "metadata": 3}]', "metadata must be an object, not 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_get_one_line_that_names_the_file(tmp_path, name):
  content, message = BAD[name]
  path = write(tmp_path, name, content)
  with pytest.raises(ValueError, match=message) as error:
    read_prompts(path)
  assert path in str(error.value) and "\n" not in str(error.value)


def test_missing_file_and_folder(tmp_path):
  with pytest.raises(ValueError, match="not found: .*nope.txt .*; set data.prompts"):
    read_prompts(str(tmp_path / "nope.txt"))
  with pytest.raises(ValueError, match="is a folder"):
    read_prompts(str(tmp_path))
  with pytest.raises(ValueError, match="not found"):
    read_prompts(write(tmp_path, "file", "x") + "/p.txt")


EXAMPLES = [Example(i, f"prompt {i}") for i in range(10)]


def test_batches_hold_examples():
  batch = prompt_batches(EXAMPLES, 4, seed=0, shuffle=True)[0]
  assert isinstance(batch, list) and all(isinstance(example, Example) for example in batch)
  assert all(example == EXAMPLES[example.id] for example in batch)


def test_random_access_is_the_same_in_any_order_and_process():
  """A resumed run requests iteration 7 without having requested 0 to 6."""
  whole = prompt_batches(EXAMPLES, 4, seed=3, shuffle=True)
  expected = [ids(whole[i]) for i in range(12)]
  again = prompt_batches(EXAMPLES, 4, seed=3, shuffle=True)
  assert [ids(again[i]) for i in reversed(range(12))][::-1] == expected
  assert len(ids(again[10**6])) == 4


def test_each_epoch_has_a_new_order_and_every_prompt():
  batches = prompt_batches(EXAMPLES, 5, seed=1, shuffle=True)
  epochs = [ids(batches[2 * e]) + ids(batches[2 * e + 1]) for e in range(6)]
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert len(set(map(tuple, epochs))) == 6


def test_seeds_differ():
  orders = {
    tuple(ids(prompt_batches(EXAMPLES, 10, seed, True)[0])) for seed in (0, 1, 2, -1, 2**40 + 7)
  }
  assert len(orders) == 5


def test_no_prompt_is_twice_in_a_batch_and_none_is_forgotten():
  batches = prompt_batches(EXAMPLES, 4, seed=0, shuffle=True)
  drawn = [ids(batches[i]) for i in range(300)]
  assert all(len(set(batch)) == 4 for batch in drawn)
  counts = collections.Counter(sum(drawn, []))
  assert set(counts) == set(range(10))
  # 120 are expected, with a standard deviation of 5.3 (2 of 10 are dropped in an epoch).
  assert min(counts.values()) > 85 and max(counts.values()) < 155


def test_in_order():
  batches = prompt_batches(EXAMPLES, 4, seed=0, shuffle=False)
  assert [ids(batches[i]) for i in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]


@pytest.mark.parametrize("count", [0, 11])
def test_count_out_of_range(count):
  with pytest.raises(
    ValueError,
    match=f"prompts_per_iteration is {count}, .* from 1 to the number of prompts, 10: lower it",
  ):
    prompt_batches(EXAMPLES, count, 0, True)

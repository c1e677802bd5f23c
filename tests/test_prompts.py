"""Prompt files, and the batches that training takes from them by iteration number."""

import collections
import json

import pytest

from dancegrpo_jax.data.prompts import digest, prompt_batches, read, read_prompts
from dancegrpo_jax.types import Example


def ids(batch):
  return [example.id for example in batch]


def write(tmp_path, name, content):
  path = tmp_path / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(path)


def texts(path):
  return [example.prompt for example in read_prompts(path)]


def test_text_file(tmp_path):
  content = "\ufeff# a comment\n\n#\n# 2\na dog\r\n   a cat  \n\n# 3\n#x\nçà\u2028b # 4\n"
  path = write(tmp_path, "p.txt", content)
  assert texts(path) == ["a dog", "a cat", "# 3", "#x", "çà\u2028b # 4"]
  assert read_prompts(path, "blurry")[1] == Example(1, "a cat", "blurry")
  assert read(path).summary == (
    f"5 of {path} (2 empty lines and 3 comment lines left out; 2 with # at the beginning)"
  )


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["p.txt", "P.TXT", "p.jsonl", "p.csv"])
def test_ends_of_lines(tmp_path, name, end):
  lines = {"p.jsonl": ['"a dog"', '"a cat"'], "p.csv": ["prompt", "a dog", "a cat"]}
  path = write(tmp_path, name, end.join(lines.get(name, ["a dog", "a cat"])) + end)
  assert texts(path) == ["a dog", "a cat"]
  assert read(path).summary == f"2 of {path}"


def test_a_prompt_may_begin_with_a_mark_or_stand_in_quotes(tmp_path):
  path = write(tmp_path, "p.txt", "#1 dad mug\n#blackandwhite portrait\n")
  assert texts(path) == ["#1 dad mug", "#blackandwhite portrait"]
  path = write(tmp_path, "q.txt", '"a dog"\n"a cat"\n"a dog"\n')
  assert texts(path) == ['"a dog"', '"a cat"', '"a dog"']
  assert read(path).summary.endswith(
    "(1 with the text of an earlier one, kept; all stand in quotation marks, which are part of the"
    " prompts)"
  )


@pytest.mark.parametrize(
  "line, words", [('{"prompt": "a"}', "only a .jsonl file"), ("a dog\tFood", "only a .tsv file")]
)
def test_a_text_file_that_looks_like_another_kind(tmp_path, line, words):
  path = write(tmp_path, "p.txt", f"{line}\n" * 2)
  assert texts(path) == [line] * 2 and words in read(path).summary


def test_json_list(tmp_path):
  rows = [
    "a dog",
    {"prompt": "two cats", "negative_prompt": "dog", "metadata": {"count": 2}},
    {"prompt": "# 1"},
    {"Caption": "a cow", "tag": "x", "include": [{"class": "cow"}], "metadata": {"count": 3}},
    {"text": "a pig", "metadata": None},
  ]
  path = write(tmp_path, "p.JSON", json.dumps(rows))
  assert read_prompts(path, "blurry") == [
    Example(0, "a dog", "blurry"),
    Example(1, "two cats", "dog", None, {"count": 2}),
    Example(2, "# 1", "blurry"),
    Example(3, "a cow", "blurry", None, {"tag": "x", "include": [{"class": "cow"}], "count": 3}),
    Example(4, "a pig", "blurry"),
  ]


def test_json_lines(tmp_path):
  """As GenEval's evaluation_metadata.jsonl; rows may have different keys."""
  lines = [
    '{"tag": "counting", "include": [{"class": "apple", "count": 2}], "prompt": "two apples"}',
    "",
    '  {"prompt": "a\u2028dog", "exclude": null}  ',
    '"a cat"',
  ]
  path = write(tmp_path, "p.jsonl", "\ufeff" + "\r\n".join(lines))
  assert read_prompts(path) == [
    Example(
      0,
      "two apples",
      metadata={"tag": "counting", "include": [{"class": "apple", "count": 2}]},
    ),
    Example(1, "a\u2028dog", metadata={"exclude": None}),
    Example(2, "a cat"),
  ]
  assert read(path).summary == f"3 of {path} (1 empty line left out)"


TABLE = (
  '\ufeff,"Prompt",Category, Negative Prompt ,Note\r\n'
  '0,"a dog, ""Rex"",\nin two lines",Animals,,\r\n'
  "\r\n"
  "1,#1 dad\u2028mug,,blurry,x\r\n"
  ",,,,\r\n"
  "2,a cat,Animals\r\n"
)


def test_table(tmp_path):
  """The cells by RFC 4180, by hand."""
  path = write(tmp_path, "p.csv", TABLE)
  assert read_prompts(path, "dark") == [
    Example(0, 'a dog, "Rex",\nin two lines', "dark", None, {"Category": "Animals", "Note": ""}),
    Example(1, "#1 dad\u2028mug", "blurry", None, {"Category": "", "Note": "x"}),
    Example(2, "a cat", "dark", None, {"Category": "Animals"}),
  ]
  assert read(path).summary == (
    f"3 of {path} (2 empty lines and 1 unnamed column left out; 1 with fewer cells than columns)"
  )


def test_table_with_tabs(tmp_path):
  path = write(tmp_path, "parti.TSV", "Prompt\tCategory\nbond, james\tPeople\n")
  assert read_prompts(path) == [Example(0, "bond, james", metadata={"Category": "People"})]


BAD = {
  "empty.txt": ("", "has no prompts: write one a line"),
  "comments.txt": ("# only\n\n  \n", "has no prompts: .* are comments"),
  "latin.txt": ("caf\xe9".encode("latin-1"), r"is not UTF-8 \(byte 3\); convert it"),
  "excel.tsv": ("prompt\na".encode("utf-16"), r"is not UTF-8 \(byte 0\); convert it"),
  "p.parquet": (b"PAR1\xff", "is of the kind .parquet, .* use .txt .* .json, .jsonl, .csv or .tsv"),
  "p.txt.gz": (b"\x1f\x8b", "is of the kind .gz"),
  "prompts": ("a dog", "without an extension"),
  "bad.json": ('["a",\n b]', "is not valid JSON: .* at line 2, column 2; correct it"),
  "lines.json": ('"a"\n"b"\n', "at line 2, column 1; .* name it .jsonl"),
  "empty.json": ("", "has no prompts: write a list"),
  "none.json": ("[]", "has no prompts"),
  "object.json": ('{"prompt": "a"}', "holds a dict; it must be a list"),
  "number.json": ('["a", 3]', "entry 1 is a int; it must be a string or an object"),
  "name.json": (
    '[{"Text": "a", "caption": "b"}]',
    "entry 0: 'Text' and 'caption' can each be the prompt .*; rename all but one",
  ),
  "missing.json": ('[{"metadata": {}}]', "entry 0 has no column or key of prompts, .*'metadata'"),
  "null.json": ('[{"prompt": null}]', "entry 0: prompt must be a string, not None"),
  "blank.json": ('["a", " "]', "entry 1: prompt is empty; remove"),
  "half.json": (r'["\ud83d"]', "entry 0: prompt .* holds half of a character"),
  "negative.json": (
    '[{"prompt": "a", "negative_prompt": null}]',
    "negative_prompt must be a string, not None",
  ),
  "metadata.json": ('[{"prompt": "a", "metadata": 3}]', "metadata must be an object, not 3"),
  "twice.json": (
    '[{"prompt": "a", "tag": 1, "metadata": {"tag": 2}}]',
    "entry 0 has 'tag' twice, inside of metadata too",
  ),
  "bad.jsonl": ('"a"\n\n{"prompt": "b"\n', "line 3 is not valid JSON: .* at column"),
  "list.jsonl": ('[\n "a"\n]\n', "line 1 is not valid JSON: .* is a .json file"),
  "number.jsonl": ('"a"\n3\n', "line 2 is a int; it must be a string or an object"),
  "columns.csv": ("id,title\n1,a\n", "has no column or key .*'id', 'title'; call one"),
  "semicolons.csv": ("prompt;tag\na;b\n", "has no column or key .*'prompt;tag'"),
  "headless.csv": ("a dog,Animals\na cat,Animals\n", "has no column .*'a dog', 'Animals'"),
  "both.csv": ("prompt,Caption\na,b\n", "'prompt' and 'Caption' can each be the prompt"),
  "twice.csv": ("prompt,tag,tag\na,b,c\n", "has two columns 'tag'; rename one"),
  "comma.csv": ("prompt,tag\na,b\nc, d,e\n", "line 3 has 3 cells, but there are 2 columns; put"),
  "open.csv": ('prompt,tag\na,b\n"c,d\ne,f\n', "row that begins on line 3 .* must end with one"),
  "inside.csv": ('prompt,tag\n"a" dog,b\n', "row that begins on line 2 .* doubled"),
  "blank.csv": ("prompt,tag\na,b\n ,c\n", "line 3: prompt is empty"),
  "header.csv": ("prompt,tag\n", "has no prompts: write one a line"),
  "empty.csv": ("\n", "has no prompts"),
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


def test_digest_depends_on_all_that_a_run_computes_with():
  rows = [Example(0, "a"), Example(1, "b", "c", None, {"tag": 1, "more": [1]})]
  same = [Example(0, "a"), Example(1, "b", "c", None, {"more": [1], "tag": 1})]
  others = [
    rows[::-1],
    rows[:1],
    [rows[0]._replace(prompt="A"), rows[1]],
    [rows[0], rows[1]._replace(negative_prompt="d")],
    [rows[0], rows[1]._replace(metadata={"tag": 2, "more": [1]})],
    [rows[0]._replace(id=2), rows[1]],
  ]
  assert digest(same) == digest(rows) and len({*map(digest, others), digest(rows)}) == 7


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

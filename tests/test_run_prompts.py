"""The prompts of a run, through the command: what it says about them, what a reward gets, and a
resume after a change of the file. And the prompts that tokenizers cut, as transformers counts them.
"""

import json

import pytest
from tiny_checkpoint import PROMPTS, ROOT, TOKENS, overrides

from dancegrpo_jax import main, sample
from dancegrpo_jax.assembly import cut_prompts
from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.report import metrics
from dancegrpo_jax.settings import config_file
from dancegrpo_jax.types import Example

REWARD = """
calls = []

def score(pixels, prompts, metadata):
  calls.append(list(zip(prompts, metadata)))
  return [float(image.mean()) for image in pixels]
"""
ROWS = [
  {"prompt": PROMPTS[0], "tag": "colors", "include": [{"class": "dog", "count": 1}]},
  {"prompt": PROMPTS[1], "exclude": None},
  {"prompt": PROMPTS[2]},
  {"prompt": "word " * 40, "tag": "long"},
]


def write(file, rows) -> None:
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with a reward, prompts and held-out prompts."""
  folder = tmp_path_factory.mktemp("prompts")
  (folder / "scorer_with_metadata.py").write_text(REWARD)
  write(folder / "train.jsonl", ROWS)
  (folder / "unseen.csv").write_text(f'Caption,Level\n"{PROMPTS[3]}",2\n{PROMPTS[3]},3\n')
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(folder)
    yield folder


@pytest.fixture(scope="module")
def argv(tiny_models, place, program_cache):
  """`(**changes) -> flags` of a run on these files."""

  def flags(**changes) -> list[str]:
    values = {
      "iterations": 1,
      "data__prompts": place / "train.jsonl",
      "data__held_out": place / "unseen.csv",
      "rollout__samples_per_prompt": 4,
      "checkpoint__every": 1,
      "evaluation__every": 1,
      "reward__terms": (("scorer_with_metadata:score", 1.0),),
      "reward__combine": "rewards",
      "logging__compilation_cache": program_cache,
    }
    words = overrides(tiny_models, **values | changes)
    return [
      f"--config={ROOT / 'configs' / 'emoji_clip.py'}:tiny",
      *(f"--config.{word}" for word in words),
    ]

  return flags


@pytest.fixture(scope="module")
def run(argv, place):
  """The workdir of one iteration, what was printed, and what the reward was called with."""
  import contextlib
  import io

  output = io.StringIO()
  with contextlib.redirect_stdout(output):
    assert main.main([*argv(), f"--workdir={place / 'run'}"]) == 0
  import scorer_with_metadata

  return place / "run", output.getvalue().splitlines(), list(scorer_with_metadata.calls)


def test_a_run_says_which_prompts_it_read_and_which_are_cut(run, place):
  lines = run[1]
  (first,) = (n for n, line in enumerate(lines) if line.startswith("prompts: "))
  assert lines[first] == f"prompts: 4 of {place / 'train.jsonl'}"
  assert lines[first + 1] == (
    f"held-out prompts: 2 of {place / 'unseen.csv'} (1 with the text of an earlier one, kept)"
  )
  cut = [line for line in lines if " cut to " in line]
  shown = ("word " * 40)[:57]
  assert cut == [
    f"1 of 4 prompts is cut to {TOKENS} tokens by tokenizer/ (CLIP): the first is '{shown}...'"
  ]


def test_a_reward_gets_all_other_keys(run):
  expected = {row["prompt"]: {k: v for k, v in row.items() if k != "prompt"} for row in ROWS}
  seen = [pair for call in run[2] for pair in call]
  trained = [pair for pair in seen if "Level" not in (pair[1] or {})]
  assert {text for text, _ in trained} == set(expected)
  assert all(metadata == (expected[text] or None) for text, metadata in trained)
  held_out = {metadata["Level"] for _, metadata in seen if "Level" in (metadata or {})}
  assert held_out == {"2", "3"}


@pytest.mark.parametrize(
  "file, field", [("train.jsonl", "data.prompts"), ("unseen.csv", "data.held_out")]
)
def test_a_resume_on_changed_prompts_is_refused(run, argv, place, capsys, file, field):
  before = (place / file).read_text()
  (place / file).write_text(before.replace(PROMPTS[3 if "csv" in file else 0], "a green star"))
  assert main.main([*argv(iterations=2), f"--workdir={run[0]}"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f"error: {run[0]} holds a run on other prompts: what config.{field} = ")
  assert str(place / file) in line and line.endswith("or use another --workdir")
  (place / file).write_text(before)
  assert len(metrics.read(run[0])) == 1


def test_changed_metadata_is_another_data_set(run, argv, place, capsys):
  write(place / "train.jsonl", [{**ROWS[0], "tag": "other"}, *ROWS[1:]])
  assert main.main([*argv(iterations=2), f"--workdir={run[0]}"]) == 2
  assert "holds a run on other prompts" in capsys.readouterr().err
  write(place / "train.jsonl", ROWS)


def test_a_file_of_the_same_prompts_in_another_layout_goes_on(run, argv, place, capsys):
  """Empty lines and the order of the keys are no part of the prompts."""
  lines = [json.dumps(dict(reversed(row.items()))) for row in ROWS]
  (place / "train.jsonl").write_text("\n\n".join(lines))
  assert main.main([*argv(iterations=2), f"--workdir={run[0]}"]) == 0
  told = capsys.readouterr().out
  assert f"prompts: 4 of {place / 'train.jsonl'} (3 empty lines left out)" in told
  assert len(metrics.read(run[0])) == 2
  meta = store.read_meta(run[0] / "checkpoints")
  assert {field: each["count"] for field, each in meta["prompts"].items()} == {
    "data.prompts": 4,
    "data.held_out": 2,
  }


def test_sample_says_what_is_cut(argv, place, capsys):
  flags = ["--prompt=" + "word " * 40, "--prompt=a dog", "--samples=1", f"--out={place / 'out'}"]
  words = [word for word in argv() if not word.startswith("--config.reward")]
  assert sample.main([*words, *flags]) == 0
  told = capsys.readouterr().out
  assert f"1 of 2 prompts is cut to {TOKENS} tokens by tokenizer/ (CLIP)" in told


TEXTS = [
  *("dog " * n for n in (9, 10, 13, 14, 15, 40)),
  "Zürich ünïcode 漢字 🦊, highly detailed",
  "a red apple on a blue background",
  "a dog <|endoftext|> a cat",
  "",
]


@pytest.mark.parametrize(
  "recipe, folder, kinds",
  [
    ("emoji_clip", "emoji-sd", {"tokenizer": ("CLIPTokenizer", 16)}),
    (
      "emoji_flow_clip",
      "emoji-flux",
      {"tokenizer": ("CLIPTokenizer", 16), "tokenizer_2": ("T5Tokenizer", 12)},
    ),
  ],
)
def test_the_count_is_that_of_transformers(recipe, folder, kinds, monkeypatch):
  import transformers

  monkeypatch.chdir(ROOT)
  config = config_file.load(str(ROOT / "configs" / f"{recipe}.py"), [])
  limits = cut_prompts.of_model(config)
  assert set(limits) == {f"{place}/" for place in kinds}
  examples = [Example(i, text) for i, text in enumerate(TEXTS)]
  lines = cut_prompts.lines(config, limits, {"prompts": examples})
  for line, (place, (kind, length)) in zip(lines, kinds.items(), strict=True):
    theirs = getattr(transformers, kind).from_pretrained(ROOT / "assets" / folder / place)
    whole = theirs(TEXTS)["input_ids"]
    short = theirs(TEXTS, truncation=True, max_length=length)["input_ids"]
    cut = [text for text, a, b in zip(TEXTS, whole, short) if len(a) != len(b)]
    assert 1 < len(cut) < len(TEXTS)
    name = kind.removesuffix("Tokenizer")
    assert line.startswith(
      f"{len(cut)} of {len(TEXTS)} prompts are cut to {length} tokens by {place}/ ({name}): the"
      f" first is {cut[0][:20]!r}"[:-1]
    )


def test_a_long_negative_prompt_is_said_where_it_is_used(monkeypatch):
  monkeypatch.chdir(ROOT)
  path = str(ROOT / "configs" / "emoji_clip.py")
  examples = {"prompts": [Example(0, "a dog", "dog " * 40), Example(1, "a cat", "dog " * 40)]}
  for scale, count in ((3.0, 1), (1.0, 0)):
    config = config_file.load(path, [f"sampler.guidance_scale={scale}"])
    lines = cut_prompts.lines(config, cut_prompts.of_model(config), examples)
    assert len(lines) == count
    assert all(line.startswith("1 of 1 negative prompts is cut to 16") for line in lines)

"""The TFDS builder: ArrayRecord files without TensorFlow, and its use as a source of prompts."""

import pathlib
import sys

import numpy as np
import pytest

from dancegrpo_jax.data import emoji, emoji_dataset
from dancegrpo_jax.data.emoji_dataset import __main__ as command
from dancegrpo_jax.data.prompts import read_prompts

SUBSET = str(pathlib.Path(__file__).resolve().parent / "fixtures/emoji_subset.ttf")
NAMES = ("red apple", "star", "frog", "ghost")


@pytest.fixture
def four_names(monkeypatch):
  """The builder draws only the names that the small font of the fixtures has."""
  whole = emoji.pairs
  monkeypatch.setattr(emoji, "pairs", lambda split, names=NAMES: whole(split, names))


@pytest.fixture
def data_dir(tmp_path, monkeypatch, four_names):
  emoji_dataset.load("train", data_dir=str(tmp_path), size=24, variants=2, font=SUBSET)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  return str(tmp_path)


@pytest.mark.parametrize("split, pairs", [("train", 28), ("held_out", 4)])
def test_round_trip(data_dir, split, pairs):
  had_tensorflow = "tensorflow" in sys.modules
  source = emoji_dataset.load(split, data_dir=data_dir, size=24, variants=2, font="not read again")
  images, captions, ids = emoji.load_arrays(SUBSET, 24, 2, split, NAMES)
  assert len(source) == len(images) == pairs * 2
  for i in range(len(source)):  # the files keep the table's order
    row = source[i]
    np.testing.assert_array_equal(row["image"], images[i])
    assert row["image"].dtype == np.uint8 and row["pair"] == ids[i]
    assert (
      row["caption"].decode()
      == captions[i]
      == emoji.caption(row["name"].decode(), row["colour"].decode())
    )
  assert ("tensorflow" in sys.modules) == had_tensorflow


def test_read_by_tfds_itself(data_dir):
  import tensorflow_datasets as tfds

  files = [path.name for path in pathlib.Path(data_dir).rglob("*.array_record*")]
  assert sorted(name.split(".")[0] for name in files) == ["emoji-held_out", "emoji-train"]
  builder = tfds.builder_from_directory(f"{data_dir}/emoji/24px_2/1.0.0")
  assert (
    set(builder.info.splits) == {"train", "held_out"}
    and builder.info.splits["train"].num_examples == 56
  )
  assert tfds.data_source("emoji/24px_2", split="held_out", data_dir=data_dir)[0][
    "image"
  ].shape == (24, 24, 3)


def test_source_of_prompts(data_dir):
  examples = read_prompts("tfds:emoji/24px_2#held_out", "blurry")
  expected = [emoji.caption(*pair) for pair in emoji.pairs("held_out")]
  assert [e.prompt for e in examples] == expected and [e.id for e in examples] == [0, 1, 2, 3]
  assert {e.negative_prompt for e in examples} == {"blurry"}
  assert len(read_prompts("tfds:emoji/24px_2")) == 28


@pytest.mark.parametrize("name", ["emoji/24px_2#test", "emoji/9px_9", "no_such_set"])
def test_bad_source_of_prompts(data_dir, name):
  with pytest.raises(
    ValueError, match=f"prompts source tfds:{name} can't be opened .*; prepare it"
  ) as error:
    read_prompts("tfds:" + name)
  assert "\n" not in str(error.value)


def test_missing_font(tmp_path):
  path = str(tmp_path / "nowhere.ttf")
  with pytest.raises(FileNotFoundError) as error:
    emoji_dataset.load("train", data_dir=str(tmp_path / "data"), font=path)
  message = str(error.value)
  assert (
    path in message
    and "fonts-noto-color-emoji" in message
    and "--font" in message
    and "\n" not in message
  )
  assert not list(tmp_path.rglob("*.array_record*"))


def test_font_from_the_environment(tmp_path, monkeypatch, four_names):
  monkeypatch.setenv("EMOJI_FONT", SUBSET)
  assert len(emoji_dataset.load("held_out", data_dir=str(tmp_path), size=8, variants=1)) == 4


def test_command(tmp_path, four_names, capsys):
  flags = [f"--data-dir={tmp_path}", "--size=8", "--variants=1"]
  assert command.main([*flags, f"--font={SUBSET}"]) == 0
  assert "emoji train: 28 pictures\nemoji held_out: 4 pictures\n" in capsys.readouterr().out
  assert command.main(["--data-dir", str(tmp_path / "b"), "--font=/nowhere.ttf"]) == 2
  assert "error: emoji font not found: /nowhere.ttf" in capsys.readouterr().err
  assert command.main(["--data-dir", str(tmp_path / "b"), "--size=0"]) == 2

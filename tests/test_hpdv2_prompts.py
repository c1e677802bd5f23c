"""HPDv2's prompts: their generation from a small fixture, and their use for training.

The fixture's texts were written for this test.
"""

import sys
from pathlib import Path

import huggingface_hub
import pytest

from dancegrpo_jax.data import hpdv2_prompts
from dancegrpo_jax.data.hpdv2_prompts import __main__ as command
from dancegrpo_jax.data.prompts import read_prompts

FIXTURE = str(Path(__file__).parent / "fixtures" / "hpdv2_train.json")
PROMPTS = [
  "a copper kettle on a stove",
  "two lemons, one green",
  "ein Fluß bei Nacht, 夜の川",
  "A copper kettle on a stove",
]


def test_round_trip_and_source_of_prompts(tmp_path, monkeypatch):
  had_tensorflow = "tensorflow" in sys.modules
  source = hpdv2_prompts.load(data_dir=str(tmp_path), json_file=FIXTURE)
  assert [source[i]["prompt"].decode() for i in range(len(source))] == PROMPTS
  assert [path.name.split(".")[-1][:12] for path in tmp_path.rglob("*array_record*")] == [
    "array_record"
  ]
  assert ("tensorflow" in sys.modules) == had_tensorflow
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  examples = read_prompts("tfds:hpdv2_prompts", "blurry")
  assert [e.prompt for e in examples] == PROMPTS and {e.negative_prompt for e in examples} == {
    "blurry"
  }
  assert len(hpdv2_prompts.load(data_dir=str(tmp_path), json_file="not read again")) == 4


def test_fetched_from_the_hub(tmp_path, monkeypatch, capsys):
  asked = []

  def fake(repository, file, repo_type):
    asked.append((repository, file, repo_type))
    return FIXTURE

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
  assert command.main([f"--data-dir={tmp_path}"]) == 0
  assert asked == [("ymhao/HPDv2", "train.json", "dataset")]
  assert "hpdv2_prompts train: 4 prompts" in capsys.readouterr().out


def test_a_file_for_machines_without_the_data_set(tmp_path, capsys):
  out = tmp_path / "hpdv2.json"
  assert command.main([f"--data-dir={tmp_path}", f"--json={FIXTURE}", f"--out={out}"]) == 0
  assert [example.prompt for example in read_prompts(str(out))] == PROMPTS
  for wrong in (tmp_path / "hpdv2.txt", tmp_path / "no" / "hpdv2.json"):
    assert command.main([f"--data-dir={tmp_path / 'other'}", f"--out={wrong}"]) == 2
    assert f"error: --out={wrong}: must end with .json" in capsys.readouterr().err
  assert not (tmp_path / "other").exists()


def test_without_a_network(tmp_path, monkeypatch, capsys):
  def refused(*_, **__):
    raise ConnectionError("no route\nto host")

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)
  assert command.main([f"--data-dir={tmp_path}"]) == 2
  text = capsys.readouterr().err
  assert (
    "can't be fetched (ConnectionError: no route to host); where there is a network run `hf"
    " download" in text
  )
  assert text.count("\n") == 1 and not list(tmp_path.rglob("*array_record*"))
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  with pytest.raises(
    ValueError,
    match="tfds:hpdv2_prompts can't be opened .* `python -m dancegrpo_jax.data.hpdv2_prompts`",
  ):
    read_prompts("tfds:hpdv2_prompts")


@pytest.mark.parametrize(
  "content, message",
  [
    ("{}", "holds a dict; HPDv2's train.json is a list"),
    ("[1]", "entry 0: has no text prompt"),
    ('[{"prompt": null}]', "entry 0: has no text prompt"),
    ("[", "not valid JSON"),
    (None, "no such file; give HPDv2's"),
  ],
)
def test_another_file(tmp_path, capsys, content, message):
  file = tmp_path / "x.json"
  if content is not None:
    file.write_text(content)
  assert command.main([f"--data-dir={tmp_path / 'data'}", f"--json={file}"]) == 2
  text = capsys.readouterr().err
  assert message in text and f"error: {file}" in text

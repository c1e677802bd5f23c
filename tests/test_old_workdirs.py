"""A workdir that an earlier version wrote goes on as it would have gone on there.

tests/fixtures/workdir/f447b47.tar.gz was written at commit f447b47 (version 0.1.0) by
`python -m dancegrpo_jax.main --config=configs/emoji_clip.py:tiny` on the models of
`tiny_checkpoint.write_models`, with 2 of 4 iterations done. whole_metrics.jsonl beside it is of the
same run without a break.
"""

import json
import shutil
import tarfile

import pytest
from tiny_checkpoint import ROOT, Folders, overrides, write_models

from dancegrpo_jax import main
from dancegrpo_jax.settings import config_file, stored_config

ARCHIVE = ROOT / "tests" / "fixtures" / "workdir" / "f447b47.tar.gz"
CONFIG = f"--config={ROOT / 'configs' / 'emoji_clip.py'}:tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with the models and the old workdir, named "half"."""
  place = tmp_path_factory.mktemp("old")
  write_models(place)
  with tarfile.open(ARCHIVE) as archive:
    archive.extractall(place, filter="data")
  return place


def flags(**changes) -> list[str]:
  """Those of the old run, on models in the working folder."""
  models = Folders(*(type(ARCHIVE)(name) for name in ("tiny-sd", "tiny-clip", "prompts.txt")))
  words = overrides(
    models,
    checkpoint__every=2,
    evaluation__every=0,
    optimizer__learning_rate=1e-3,
    ema__decay=0.9,
    data__held_out="",
    **changes,
  )
  return [CONFIG, *(f"--config.{word}" for word in words), "--workdir=half"]


def rows(file) -> list[dict]:
  return [json.loads(line) for line in file.read_text().splitlines()]


def test_it_goes_on(folder, tmp_path, monkeypatch, capsys):
  place = tmp_path / "run"
  shutil.copytree(folder, place)
  monkeypatch.chdir(place)
  assert main.main(flags(iterations=4)) == 0
  told = capsys.readouterr().out
  # The config says "highest", which is new since then.
  assert "model.matmul_precision = 'default': the run is older than this field" in told
  expected, found = rows(place / "half" / "whole_metrics.jsonl"), rows(place / "half/metrics.jsonl")
  assert len(found) == 4
  for before, after in zip(expected[2:], found[2:]):
    assert "images_per_second" in before and "samples_per_second" in after  # the present name
    for name, value in before.items():
      if not name.startswith("time/") and name != "images_per_second":
        assert after[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
  assert json.loads((place / "half" / "config.json").read_text())["model"]["matmul_precision"] == (
    "default"
  )


def test_what_the_user_sets_by_hand_counts(folder, tmp_path, monkeypatch, capsys):
  place = tmp_path / "run"
  shutil.copytree(folder, place)
  monkeypatch.chdir(place)
  assert main.main(flags(iterations=4, model__matmul_precision="highest")) == 2
  errors = capsys.readouterr().err
  assert "config.model.matmul_precision: 'default' -> 'highest'" in errors
  assert len(rows(place / "half" / "metrics.jsonl")) == 2


def test_every_field_of_the_table_is_a_field():
  fields = stored_config.flatten(config_file.load(str(ROOT / "configs" / "common.py")))
  assert set(stored_config.ADDED) <= set(fields)
  # Those whose default is the old behaviour: an older workdir of such a config just goes on.
  different = {name for name, added in stored_config.ADDED.items() if fields[name] != added.value}
  assert not different

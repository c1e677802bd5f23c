"""A new run that starts from another run's weights."""

import json
import shutil

import pytest
from tiny_checkpoint import ROOT, overrides

from dancegrpo_jax import main

TARGETS = r".*attn.*/to_(q|k|v|out_0)/kernel"
LORA = {"lora__rank": 2, "lora__alpha": 4.0, "lora__targets": TARGETS}


@pytest.fixture(scope="module")
def train(tiny_models, tmp_path_factory):
  """`(name, flags, **changes) -> exit code` of main on the tiny models in such a workdir."""
  place = tmp_path_factory.mktemp("runs")

  def run(name: str, *flags: str, **changes) -> int:
    settings = {
      "iterations": 2,
      "checkpoint__every": 1,
      "evaluation__every": 1,
      "optimizer__learning_rate": 1e-2,
      "ema__decay": 0.5,
      "data__held_out": "",
    }
    words = overrides(tiny_models, **(settings | changes))
    config = f"--config={ROOT / 'configs' / 'emoji_clip.py'}:tiny"
    words = [f"--config.{word}" for word in words]
    return main.main([config, *words, f"--workdir={place / name}", *flags])

  run.place = place
  return run


@pytest.fixture(scope="module")
def source(train):
  assert train("full") == 0
  return train.place / "full"


@pytest.fixture(scope="module")
def adapters(train):
  assert train("lora", **LORA) == 0
  return train.place / "lora"


def scores(workdir, iteration: int) -> list[float]:
  """Of the fixed prompts, drawn with the averaged weights."""
  return json.loads(
    (workdir / "samples" / f"iteration_{iteration:06d}" / "prompts.json").read_text()
  )["scores"]


def rows(workdir) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def refused(train, capsys, *arguments, **changes) -> str:
  capsys.readouterr()
  assert train(*arguments, **changes) == 2
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1, lines
  return lines[0]


def test_it_begins_where_the_other_one_was(train, source, capsys):
  """With its averaged weights, a new optimizer, and a penalty that holds to the base model."""
  changes = {"optimizer__warmup_steps": 4, "objective__kl__weight": 0.1}
  flag = f"--init-from={source}@1"
  assert train("next", flag, **changes) == 0
  workdir = train.place / "next"
  assert f"starting from the averaged weights of {source}@1" in capsys.readouterr().out
  assert scores(workdir, 0) == scores(source, 1) != scores(source, 0)
  assert json.loads((workdir / "config.json").read_text())["init_from"] == f"{source}@1"
  assert [row["learning_rate"] for row in rows(workdir)] == pytest.approx([0.0025, 0.005])
  assert rows(workdir)[0]["kl"] > 0  # the base isn't what it starts from
  # Another checkpoint is another run.
  capsys.readouterr()
  assert train("next", f"--init-from={source}@2", iterations=3, **changes) == 2
  assert f"config.init_from: '{source}@1' -> '{source}@2'" in capsys.readouterr().err


def test_a_resume_needs_the_other_run_no_more(train, source):
  copy = train.place / "gone"
  shutil.copytree(source, copy)
  assert train("resumed", f"--init_from={copy}", iterations=1) == 0
  stored = json.loads((train.place / "resumed" / "config.json").read_text())["init_from"]
  assert stored == f"{copy}@2"
  shutil.rmtree(copy)
  assert train("resumed", f"--init_from={copy}", iterations=2) == 0
  assert train("resumed", iterations=3) == 0
  assert len(rows(train.place / "resumed")) == 3


def test_adapters_go_on_or_are_merged(train, adapters):
  assert train("more", f"--init-from={adapters}", iterations=1, **LORA) == 0
  assert scores(train.place / "more", 0) == scores(adapters, 2) != scores(adapters, 0)
  assert train("merged", f"--init-from={adapters}", iterations=1) == 0
  merged = scores(train.place / "merged", 0)
  assert merged == pytest.approx(scores(adapters, 2), abs=1e-4)


def test_what_does_not_fit_is_one_line(train, source, adapters, capsys):
  def line(flag: str, name: str = "new", **changes) -> str:
    return refused(train, capsys, name, f"--init-from={flag}", **changes)

  assert "no such directory" in line(f"{source}/nowhere")
  assert "no checkpoint of iteration 7; it has 1, 2" in line(f"{source}@7")
  assert "is the workdir of this run" in line(str(source), name="full")
  assert "is the workdir of this run" in line(f"{source}/checkpoints@1", name="full")
  assert "was trained with every weight" in line(str(source), **LORA)
  assert "was trained with lora.rank = 2; this config has 3" in line(
    str(adapters), **LORA | {"lora__rank": 3}
  )
  assert "was trained with model.family = 'stable_diffusion'" in line(
    str(source), model__family="flux", model__checkpoint="assets/emoji-flux"
  )
  assert "does not fit this run's model" in line(str(source), model__checkpoint="assets/emoji-sd")
  assert "says too where adapters start" in line(
    str(adapters), **LORA, lora__checkpoint="somewhere"
  )
  assert "give one of them" in line(str(source), init_from=str(source))
  assert not (train.place / "new").exists()

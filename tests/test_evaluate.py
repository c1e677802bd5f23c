"""evaluate: its statistics against closed forms, and the command on a trained tiny model."""

import json

import numpy as np
import pytest
from tiny_checkpoint import ROOT, overrides

from dancegrpo_jax import evaluate, main
from dancegrpo_jax.evaluation import measures

EXPECTED = ("clip", "clip/retrieval", "clip/diversity", "compressibility")


def test_bootstrap_interval_is_the_normal_one_of_the_prompts_means():
  """Prompts are what varies: eight equal samples of a prompt count no more than one."""
  rng = np.random.default_rng(0)
  prompts = rng.standard_normal((400, 1))
  low, high = measures.bootstrap(np.repeat(prompts, 8, axis=1), draws=4000)
  half = 1.96 * prompts.std() / 20
  np.testing.assert_allclose(
    [low, high], [prompts.mean() - half, prompts.mean() + half], atol=0.1 * half
  )
  prompts[0] = np.nan  # a failed score is left out
  assert np.isfinite(measures.bootstrap(np.repeat(prompts, 8, axis=1))).all()


def test_diversity():
  axes = np.eye(4)
  assert measures.diversity(np.stack([axes, axes])) == pytest.approx(1.0)  # orthogonal
  assert measures.diversity(np.ones((3, 5, 1))) == pytest.approx(0.0)  # all alike
  pair = np.array([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
  assert measures.diversity(pair) == pytest.approx(0.5)  # the mean of two groups


def test_top1():
  captions = np.eye(3)
  images = np.array([[captions[0], captions[2]], [captions[1], captions[1]]])
  assert measures.top1(images, captions).tolist() == [[True, False], [True, True]]


@pytest.fixture(scope="module")
def evaluated(tiny_models, tmp_path_factory):
  folder = tmp_path_factory.mktemp("evaluate")
  settings = {
    "iterations": 2,
    "optimizer__learning_rate": 1e-3,
    "evaluation__samples": 3,
    "evaluation__every": 0,
    "reward__terms": (("clip", 1.0), ("compressibility", 0.1)),
  }
  words = [f"--config.{word}" for word in overrides(tiny_models, **settings)]
  config = f"--config={ROOT / 'configs' / 'emoji_clip.py'}:tiny"
  assert main.main([config, *words, f"--workdir={folder / 'run'}"]) == 0
  held_out = folder / "unseen.txt"
  held_out.write_text("a red cat\na blue dog\n")
  files = [f"--prompts={tiny_models.prompts}", f"--prompts={held_out}"]
  code = evaluate.main(
    [config, *words, f"--checkpoint={folder / 'run'}", *files, f"--out={folder / 'scores.json'}"]
  )
  return code, folder


def test_the_command_compares_base_and_checkpoint(evaluated, capsys):
  code, folder = evaluated
  assert code == 0
  values = json.loads((folder / "scores.json").read_text())
  assert list(values["results"])[1] == "unseen"
  for name, rows in values["results"].items():
    assert set(rows) == set(EXPECTED)
    for term in ("clip", "compressibility"):
      row, samples = rows[term], values["samples"][name]
      for key in ("base", "checkpoint"):
        np.testing.assert_allclose(
          row[key], np.mean([sample[term] for sample in samples[key]]), rtol=1e-5
        )
      assert row["low"] <= row["difference"] <= row["high"]
      np.testing.assert_allclose(row["difference"], row["checkpoint"] - row["base"], atol=1e-6)
    assert rows["clip"]["difference"] != 0


def test_the_command_keeps_every_image_with_its_scores(evaluated):
  folder = evaluated[1]
  values = json.loads((folder / "scores.json").read_text())["samples"]
  assert [row["prompt"] for row in values["unseen"]["base"]] == ["a red cat"] * 3 + [
    "a blue dog"
  ] * 3
  for rows in values.values():
    files = [row["file"] for kind in rows.values() for row in kind]
    assert len(set(files)) == len(files) and all(
      (folder / file).read_bytes()[:4] == b"\x89PNG" for file in files
    )
  assert (folder / "scores" / "unseen.png").is_file()


def test_an_out_that_would_be_the_images_folder(tmp_path, tiny_models, capsys):
  words = [f"--config.{word}" for word in overrides(tiny_models)]
  config = f"--config={ROOT / 'configs' / 'emoji_clip.py'}:tiny"
  assert evaluate.main([config, *words, "--checkpoint=base", f"--out={tmp_path / 'scores'}"]) == 2
  assert "scores: must end with .json" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_not_there(tmp_path, tiny_models, capsys):
  words = [f"--config.{word}" for word in overrides(tiny_models)]
  config = f"--config={ROOT / 'configs' / 'emoji_clip.py'}:tiny"
  assert (
    evaluate.main(
      [
        config,
        *words,
        f"--checkpoint={tmp_path / 'none'}",
        f"--out={tmp_path / 'x' / 'scores.json'}",
      ]
    )
    == 2
  )
  assert "none" in capsys.readouterr().err and not (tmp_path / "x").exists()

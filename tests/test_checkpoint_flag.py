"""--checkpoint=WORKDIR[@ITERATION] alone: the config is the one that is stored with the run.

The result is the same, bit for bit, as with --config and every override.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoint import ROOT, overrides, write_models

from dancegrpo_jax import evaluate, main, sample
from dancegrpo_jax.assembly import sampling
from dancegrpo_jax.checkpoints import chosen, components, store
from dancegrpo_jax.convert import __main__ as convert
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.settings import config_file, stored_config
from dancegrpo_jax.types import Example

CONFIG = str(ROOT / "configs" / "emoji_clip.py") + ":tiny"
# Values that a config file in JSON could lose: tuples, infinity, and a section of three levels.
SETTINGS = [
  "iterations=2",
  "advantage.clamp=inf",
  "sampler.window.size=2",
  "optimizer.learning_rate=1e-3",
  "ema.decay=0.5",
  "evaluation.steps=2",
  "evaluation.prompts=2",
  "evaluation.samples=2",
  "evaluation.every=0",
  "checkpoint.every=1",
]


@pytest.fixture(scope="module")
def words(tiny_models) -> list[str]:
  return [*overrides(tiny_models), *SETTINGS]


@pytest.fixture(scope="module")
def run(words, tmp_path_factory) -> Path:
  """The workdir of a run with the checkpoints 1 and 2."""
  workdir = tmp_path_factory.mktemp("run") / "emoji"
  flags = [f"--config.{word}" for word in words]
  assert main.main([f"--config={CONFIG}", *flags, f"--workdir={workdir}"]) == 0
  return workdir


def errors(capsys, command, *flags: str) -> list[str]:
  """What a command answers a mistake with."""
  assert command.main(list(flags)) == 2
  return capsys.readouterr().err.splitlines()


def pixels(out: Path) -> dict[str, np.ndarray]:
  return {path.name: np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))}


def test_the_stored_config_is_the_config(run, words):
  found = chosen.config_of(chosen.find(str(run)))
  assert found.to_dict() == config_file.load(CONFIG, words).to_dict()
  assert isinstance(found.reward.terms, tuple) and found.advantage.clamp == float("inf")


def test_samples_and_scores_are_those_of_the_full_config(run, words, tmp_path):
  prompt = "--prompt=a red apple on a blue background"
  whole_config = [f"--config={CONFIG}", *(f"--config.{word}" for word in words)]
  for name, flags in (("whole", whole_config), ("alone", [])):
    checkpoint = f"--checkpoint={run}"
    assert sample.main([*flags, checkpoint, prompt, f"--out={tmp_path / name}"]) == 0
    prompts = f"--prompts={tmp_path / 'two.txt'}"
    (tmp_path / "two.txt").write_text("a cat\na star\n")
    out = f"--out={tmp_path / name}.json"
    assert evaluate.main([*flags, checkpoint, prompts, out]) == 0
  whole, alone = pixels(tmp_path / "whole"), pixels(tmp_path / "alone")
  assert list(whole) == list(alone) and len(whole) == 6
  for name, image in whole.items():
    np.testing.assert_array_equal(image, alone[name])
  texts = [(tmp_path / f"{name}.json").read_text() for name in ("whole", "alone")]
  assert texts[0].replace("whole/", "alone/") == texts[1]


def test_an_earlier_checkpoint_and_an_override(run, tmp_path):
  """The weights are those of that iteration, and an override holds on top of the stored config."""
  config = chosen.config_of(chosen.find(f"{run}@1"))
  for iteration in (1, 2):
    with sampling.opened(config, f"{run}@{iteration}") as opened:
      abstract = components.placed(opened.weights, opened.model.shardings)
      saved = store.restore_fields(run / "checkpoints", {"ema": abstract}, iteration)["ema"]
      kernel = saved["denoiser"]["conv_in"]["kernel"]
      np.testing.assert_array_equal(kernel, opened.weights["denoiser"]["conv_in"]["kernel"])
      drawn = sampling.draw(opened, opened.weights, [Example(0, "a cat")], 1, seed=0).pixels
      name = f"--checkpoint={run / 'checkpoints'}@{iteration}"
      out = tmp_path / str(iteration)
      flags = [name, "--prompt=a cat", "--samples=1", f"--out={out}"]
      assert sample.main(flags) == 0
      expected = np.round(np.clip(drawn[0, 0], 0, 1) * 255).astype(np.uint8)
      np.testing.assert_array_equal(pixels(out)["00_00.png"], expected)
      assert sample.main([*flags, "--config.evaluation.steps=3"]) == 0
      assert np.any(pixels(out)["00_00.png"] != expected)
  assert np.any(pixels(tmp_path / "1")["00_00.png"] != pixels(tmp_path / "2")["00_00.png"])


def test_names_of_one_checkpoint(run, tmp_path, monkeypatch):
  odd = tmp_path / "lr@1"
  shutil.copytree(run / "checkpoints", odd / "checkpoints")
  monkeypatch.chdir(tmp_path)
  for name, folder, iteration in (
    (str(run), run, 2),
    (f"{run}/", run, 2),
    (f"{run}@1", run, 1),
    (f"{run}/@1", run, 1),
    (f"{run}/checkpoints", run, 2),
    (f"{run}/checkpoints@1", run, 1),
    (f"{run}/checkpoints/1", run, 1),
    (f"{run}/checkpoints/2/", run, 2),
    (f"{run}/checkpoints/2@2", run, 2),
    ("lr@1", odd, 2),
    ("lr@1@1", odd, 1),
    ("./lr@1/checkpoints/1", odd, 1),
  ):
    found = chosen.find(name)
    assert Path(found.folder).resolve() == (folder / "checkpoints").resolve(), name
    assert found.iteration == iteration, name
    again = chosen.find(found.pinned)
    assert (again.folder, again.iteration) == (found.folder, iteration), name


@pytest.mark.parametrize(
  "name, message",
  [
    ("{run}@3", "checkpoints: no checkpoint of iteration 3; it has 1, 2"),
    ("{run}/checkpoints/3", "checkpoints: no checkpoint of iteration 3; it has 1, 2"),
    ("{run}@last", "not the number of an iteration; write it as {run}@2"),
    ("{run}@", "not the number of an iteration; write it as {run}@2"),
    ("{run}@-1", "not the number of an iteration; write it as {run}@2"),
    ("{run}@²", "not the number of an iteration; write it as {run}@2"),
    ("{run}/checkpoints/1@2", "is the checkpoint of iteration 1; leave out @2"),
    ("{run}/nowhere", "no such directory; give the checkpoints/ of a workdir"),
    ("{run}/nowhere@2", "no such directory; give the checkpoints/ of a workdir"),
    ("{run}/samples", "holds no finished checkpoint"),
    ("{run}/config.json", "no such directory"),
    ("", "the name of the checkpoint is empty"),
  ],
)
@pytest.mark.parametrize(
  "command", [sample, evaluate, convert], ids=["sample", "evaluate", "export"]
)
def test_a_wrong_one_is_one_line(run, command, name, message, tmp_path, capsys):
  flags = [f"--checkpoint={name.format(run=run)}", f"--out={tmp_path / 'out.json'}"]
  flags += {sample: ["--prompt=a"], evaluate: [], convert: []}[command]
  lines = errors(capsys, command, *(["export"] if command is convert else []), *flags)
  assert len(lines) == 1 and message.format(run=run) in lines[0], lines
  assert not list(tmp_path.iterdir())


def test_a_long_list_of_iterations_is_bounded(tmp_path):
  for iteration in range(0, 2000, 10):
    folder = tmp_path / "checkpoints" / str(iteration)
    folder.mkdir(parents=True)
    (folder / "_CHECKPOINT_METADATA").write_text("{}")
  with pytest.raises(ConfigError) as raised:
    chosen.find(f"{tmp_path}@5")
  assert "0, 10, 20, 30, 40, 50, ..., 1940, " in str(raised.value) and len(str(raised.value)) < 250


def test_mistakes_beside_it(run, tmp_path, capsys):
  out, prompt = f"--out={tmp_path / 'out'}", "--prompt=a"
  stored, base = f"--checkpoint={run}", "--checkpoint=base"
  for flags, message in (
    (
      [base, prompt],
      "--config is missing; give a file or a name, as --config=emoji_clip, or a run",
    ),
    ([prompt], "--config is missing"),
    ([stored], "nothing to draw; give --prompt=TEXT or --prompts=FILE"),
    ([stored, prompt, "--samples=0"], "--samples=0: must be at least 1"),
    ([stored, prompt, "--samples=-3"], "--samples=-3: must be at least 1"),
    ([stored, prompt, f"--seed={2**31}"], "--seed=2147483648: must be"),
    ([stored, f"--prompts={tmp_path / 'no.txt'}"], "no.txt"),
    ([stored, prompt, "--config.evaluation.step=3"], "unknown key; did you mean evaluation.steps?"),
    ([stored, prompt, "--config.evaluation.steps=x"], "not a value of type int"),
    ([stored, prompt, "--config.lora.rank=2"], "lora.alpha = 0.0: the adapters of rank 2"),
    ([stored, prompt, "--config.model.checkpoint=moved"], "'moved': no such folder"),
  ):
    lines = errors(capsys, sample, *flags, out)
    assert message in lines[0], lines
  assert not list(tmp_path.iterdir())


def test_prompts_of_files_in_batches(run, tmp_path, capsys):
  """What is drawn in batches is what is drawn at once; names, list and grid."""
  texts = [
    f"a {thing} no. {i}" for i, thing in enumerate(["cat", "star", "../x", "a/b", "cat"] * 9)
  ]
  (tmp_path / "many.jsonl").write_text(
    "".join(json.dumps({"prompt": text, "negative_prompt": "grey"}) + "\n" for text in texts)
  )
  (tmp_path / "more.txt").write_text("ein Hut ☂\n" * 60)
  flags = [f"--checkpoint={run}", "--prompt=first", "--samples=3", "--seed=-7"]
  flags += [f"--prompts={tmp_path / name}" for name in ("many.jsonl", "more.txt")]
  assert sample.main([*flags, f"--out={tmp_path / 'out'}", "--config.rollout.chunk=16"]) == 0
  printed = capsys.readouterr().out
  assert f"prompts: 45 of {tmp_path / 'many.jsonl'}" in printed
  assert "318 images" in printed and "the first 16 prompts, 3 samples of each" in printed
  rows = [
    json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
  ]
  everything = ["first", *texts, *["ein Hut ☂"] * 60]
  assert [row["prompt"] for row in rows] == [text for text in everything for _ in range(3)]
  assert [row["number"] for row in rows] == [0, 1, 2] * 106
  assert all(row["seed"] == -7 for row in rows)
  assert [row.get("negative_prompt") for row in rows[::3]] == [None, *["grey"] * 45, *[None] * 60]
  found = pixels(tmp_path / "out")
  grid = found.pop("grid.png")
  assert sorted(found) == sorted(row["file"] for row in rows) and len(found) == 318
  assert rows[0]["file"] == "000_00.png"
  # 16 rows of 3 pictures, which are enlarged to 96 pixels, with at most four lines of text.
  assert grid.shape[1] == 3 * 102 + 6 and grid.shape[0] <= 16 * (102 + 64) + 6
  config = chosen.config_of(chosen.find(str(run)))
  examples = [Example(i, text) for i, text in enumerate(everything)]
  with config.unlocked():
    config.rollout.chunk = 512
  with sampling.opened(config, str(run)) as opened:
    at_once = sampling.draw(opened, opened.weights, examples, 3, seed=-7).pixels
  at_once = np.clip(at_once.reshape(-1, 32, 32, 3), 0, 1) * 255
  for row, expected in zip(rows, at_once, strict=True):
    assert np.abs(found[row["file"]] - expected).max() < 0.6, row  # rounding is .5


def test_a_workdir_of_an_earlier_version(tmp_path, monkeypatch):
  """Its config lacks fields; they count as the values under which it was computed."""
  write_models(tmp_path)
  with tarfile.open(ROOT / "tests" / "fixtures" / "workdir" / "f447b47.tar.gz") as archive:
    archive.extractall(tmp_path, filter="data")
  monkeypatch.chdir(tmp_path)
  config = chosen.config_of(chosen.find("half"))
  before = json.loads((tmp_path / "half" / "config.json").read_text())
  fields = stored_config.flatten(config)
  assert fields["model.matmul_precision"] == "default" and "matmul_precision" not in before["model"]
  common = config_file.load(str(ROOT / "configs" / "common.py"))
  assert set(fields) == set(stored_config.flatten(common))
  assert sample.main(["--checkpoint=half", "--prompt=a red cat", "--out=out"]) == 0
  assert len(pixels(tmp_path / "out")) == 5


REWARD = """
def brightness(pixels, prompts, metadata):
  return pixels.mean((1, 2, 3))
"""
OWN = """
from configs import emoji_clip

def get_config():
  config = emoji_clip.get_config("tiny")
  config.reward.terms = (("own_rewards.bright:brightness", 1.0),)
  return config
"""


def test_a_reward_beside_the_config_is_found_from_the_workdir(tmp_path):
  """In processes of their own, each in another folder."""
  folders = write_models(tmp_path)
  place = tmp_path / "project"
  (place / "own_rewards").mkdir(parents=True)
  (place / "own_rewards" / "bright.py").write_text(REWARD)
  (place / "recipe.py").write_text(OWN)
  words = overrides(
    folders, iterations=1, evaluation__every=0, data__held_out="", evaluation__samples=1
  )
  flags = [f"--config={place / 'recipe.py'}", *(f"--config.{word}" for word in words)]

  def command(name: str, *flags: str) -> subprocess.CompletedProcess:
    (tmp_path / "elsewhere").mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
      [sys.executable, "-m", f"dancegrpo_jax.{name}", *flags],
      cwd=tmp_path / "elsewhere",
      env=environment,
      capture_output=True,
      text=True,
    )

  done = command("main", *flags, f"--workdir={tmp_path / 'run'}")
  assert done.returncode == 0, done.stderr
  question = ["evaluate", f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'scores.json'}"]
  done = command(*question)
  assert done.returncode == 0, done.stderr
  results = json.loads((tmp_path / "scores.json").read_text())["results"]
  assert list(results["prompts"]) == ["own_rewards.bright:brightness"]
  place.rename(tmp_path / "moved")
  done = command(*question)
  assert done.returncode == 2
  (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
  assert "config.reward.terms names 'own_rewards.bright:brightness'" in line
  assert f"here or in {place}, where the run had it; set PYTHONPATH" in line


def test_the_evaluation_names_what_it_evaluated(run, tmp_path):
  flags = ['--config.reward.terms=(("compressibility", 1.0),)', f"--out={tmp_path / 'one.json'}"]
  (tmp_path / "one.txt").write_text("a cat\n")
  assert evaluate.main([f"--checkpoint={run}@1", f"--prompts={tmp_path / 'one.txt'}", *flags]) == 0
  content = json.loads((tmp_path / "one.json").read_text())
  assert content["checkpoint"] == f"{run}@1" and content["iteration"] == 1
  assert list(content["results"]["one"]) == ["compressibility"]

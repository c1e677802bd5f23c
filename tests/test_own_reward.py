"""examples/own_reward as its user runs it: a network from outside the package scores on the
devices, in training, evaluation and plans; and a function on the host does.
"""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dancegrpo_jax import evaluate, main
from dancegrpo_jax.assembly import reward_builders
from dancegrpo_jax.data.emoji import COLOURS as RGB
from dancegrpo_jax.plan import __main__ as plan
from dancegrpo_jax.report import metrics
from dancegrpo_jax.settings import config_file
from dancegrpo_jax.types import Example, Media

ROOT = Path(__file__).parent.parent
KIND = "examples.own_reward.reward:KIND"
EMOJI = "configs/emoji_clip.py:tiny"
OWN = "examples/own_reward/config.py:tiny"
HOST = "my_rewards_of_test:dark"
# The smallest run that trains: what takes time is to compile it.
SMALL = ("--config.iterations=2", "--config.sampler.steps=3", "--config.evaluation.every=0")
SMALL += ("--config.optimizer.microbatch=16", "--config.objective.timesteps=all")


@pytest.fixture(scope="module", autouse=True)
def in_the_project_folder():
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(ROOT)
    yield


def terms(*names: str) -> str:
  return f"--config.reward.terms={tuple((name, 1.0) for name in names)}"


@pytest.fixture(scope="module")
def my_rewards(tmp_path_factory):
  """The README's function in a module of its own, on the path."""
  folder = tmp_path_factory.mktemp("mine")
  text = (ROOT / "examples" / "own_reward" / "README.md").read_text()
  code = text.split("```python\n")[1].split("```")[0]
  (folder / "my_rewards_of_test.py").write_text(code)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(folder)
    yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, my_rewards) -> Path:
  """A run of the embedded emoji model with the network and the function."""
  folder = tmp_path_factory.mktemp("run") / "emoji"
  assert main.main([f"--config={EMOJI}", *SMALL, terms(KIND, HOST), f"--workdir={folder}"]) == 0
  return folder


def test_training(workdir):
  rows = metrics.read(workdir)
  assert len(rows) == 2
  for row in rows:
    assert row["reward/failed"] == 0 and row["grad_norm"] > 0
    assert 0.3 < row[f"reward/{KIND}/mean"] <= 1 and 0 < row[f"reward/{HOST}/mean"] < 1


def test_evaluation(workdir, tmp_path):
  flags = [*SMALL, terms(KIND, HOST), "--config.evaluation.samples=1"]
  prompts = tmp_path / "prompts.txt"
  prompts.write_text("a star on a red background\na cat on a cyan background\n")
  out = tmp_path / "evaluation.json"
  asked = [f"--checkpoint={workdir}", f"--prompts={prompts}", f"--out={out}"]
  assert evaluate.main([f"--config={EMOJI}", *flags, *asked]) == 0
  assert KIND in out.read_text() and HOST in out.read_text()


@pytest.mark.parametrize("config, name", [(EMOJI, KIND), (OWN, "own_reward.reward:FROM_SECTION")])
def test_a_plan(config, name, capsys):
  """Nothing but shapes is needed, and the section is blanked."""
  flags = [] if config == OWN else [terms(name)]
  if config == OWN:
    flags.append("--config.reward.background.checkpoint=no/such.safetensors")
  only = f"--only=features {name},score {name}"
  assert plan.main([f"--config={config}", *SMALL, *flags, only]) == 0
  told = capsys.readouterr().out
  assert f"| features {name}" in told and f"| score {name}" in told


def built(config: str, *overrides: str):
  """(name, reward, its parameters) of a config."""
  ((name, reward),) = reward_builders.build_rewards(config_file.load(config, overrides)).items()
  return name, reward, reward_builders.read_reward(reward, None)


def scores(config: str, pixels: np.ndarray, prompts: list[str], *overrides: str) -> np.ndarray:
  name, reward, params = built(config, *overrides)
  rows = reward.features(params, reward.prepare([Example(0, prompt) for prompt in prompts]))
  return np.asarray(jax.jit(reward.score)(params, Media(pixels), rows)[name])


@pytest.mark.parametrize("size", [32, 50])
def test_what_it_says(size):
  """The background counts and not what stands before it; NaN for a prompt that names none."""
  names = list(RGB)
  pixels = np.array([RGB[name] for name in names])[:, None, None] / 255
  pixels = np.broadcast_to(pixels, (len(names), size, size, 3)).astype(np.float32).copy()
  pixels[:, size // 4 : -size // 4, size // 4 : -size // 4] = np.array([0.9, 0.5, 0.1])
  term = f"reward.terms={((KIND, 1.0),)}"
  right = scores(EMOJI, pixels, [f"a red apple on a {name} background" for name in names], term)
  assert (right > 0.9).all()
  wrong = scores(
    EMOJI, pixels, [f"a cat on a {name} background" for name in names[1:] + names[:1]], term
  )
  assert (wrong < 0.1).all()
  unknown = scores(EMOJI, pixels[:3], ["", "a cat", "a cat on a beige background"], term)
  assert np.isnan(unknown).all()
  section = scores(OWN, pixels, [f"a star on a {name} background" for name in names])
  np.testing.assert_array_equal(section, right)


def test_a_missing_weight_file_is_one_line(tmp_path, capsys):
  flags = ["--config.reward.background.checkpoint=no/such.safetensors"]
  assert main.main([f"--config={OWN}", *SMALL, *flags, f"--workdir={tmp_path / 'new'}"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: config.reward.background.checkpoint = 'no/such.safetensors': no")
  assert not (tmp_path / "new").exists()


def test_the_weights_can_be_made_again(tmp_path):
  """The command of the README, with few steps; the run takes what it wrote."""
  command = [sys.executable, "-m", "examples.own_reward.make_weights"]
  subprocess.run([*command, f"--out={tmp_path}", "--steps=2"], check=True)
  pixels = np.zeros((1, 32, 32, 3), np.float32)
  prompts = ["a star on a red background"]
  made = scores(OWN, pixels, prompts, f"reward.background.checkpoint={tmp_path}")
  assert np.isfinite(made).all() and made != scores(OWN, pixels, prompts)

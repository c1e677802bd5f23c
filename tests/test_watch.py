"""Terms that are scored and logged, but never trained on."""

import math

import pytest
from tiny_checkpoint import ROOT, overrides

from dancegrpo_jax import main
from dancegrpo_jax.report import metrics

REWARD = '''
import numpy as np

def absent(pixels, prompts, metadata):
  """Fails for every sample."""
  return np.full(len(pixels), np.nan)
'''


@pytest.fixture(scope="module")
def train(tiny_models, tmp_path_factory, program_cache):
  """`(name, iterations, **changes) -> workdir` of a run whose rewards are CLIP and what changes."""
  place = tmp_path_factory.mktemp("watch")
  (place / "watched_reward.py").write_text(REWARD)

  def run(name: str, iterations: int, **changes):
    values = {
      "iterations": iterations,
      "rollout__samples_per_prompt": 4,
      "checkpoint__every": 1,
      "evaluation__every": 1,
      "reward__terms": (("clip", 1.0),),
      "logging__compilation_cache": program_cache,
    }
    words = overrides(tiny_models, **values | changes)
    flags = [f"--config={ROOT / 'configs' / 'emoji_clip.py'}:tiny", f"--workdir={place / name}"]
    assert main.main([*flags, *(f"--config.{word}" for word in words)]) == 0
    return place / name

  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(place)
    yield run


def test_a_watched_term_is_logged_and_changes_nothing(train):
  """Neither what is trained nor, where it fails, which samples are."""
  plain = metrics.read(train("plain", 2))
  watch = "compressibility,watched_reward:absent"
  watched = metrics.read(train("watched", 2, reward__watch=watch))
  assert len(plain) == len(watched) == 2
  for before, after in zip(plain, watched):
    same = [name for name in before if not name.startswith("time/")]
    same.remove("samples_per_second")
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert after["reward/failed"] == 0 and after["reward/watched_reward:absent/failed"] == 1
    assert after["reward/compressibility/failed"] == 0 and after["reward/compressibility/std"] > 0
    assert math.isfinite(after["evaluation/compressibility"])
    assert math.isnan(after["evaluation/watched_reward:absent"])
    assert "reward/clip/mean" not in after  # the only trained term is reward/mean


def test_it_may_change_on_a_resume(train):
  workdir = train("later", 1, reward__watch="compressibility")
  assert train("later", 2) == workdir
  first, second = metrics.read(workdir)
  assert "reward/compressibility/mean" in first and "reward/compressibility/mean" not in second


@pytest.mark.parametrize(
  "watch, message",
  [
    ("clip", "config.reward.watch = 'clip': named twice; a term is trained on or watched"),
    ("nothing", "config.reward.watch = 'nothing': unknown reward"),
    ("3", "'3' can't be read; write TERM with commas between them"),
  ],
)
def test_one_line_for_one_mistake(watch, message, capsys):
  config = ROOT / "configs" / "emoji_clip.py"
  assert main.main([f"--config={config}:tiny", f"--config.reward.watch={watch}"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line

"""Files of the package are found from any folder, but the user's files take precedence."""

from pathlib import Path

import pytest

from dancegrpo_jax import installation
from dancegrpo_jax.checkpoints import hub, lora_files
from dancegrpo_jax.data import prompts
from dancegrpo_jax.errors import ConversionError
from dancegrpo_jax.pipelines.layout import Layout

PROMPTS = "assets/prompts/emoji_run.txt"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
  """An empty working folder."""
  monkeypatch.chdir(tmp_path)
  return tmp_path


def test_the_users_own_file_counts_first(elsewhere):
  assert installation.find(PROMPTS) == installation.ROOT / PROMPTS
  own = elsewhere / PROMPTS
  own.parent.mkdir(parents=True)
  own.write_text("a cat\n")
  assert installation.find(PROMPTS) == Path(PROMPTS)
  assert installation.places(PROMPTS) == [Path(PROMPTS), installation.ROOT / PROMPTS]
  assert [example.prompt for example in prompts.read_prompts(PROMPTS)] == ["a cat"]


def test_only_what_comes_with_the_package_is_looked_up_there():
  """Otherwise `out/model` would mean a folder of the checkout in an editable installation."""
  for path in ("README.md", "tests/conftest.py", "", "assets/no-such", installation.ROOT / "no"):
    assert installation.places(path) in ([], [Path()])
    assert installation.find(path) == Path(path)


def test_in_the_root_itself_a_file_is_there_once(monkeypatch):
  monkeypatch.chdir(installation.ROOT)
  assert installation.places("configs") == [Path("configs")]


def test_configs_values_find_it():
  """Prompts, checkpoints with and without weights, and adapters are found."""
  assert len(prompts.read_prompts(PROMPTS)) == 16
  layout = Layout({"unet": "unet/config.json"}, {"tokenizer": "clip"}, ("unet",))
  assert hub.folder("x", "assets/emoji-sd", layout) == installation.ROOT / "assets/emoji-sd"
  assert hub.folder("x", "random:assets/random-sd", layout).is_dir()
  with pytest.raises(ConversionError, match="the folder holds model_index"):
    lora_files.find("assets/random-sd")

"""No family and no reward ignores a key of a JSON file that it reads.

The test goes through the files that a layout names, so that a new family or a new file of one is
tested without anybody thinking of it.
"""

import json
import shutil
from pathlib import Path

import pytest
from tiny_checkpoint import ROOT, write_hunyuan_video

from dancegrpo_jax.assembly import loading, reward_builders
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.pipelines import families
from dancegrpo_jax.rewards import clip
from dancegrpo_jax.settings.config_file import load

# A config on a shipped checkpoint of a family.
CONFIGS = {"stable_diffusion": "emoji_clip:tiny", "flux": "emoji_flow_clip:tiny"}
FILES = [
  (name, file)
  for name in families.FAMILIES
  for file in families.FAMILIES[name].layout.files.values()
]


def copied(source: Path, folder: Path, file: str, change: dict) -> Path:
  """A copy of a checkpoint in which one JSON file has other entries."""
  shutil.copytree(source, folder)
  path = folder / file
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  return folder


@pytest.mark.parametrize(("family", "file"), FILES)
def test_families(family, file, tmp_path):
  config = load(CONFIGS.get(family, "emoji_clip:tiny"), [])
  source = ROOT / config.model.checkpoint.removeprefix("random:")
  if family == "hunyuan_video":
    source = write_hunyuan_video(tmp_path / "written")
    with config.unlocked():
      config.model.update(family=family, frames=9)
  assert config.model.family == family
  with config.unlocked():
    config.model.checkpoint = f"random:{copied(source, tmp_path / 'x', file, {'surprise': [1]})}"
  with pytest.raises(ConfigError) as caught:
    loading.build_pipeline(config)
  assert "surprise = [1] (an unknown key)" in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", clip.FILES.values())
def test_clip_rewards(file, tmp_path):
  config = load("emoji_clip:tiny", [])
  source = ROOT / config.reward.clip.checkpoint
  with config.unlocked():
    config.reward.clip.checkpoint = str(copied(source, tmp_path / "x", file, {"surprise": [1]}))
    config.reward.terms = (("clip", 1.0),)
  with pytest.raises(ConfigError, match="surprise = .1. .an unknown key."):
    reward_builders.build_rewards(config)


TOKENIZERS = [
  ({"tokenizer_class": "BertTokenizer"}, "tokenizer_class = 'BertTokenizer' is not implemented"),
  (
    {"model_max_length": 40},
    "gives 40 tokens a text .model_max_length. and its text encoder takes",
  ),
  (
    {"added_tokens_decoder": {"2000": {"content": "<cat>", "special": False}}},
    "has 1001 ids and its text encoder vocab_size = 1000",
  ),
]


@pytest.mark.parametrize(("change", "message"), TOKENIZERS)
def test_tokenizers_of_other_models_are_refused(change, message, tmp_path):
  config = load("emoji_clip:tiny", [])
  source, file = ROOT / config.model.checkpoint, "tokenizer/tokenizer_config.json"
  with config.unlocked():
    config.model.checkpoint = str(copied(source, tmp_path / "x", file, change))
  with pytest.raises(ConfigError, match=message):
    loading.build_pipeline(config)
  with config.unlocked():
    source, file = ROOT / config.reward.clip.checkpoint, "tokenizer_config.json"
    config.reward.clip.checkpoint = str(copied(source, tmp_path / "y", file, change))
    config.reward.terms = (("clip", 1.0),)
  with pytest.raises(ConfigError, match=message):
    reward_builders.build_rewards(config)

"""Folders that the installed diffusers and transformers save are checkpoints, and folders that this
project writes need no argument in them.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers
from tiny_checkpoint import ROOT, assert_trees_equal

from dancegrpo_jax.assembly import loading, reward_builders
from dancegrpo_jax.checkpoints import hub, weights
from dancegrpo_jax.checkpoints.networks import abstract_params
from dancegrpo_jax.data import t5_tokenizer, tokenizer
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.pipelines import stable_diffusion
from dancegrpo_jax.rewards import clip
from dancegrpo_jax.settings import config_file

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SD, FLUX, CLIP = (ROOT / "assets" / name for name in ("emoji-sd", "emoji-flux", "emoji-clip"))
TEXTS = (
  "a red apple on a blue background",
  "",
  "Ünïcode — “quotes” 日本語 🍎 don't",
  "  two\nlines\u2028and   spaces ",
  "a very long prompt " * 20,
  "<|endoftext|> inside",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
  """A Stable Diffusion, a FLUX and a CLIP, each loaded and saved again."""
  folder = tmp_path_factory.mktemp("saved")
  diffusers.StableDiffusionPipeline.from_pretrained(SD).save_pretrained(folder / "sd")
  diffusers.FluxPipeline.from_pretrained(FLUX).save_pretrained(folder / "flux")
  transformers.CLIPModel.from_pretrained(CLIP).save_pretrained(folder / "clip")
  transformers.CLIPProcessor.from_pretrained(CLIP).save_pretrained(folder / "clip")
  return folder


def test_what_they_save_is_what_this_file_is_about(saved):
  """The newer forms: otherwise the tests below show nothing."""
  names = {file.name for file in (saved / "sd" / "tokenizer").iterdir()}
  assert "tokenizer.json" in names and not names & {"vocab.json", "merges.txt"}
  assert not (saved / "clip" / "preprocessor_config.json").exists()


@pytest.mark.parametrize("place", ["sd/tokenizer", "flux/tokenizer", "clip"])
def test_clip_ids(saved, place):
  theirs = transformers.AutoTokenizer.from_pretrained(saved / place)
  length = theirs.model_max_length
  expected = theirs(list(TEXTS), padding="max_length", truncation=True, max_length=length)
  ids = tokenizer.load_tokenizer(str(saved / place))(list(TEXTS))
  np.testing.assert_array_equal(ids, expected["input_ids"])
  original = {"sd": SD / "tokenizer", "flux": FLUX / "tokenizer", "clip": CLIP}
  before = tokenizer.load_tokenizer(str(original[place.partition("/")[0]]))
  np.testing.assert_array_equal(ids, before(list(TEXTS)))


def test_t5_ids(saved):
  folder = saved / "flux" / "tokenizer_2"
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  expected = theirs(list(TEXTS), padding="max_length", truncation=True, max_length=20)
  ids = t5_tokenizer.load_t5_tokenizer(str(folder))(list(TEXTS), 20)
  np.testing.assert_array_equal(ids, expected["input_ids"])


@pytest.mark.parametrize("name, config_name", [("sd", "emoji_clip"), ("flux", "emoji_flow_clip")])
def test_a_pipeline_loads_with_the_same_weights(saved, name, config_name):
  models = []
  for checkpoint in (SD if name == "sd" else FLUX, saved / name):
    config = config_file.load(f"{ROOT}/configs/{config_name}.py:tiny")
    with config.unlocked():
      config.model.checkpoint = str(checkpoint)
    config = config.lock()
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
      models.append(loading.load(config, loading.build_pipeline(config), {}, mesh))
  for field in ("trainable", "frozen"):
    assert_trees_equal(getattr(models[0], field), getattr(models[1], field))


def test_a_reward_has_the_same_preprocessing(saved):
  checkpoints = [
    clip.find_checkpoint("reward.clip.checkpoint", str(source), reward_builders.FILES)
    for source in (CLIP, saved / "clip")
  ]
  assert checkpoints[0].preprocessing == checkpoints[1].preprocessing


def test_a_folder_with_neither_form_names_both(tmp_path):
  (tmp_path / "tokenizer").mkdir()
  for name in ("tokenizer_config.json", "vocab.json"):
    (tmp_path / "tokenizer" / name).write_text("{}")
  layout = stable_diffusion.FAMILY.layout._replace(files={}, networks=())
  assert hub.missing(tmp_path, layout) == ["tokenizer/merges.txt (or tokenizer.json)"]
  with pytest.raises(
    ConfigError, match=r"lacks tokenizer/merges.txt \(or tokenizer.json\); found tokenizer"
  ):
    hub.folder("model.checkpoint", str(tmp_path), layout)


def test_a_processor_without_pictures(tmp_path):
  (tmp_path / "processor_config.json").write_text('{"processor_class": "T5"}')
  with pytest.raises(
    weights.ConversionError, match="processor_config.json: has no image_processor"
  ):
    weights.read_config(tmp_path, "preprocessor_config.json")


# What this project writes


@pytest.mark.parametrize("folder", [SD, FLUX])
def test_the_assets_need_no_argument(folder):
  """Every network computes in float32, and a call gives a picture."""
  kind = diffusers.StableDiffusionPipeline if folder == SD else diffusers.FluxPipeline
  pipe = kind.from_pretrained(folder)
  networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
  assert {network.dtype for network in networks} == {torch.float32} and len(networks) >= 3
  size = {} if folder == SD else {"height": 32, "width": 32, "max_sequence_length": 16}
  image = pipe("a red apple", num_inference_steps=2, output_type="np", **size).images
  assert image.shape == (1, 32, 32, 3) and np.isfinite(image).all() and image.std() > 0.01


def test_the_asset_of_a_reward_needs_no_argument():
  model = transformers.CLIPModel.from_pretrained(CLIP)
  assert model.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_copy_in_another_dtype(tmp_path, dtype):
  """Values are those of torch's own cast; a dtype that config.json names goes with them."""
  from safetensors.torch import load_file

  source = SD / "unet"
  abstract = abstract_params(weights.read_config(source))
  file = weights.copy(source, tmp_path, "UNet2DConditionModel", abstract, jax.numpy.dtype(dtype))
  before, after = load_file(source / file.name), load_file(file)
  assert list(before) != [] and before.keys() == after.keys()
  for name, tensor in before.items():
    assert torch.equal(after[name], tensor.to(getattr(torch, dtype))), name
  named = weights.config_in(dtype, {"torch_dtype": "float16", "hidden_size": 4})
  assert json.dumps(named) == json.dumps({"torch_dtype": dtype, "hidden_size": 4})

"""Checkpoints that open_clip's trainer writes, read as the CLIP reward, and every key of an
open_clip_config.json: used, at a value that changes nothing, or refused.

The keys and defaults are those of open_clip 3.3's CLIPVisionCfg, CLIPTextCfg, CLIP and
PreprocessCfg.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from dancegrpo_jax.assembly import reward_builders
from dancegrpo_jax.checkpoints import weights
from dancegrpo_jax.conversion.table import expected_sources
from dancegrpo_jax.conversion.tables.clip import OPEN_CLIP
from dancegrpo_jax.convert.__main__ import main
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.pipelines.networks import CLIP
from dancegrpo_jax.rewards import open_clip
from dancegrpo_jax.settings import config_file

ROOT = Path(__file__).parent.parent
RANDOM = ROOT / "assets" / "random-clip"
JSON = json.loads((RANDOM / open_clip.FILE).read_text())


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
  """An open_clip state_dict of the small network."""
  abstract = CLIP.abstract(open_clip.clip_config(JSON["model_cfg"]))
  rng = np.random.default_rng(0)
  expected = expected_sources(OPEN_CLIP, weights.specs(abstract))
  return {
    name: np.asarray(0.1 * rng.standard_normal(spec.shape), np.float32)
    for name, spec in expected.items()
  }


def folder_with(folder: Path, content: dict, config: dict = JSON) -> Path:
  """A folder with tokenizer and config, and a pickle of this content."""
  folder.mkdir()
  for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
    shutil.copy(RANDOM / name, folder)
  (folder / open_clip.FILE).write_text(json.dumps(config))
  torch.save(content, folder / "epoch_3.pt")
  return folder


def read(folder: Path):
  """The parameters of the CLIP reward."""
  config = config_file.load(
    f"{ROOT}/configs/emoji_clip.py:tiny", [f"reward.clip.checkpoint={folder}"]
  )
  (reward,) = reward_builders.build_rewards(config).values()
  return reward_builders.read_reward(reward, None, allow_pickle=True)["clip"]


@pytest.fixture(scope="module")
def params(tensors, tmp_path_factory):
  """What open_clip's published layout gives."""
  folder = folder_with(tmp_path_factory.mktemp("plain") / "clip", {})
  (folder / "epoch_3.pt").unlink()
  save_file(tensors, folder / "open_clip_model.safetensors")
  return read(folder)


SCALARS = {
  "input_resolution": np.array(32),
  "context_length": np.array(16),
  "vocab_size": np.array(1000),
}


@pytest.mark.parametrize(
  "rename, extra",
  [
    (lambda name: f"module.{name}", {}),
    (lambda name: f"_orig_mod.{name}", {}),
    (lambda name: f"module._orig_mod.{name}", {}),
    (lambda name: name, SCALARS),
    (lambda name: f"module.{name}", {f"module.{name}": x for name, x in SCALARS.items()}),
    (lambda name: name, {"attn_mask": np.zeros((16, 16), np.float32)}),
    (lambda name: name if name.startswith(("visual", "logit")) else f"text.{name}", {}),
  ],
)
def test_training_checkpoints(tensors, params, tmp_path, rename, extra):
  """With wrappers, with OpenAI's scalars, and with a text tower in a module of its own."""
  named = {rename(name): value for name, value in tensors.items()} | extra
  state = {name: torch.tensor(value) for name, value in named.items()}
  content = {"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}}}
  loaded = read(folder_with(tmp_path / "clip", content))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), loaded, params)


def test_a_table_maps_values_as_open_clip_has_them(tensors, params):
  """Fused q, k and v lie one after another, and projections are not transposed."""
  q, k, v = np.split(tensors["transformer.resblocks.1.attn.in_proj_weight"], 3)
  attention = params["text_model"]["encoder"]["layers_1"]["self_attn"]
  for name, part in (("q", q), ("k", k), ("v", v)):
    np.testing.assert_array_equal(attention[f"{name}_proj"]["kernel"], part.T)
  np.testing.assert_array_equal(params["visual_projection"]["kernel"], tensors["visual.proj"])


def test_what_does_not_fit_is_a_few_lines(tensors, tmp_path, capsys):
  """And `convert inspect` of the folder shows all."""
  state = {f"student.{name}": torch.tensor(value) for name, value in tensors.items()}
  folder = folder_with(tmp_path / "clip", {"state_dict": state})
  with pytest.raises(ConfigError) as caught:
    read(folder)
  lines = str(caught.value).splitlines()
  assert len(lines) <= 12 and lines[-1].endswith(f"convert inspect {folder}")
  assert main(["inspect", str(folder), "--allow_pickle"]) == 2
  errors = capsys.readouterr().err.splitlines()
  assert f"{len(errors) - 1} problems:" == errors[0] and len(errors) > 100
  shutil.rmtree(folder)
  plain = {name: torch.tensor(value) for name, value in tensors.items()}
  assert main(["inspect", str(folder_with(folder, plain)), "--allow_pickle"]) == 0
  assert f"# {folder} (open_clip): {len(tensors)} tensors" in capsys.readouterr().out


# ---- Keys

_BOTH = {
  "ls_init_value": None,
  "act_kwargs": None,
  "norm_kwargs": None,
  "block_type": None,
  "qk_norm": False,
  "scaled_cosine_attn": False,
  "scale_heads": False,
  "scale_attn_inner": False,
  "scale_attn": False,
  "scale_fc": False,
  "final_ln_after_pool": False,
  "output_tokens": False,
}
DEFAULTS = {
  "vision_cfg": _BOTH
  | {
    "patch_dropout": 0.0,
    "attentional_pool": False,
    "attn_pooler_queries": 256,
    "attn_pooler_heads": 8,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "pool_type": "tok",
    "timm_model_name": None,
    "timm_model_pretrained": False,
    "timm_pool": "avg",
    "timm_proj": "linear",
    "timm_proj_bias": False,
    "timm_drop": 0.0,
    "timm_drop_path": None,
  },
  "text_cfg": _BOTH
  | {
    "hf_tokenizer_name": None,
    "tokenizer_mode": None,
    "tokenizer_kwargs": None,
    "embed_cls": False,
    "pad_id": 0,
    "eos_id": 2,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "proj_bias": False,
    "proj_type": "linear",
    "hf_model_name": None,
    "hf_model_pretrained": True,
    "hf_proj_type": "mlp",
    "hf_pooler_type": "mean_pooler",
  },
}
MODEL = {
  "custom_text": False,
  "init_logit_scale": 2.6592,
  "init_logit_bias": None,
  "nonscalar_logit_scale": False,
  "cast_dtype": None,
  "output_dict": False,
}
PREPROCESS = {
  "size": 32,
  "mode": "RGB",
  "mean": [0.48145466, 0.4578275, 0.40821073],
  "std": [0.26862954, 0.26130258, 0.27577711],
  "interpolation": "bicubic",
  "resize_mode": "shortest",
  "fill_color": 0,
}


def with_keys(model: dict | None = None, vision: dict | None = None, text: dict | None = None):
  """The model_cfg of the small network with more keys."""
  given = JSON["model_cfg"]
  towers = {
    "vision_cfg": given["vision_cfg"] | (vision or {}),
    "text_cfg": given["text_cfg"] | (text or {}),
  }
  return given | towers | (model or {})


def test_keys_at_their_defaults_change_nothing():
  model_cfg = with_keys(MODEL, DEFAULTS["vision_cfg"], DEFAULTS["text_cfg"])
  assert open_clip.clip_config(model_cfg) == open_clip.clip_config(JSON["model_cfg"])
  whole = {"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS}
  assert open_clip.preprocessing(whole) == open_clip.preprocessing(JSON)


@pytest.mark.parametrize(
  "section, key, value",
  [
    ("vision", "ls_init_value", 1e-5),
    ("vision", "attentional_pool", True),
    ("vision", "no_ln_pre", True),
    ("vision", "pos_embed_type", "sin_cos_2d"),
    ("vision", "pool_type", "avg"),
    ("vision", "final_ln_after_pool", True),
    ("vision", "timm_model_name", "vit_base_patch16_siglip_224"),
    ("vision", "act_kwargs", {"approximate": "tanh"}),
    ("vision", "norm_kwargs", {"eps": 1e-6}),
    ("vision", "layers", [3, 4, 6, 3]),
    ("vision", "image_size", [224, 336]),
    ("vision", "a_key_of_tomorrow", 1),
    ("text", "ls_init_value", 0.1),
    ("text", "pool_type", "last"),
    ("text", "pool_type", "eos"),
    ("text", "no_causal_mask", True),
    ("text", "embed_cls", True),
    ("text", "proj_bias", True),
    ("text", "proj_type", "none"),
    ("text", "hf_model_name", "roberta-base"),
    ("text", "hf_tokenizer_name", "timm/ViT-B-16-SigLIP"),
    ("text", "tokenizer_kwargs", {"clean": "canonicalize"}),
    ("text", "qk_norm", True),
    ("model", "init_logit_bias", -10),
    ("model", "multimodal_cfg", {"width": 768}),
    ("model", "embed_dim", None),
  ],
)
def test_keys_that_change_the_network_are_refused_in_one_line(section, key, value):
  with pytest.raises(ValueError, match=key) as caught:
    open_clip.clip_config(with_keys(**{section: {key: value}}))
  message = str(caught.value)
  assert "\n" not in message and open_clip.FILE in message and repr(value) in message


@pytest.mark.parametrize(
  "key, value",
  [
    ("mode", "L"),
    ("interpolation", "bilinear"),
    ("resize_mode", "crop"),
    ("fill_color", 255),
    ("size", 48),
    ("size", [32, 48]),
    ("another", 1),
  ],
)
def test_another_preprocessing_is_refused(key, value):
  with pytest.raises(ValueError, match=key) as caught:
    open_clip.preprocessing(JSON | {"preprocess_cfg": PREPROCESS | {key: value}})
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{}, {"model_cfg": 3}, {"model_cfg": {"embed_dim": 4}}])
def test_a_file_without_a_network_gets_one_line(tmp_path, content):
  folder = folder_with(tmp_path / "clip", {"a": torch.ones(1)}, content)
  with pytest.raises(ConfigError, match=open_clip.FILE) as caught:
    read(folder)
  assert "\n" not in str(caught.value)

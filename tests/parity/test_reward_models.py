"""Rewards from files as published, at reduced width, against transformers and torch.

Both sides get the same images. Cosines of random towers are nearly constant and would prove
nothing, so embeddings are compared. They must agree to 1e-3 relative, and the error must be 20
times smaller than the distance between two test images.
"""

import json
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch_parity import nchw, randomise, run
from transformers import CLIPConfig, CLIPModel

from dancegrpo_jax.assembly import reward_builders
from dancegrpo_jax.data import tokenizer
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.models import aesthetic as aesthetic_head
from dancegrpo_jax.rewards import hps
from dancegrpo_jax.rewards.base import Networks
from dancegrpo_jax.rewards.clip import cosine
from dancegrpo_jax.rewards.open_clip import clip_config
from dancegrpo_jax.settings import config_file
from dancegrpo_jax.types import Example, Media

ROOT = Path(__file__).parent.parent.parent
PROMPTS = ["a red cat", "two blue boats on the water", ""]
SIZE, TOKENS = 28, 12
MEAN, STD = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])


def model_cfg(vocabulary: int, quick_gelu: bool) -> dict:
  """ViT-H/14 made narrow.

  As there, the vision heads are not 64 wide, and the towers differ in width and depth.
  """
  return {
    "embed_dim": 24,
    **({"quick_gelu": True} if quick_gelu else {}),
    "vision_cfg": {"image_size": SIZE, "layers": 3, "width": 40, "head_width": 10, "patch_size": 7},
    "text_cfg": {
      "context_length": TOKENS,
      "vocab_size": vocabulary,
      "width": 32,
      "heads": 4,
      "layers": 2,
    },
  }


def torch_clip(vocabulary: int, act: str, seed: int) -> CLIPModel:
  """The same network as transformers builds it, written out."""
  text = {
    "vocab_size": vocabulary,
    "max_position_embeddings": TOKENS,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "eos_token_id": 2,
    "hidden_act": act,
  }
  vision = {
    "image_size": SIZE,
    "patch_size": 7,
    "hidden_size": 40,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": act,
  }
  return randomise(
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)), seed
  )


def open_clip_state(model: CLIPModel) -> dict[str, torch.Tensor]:
  """A CLIPModel's tensors with open_clip's names.

  The query, key and value weights are one tensor, and projections are transposed.
  """
  state, out = model.state_dict(), {"logit_scale": model.logit_scale.detach()}
  for ours, theirs in (("", "text_model"), ("visual.", "vision_model")):
    config = model.config.text_config if not ours else model.config.vision_config
    for i in range(config.num_hidden_layers):
      source, target = f"{theirs}.encoder.layers.{i}", f"{ours}transformer.resblocks.{i}"
      for kind in ("weight", "bias"):
        out[f"{target}.attn.in_proj_{kind}"] = torch.cat(
          [state[f"{source}.self_attn.{n}_proj.{kind}"] for n in "qkv"]
        )
        names = {
          "attn.out_proj": "self_attn.out_proj",
          "ln_1": "layer_norm1",
          "ln_2": "layer_norm2",
          "mlp.c_fc": "mlp.fc1",
          "mlp.c_proj": "mlp.fc2",
        }
        out |= {
          f"{target}.{new}.{kind}": state[f"{source}.{old}.{kind}"] for new, old in names.items()
        }
  for kind in ("weight", "bias"):
    out[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
    out[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
    out[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
  out["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
  out["positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
  out["visual.class_embedding"] = state["vision_model.embeddings.class_embedding"]
  out["visual.positional_embedding"] = state["vision_model.embeddings.position_embedding.weight"]
  out["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
  out["visual.proj"] = state["visual_projection.weight"].T
  out["text_projection"] = state["text_projection.weight"].T
  return {name: tensor.contiguous() for name, tensor in out.items()}


def pictures(h: int, w: int) -> np.ndarray:
  """Three images with 8-bit values: waves, noise, and a dark image with a bright square."""
  rng = np.random.default_rng(0)
  y, x = np.mgrid[:h, :w]
  waves = np.stack([128 + 127 * np.sin(x / 9 + y / (5 + c)) for c in range(3)], -1)
  square = np.where((abs(y - h // 2) < h // 4) & (abs(x - w // 2) < w // 4), 230, 20)[
    ..., None
  ].repeat(3, -1)
  return (np.stack([waves, rng.integers(0, 256, (h, w, 3)), square]).astype(np.uint8) / 255).astype(
    np.float32
  )


def pil_pixels(pixels: np.ndarray) -> torch.Tensor:
  """The pixels that CLIPImageProcessor makes of 8-bit images."""
  kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
  processor = kind(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
  images = list(np.round(pixels * 255).astype(np.uint8))
  return torch.tensor(
    np.stack(processor(images, input_data_format="channels_last")["pixel_values"])
  )


def squashed(pixels: np.ndarray) -> torch.Tensor:
  """The pixels of open_clip's resize_mode "squash" from 8-bit images."""
  images = [
    Image.fromarray(x).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    for x in np.round(pixels * 255).astype(np.uint8)
  ]
  return torch_normalised(
    torch.tensor(nchw(np.stack([np.asarray(image) for image in images]) / np.float32(255)))
  )


def padded(pixels: np.ndarray, size: int = SIZE) -> torch.Tensor:
  """The pixels as in HPSv2.

  The longest side is resized to the tower's size, zeros fill the rest, and all is normalised.
  """
  x, (h, w) = torch.tensor(nchw(pixels)), pixels.shape[1:3]
  nh, nw = (round(side * (size / max(h, w))) for side in (h, w))
  x = torch.nn.functional.interpolate(x, size=(nh, nw), mode="bicubic", antialias=True)
  left, top = (size - nw) // 2, (size - nh) // 2
  return torch_normalised(
    torch.nn.functional.pad(x, (left, size - nw - left, top, size - nh - top))
  )


def torch_normalised(x: torch.Tensor) -> torch.Tensor:
  mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
  return (x - mean) / std


def torch_embeddings(
  model: CLIPModel, ready: torch.Tensor, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Normalised image and text embeddings."""
  with torch.no_grad():
    image = model.get_image_features(ready).pooler_output
    text = model.get_text_features(torch.tensor(ids, dtype=torch.long)).pooler_output
  return tuple((x / x.norm(dim=-1, keepdim=True)).numpy() for x in (image, text))


def write_tokenizer(folder: Path) -> tuple[Path, int]:
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer.write_tokenizer([p for p in PROMPTS if p], str(folder), length=TOKENS, size=560)
  return folder, len(json.loads((folder / "vocab.json").read_text()))


def write_json(file: Path, value: dict) -> None:
  file.write_text(json.dumps(value))


def settings(**changes):
  """configs/common.py with fields changed by dotted key, `__` for the dot."""
  flags = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
  return config_file.load(str(ROOT / "configs" / "common.py"), flags)


def scored(config, pixels: np.ndarray) -> tuple[dict, dict, tuple]:
  """Scores images with the config's only reward.

  Returns ({term: scores}, parameters by component, (our image embeddings or None, our text
  features)).
  """
  (reward,) = reward_builders.build_rewards(config).values()
  params = reward_builders.read_reward(reward, None, config.model.allow_pickle)
  prepared = reward.prepare([Example(i, prompt) for i, prompt in enumerate(PROMPTS)])
  text = run(reward.features, params, prepared)
  scores = run(lambda p, x, f: reward.score(p, Media(x), f), params, pixels, text)
  image = run(lambda p, x: reward.embed(p, Media(x)), params, pixels) if reward.embed else None
  return scores, params, (image, text)


def assert_near(actual: np.ndarray, expected: np.ndarray) -> None:
  """Asserts an error of at most 1e-3 relative.

  It must also be 20 times smaller than the distance between any two of the expected rows.
  """
  difference = np.linalg.norm(actual - expected, axis=-1)
  assert (difference <= 1e-3 * np.linalg.norm(expected, axis=-1)).all(), difference
  apart = np.linalg.norm(expected[:, None] - expected[None], axis=-1)[
    ~np.eye(len(expected), dtype=bool)
  ]
  assert apart.min() >= 20 * difference.max(), (apart.min(), difference.max())


def assert_agrees(
  config, name: str, model: CLIPModel, ready: torch.Tensor, pixels: np.ndarray, tokens: Path
) -> None:
  scores, _, (image, text) = scored(config, pixels)
  theirs = torch_embeddings(model, ready, tokenizer.load_tokenizer(str(tokens))(PROMPTS))
  assert_near(image, theirs[0])
  assert_near(text, theirs[1])
  assert list(scores) == [name]
  np.testing.assert_allclose(scores[name], (theirs[0] * theirs[1]).sum(-1), atol=1e-3)


@pytest.mark.parametrize("h, w", [(40, 61), (20, 17)])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip_in_transformers_layout(tmp_path, act, h, w):
  """openai/clip-vit-large-patch14 (quick gelu) and laion's model (gelu)."""
  folder, vocabulary = write_tokenizer(tmp_path / "clip")
  model = torch_clip(vocabulary, act, seed=1)
  model.save_pretrained(folder)
  write_json(
    folder / "preprocessor_config.json",
    {"size": SIZE, "crop_size": SIZE, "resample": 3, "image_mean": MEAN, "image_std": STD},
  )
  pixels = pictures(h, w)
  config = settings(reward__clip__checkpoint=folder)
  assert_agrees(config, "clip", model, pil_pixels(pixels), pixels, folder)


@pytest.mark.parametrize("act, mode", [("quick_gelu", "squash"), ("gelu", "shortest")])
def test_clip_in_open_clip_layout(tmp_path, act, mode):
  """DFN5B (quick gelu, squashed) and LAION: fused q, k, v, and a different width of heads."""
  folder, vocabulary = write_tokenizer(tmp_path / "open_clip")
  model = torch_clip(vocabulary, act, seed=2)
  save_file(open_clip_state(model), folder / "open_clip_model.safetensors")
  # transformers' file, which LAION's repositories hold too.
  save_file({"other": torch.zeros(1)}, folder / "model.safetensors")
  preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": mode}
  said = {"model_cfg": model_cfg(vocabulary, act == "quick_gelu"), "preprocess_cfg": preprocess}
  write_json(folder / "open_clip_config.json", said)
  pixels = pictures(50, 72)
  ready = squashed(pixels) if mode == "squash" else pil_pixels(pixels)
  assert_agrees(settings(reward__clip__checkpoint=folder), "clip", model, ready, pixels, folder)


def test_laion_takes_transformers_weights_where_both_are(tmp_path):
  folder, vocabulary = write_tokenizer(tmp_path / "laion")
  model = torch_clip(vocabulary, "gelu", seed=2)
  model.save_pretrained(folder)
  write_json(folder / "preprocessor_config.json", {"size": SIZE, "crop_size": SIZE})
  write_json(folder / "open_clip_config.json", {"model_cfg": model_cfg(vocabulary, False)})
  (reward,) = reward_builders.build_rewards(settings(reward__clip__checkpoint=folder)).values()
  assert reward.components["clip"].table.name == "CLIPModel"
  assert (
    reward_builders.read_reward(reward, None)["clip"]["logit_scale"] == model.logit_scale.item()
  )


@pytest.fixture
def hps_folder(tmp_path) -> tuple[Path, CLIPModel]:
  """A folder with HPS's tokenizer and the narrow network's configuration; and the network."""
  folder, vocabulary = write_tokenizer(tmp_path / "HPSv2")
  write_json(folder / "open_clip_config.json", {"model_cfg": model_cfg(vocabulary, False)})
  return folder, torch_clip(vocabulary, "gelu", seed=3)


@pytest.mark.parametrize("h, w", [(40, 61), (17, 20), (28, 14), (45, 45)])
def test_hps_from_safetensors(hps_folder, h, w):
  folder, model = hps_folder
  save_file(open_clip_state(model), folder / "HPS_v2.1_compressed.safetensors")
  pixels = pictures(h, w)
  config = settings(
    reward__terms=(("hps", 1.0),),
    reward__hps__checkpoint=folder / "HPS_v2.1_compressed.safetensors",
    reward__hps__tokenizer=folder,
  )
  assert_agrees(config, "hps", model, padded(pixels), pixels, folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_hps_from_its_pt(hps_folder, dtype):
  """The pickled file is refused unless model.allow_pickle is set.

  Then its values are read, whatever their type.
  """
  folder, model = hps_folder
  model = model.to(dtype).to(torch.float32)
  file = folder / "HPS_v2.1_compressed.pt"
  torch.save(
    {"epoch": 1, "state_dict": {name: x.to(dtype) for name, x in open_clip_state(model).items()}},
    file,
  )
  pixels = pictures(40, 61)
  changes = {
    "reward__terms": (("hps", 1.0),),
    "reward__hps__checkpoint": file,
    "reward__hps__tokenizer": "",
  }
  with pytest.raises(
    ConfigError,
    match=r"pickled weights only \(HPS_v2.1_compressed.pt\).*config.model.allow_pickle=true",
  ):
    scored(settings(**changes), pixels)
  assert_agrees(
    settings(**changes, model__allow_pickle=True), "hps", model, padded(pixels), pixels, folder
  )


class Code:
  """An object whose unpickling would call a function."""

  def __reduce__(self):
    return print, ("this must never be printed",)


@pytest.mark.parametrize(
  "content, message",
  [
    (lambda file: torch.save({"state_dict": Code()}, file), "weights_only loader refuses it"),
    (lambda file: file.write_bytes(pickle.dumps(Code())), "weights_only loader refuses it"),
    (lambda file: file.write_bytes(b"not a checkpoint"), "weights_only loader refuses it"),
    (lambda file: torch.save({"epoch": 3}, file), "expected a state_dict"),
    (
      lambda file: torch.save({"state_dict": {"visual.proj": torch.zeros(2, 3)}}, file),
      "parameter .* is not in the checkpoint",
    ),
  ],
)
def test_a_pickle_that_is_no_checkpoint(hps_folder, capfd, content, message):
  folder, _ = hps_folder
  content(folder / "HPS_v2.1_compressed.pt")
  changes = {
    "reward__hps__checkpoint": folder / "HPS_v2.1_compressed.pt",
    "reward__hps__tokenizer": "",
  }
  with pytest.raises(ConfigError, match=message):
    scored(
      settings(reward__terms=(("hps", 1.0),), model__allow_pickle=True, **changes), pictures(28, 28)
    )
  assert "printed" not in capfd.readouterr().out


def test_hps_is_vit_h_14():
  """It has 986,109,441 parameters, as the published file's inventory has, and an exact gelu."""
  config = clip_config(hps.CONFIG["model_cfg"])
  assert {config[tower]["hidden_act"] for tower in ("text_config", "vision_config")} == {"gelu"}
  reward = cosine(
    "hps",
    hps.checkpoint("nowhere"),
    lambda texts: np.zeros((len(texts), 77), np.int32),
    Networks(dtype="float32"),
  )
  sizes = [np.prod(x.shape) for x in jax.tree.leaves(reward.components["clip"].abstract)]
  assert sum(sizes) == 986_109_441


@pytest.mark.parametrize("h, w", [(40, 61)])
def test_pickscore(tmp_path, h, w):
  """Weights and tokenizer are in two places, as its authors use it."""
  tokens, vocabulary = write_tokenizer(tmp_path / "laion")
  model = torch_clip(vocabulary, "gelu", seed=4)
  model.save_pretrained(tmp_path / "PickScore_v1")
  pixels = pictures(h, w)
  config = settings(
    reward__terms=(("pickscore", 1.0),),
    reward__pickscore__checkpoint=tmp_path / "PickScore_v1",
    reward__pickscore__tokenizer=tokens,
  )
  assert_agrees(config, "pickscore", model, pil_pixels(pixels), pixels, tokens)


@pytest.mark.parametrize("pickled", [False, True])
def test_aesthetic(tmp_path, pickled):
  """The published Sequential, with its dropouts, on the normalised embedding.

  No tokenizer is needed.
  """
  model = torch_clip(64, "quick_gelu", seed=5)
  model.save_pretrained(tmp_path / "clip")
  write_json(tmp_path / "clip" / "preprocessor_config.json", {"size": SIZE, "crop_size": SIZE})
  dense, drop = torch.nn.Linear, torch.nn.Dropout
  layers = [
    dense(24, 1024),
    drop(0.2),
    dense(1024, 128),
    drop(0.2),
    dense(128, 64),
    drop(0.1),
    dense(64, 16),
    dense(16, 1),
  ]
  head = randomise(torch.nn.Sequential(*layers), seed=6)
  state = {f"layers.{name}": x for name, x in head.state_dict().items()}
  assert sorted(state) == sorted(
    f"layers.{i}.{kind}" for i in aesthetic_head.LAYERS for kind in ("weight", "bias")
  )
  file = tmp_path / ("head.pth" if pickled else "head.safetensors")
  torch.save(state, file) if pickled else save_file(state, file)
  pixels = pictures(40, 61)
  config = settings(
    reward__terms=(("aesthetic", 1.0),),
    reward__aesthetic__checkpoint=tmp_path / "clip",
    reward__aesthetic__head=file,
    model__allow_pickle=pickled,
  )
  scores, params, _ = scored(config, pixels)
  assert set(params) == {"clip", "head"}
  with torch.no_grad():
    image = model.get_image_features(pil_pixels(pixels)).pooler_output
    theirs = head(image / image.norm(dim=-1, keepdim=True))[:, 0].numpy()
  difference, apart = np.abs(scores["aesthetic"] - theirs).max(), np.diff(np.sort(theirs)).min()
  assert difference <= 1e-3 * np.abs(theirs).max() and apart >= 20 * difference


def test_random_weights_need_no_weight_files(tmp_path):
  """random:FOLDER needs only the JSON files and the tokenizer.

  It is meant for a first look and for tests of memory.
  """
  folder, vocabulary = write_tokenizer(tmp_path / "HPSv2")
  write_json(folder / "open_clip_config.json", {"model_cfg": model_cfg(vocabulary, False)})
  changes = {"reward__hps__checkpoint": f"random:{folder}", "reward__hps__tokenizer": folder}
  scores, _, _ = scored(settings(reward__terms=(("hps", 1.0),), **changes), pictures(28, 28))
  assert np.isfinite(scores["hps"]).all() and np.ptp(scores["hps"]) > 0
  scores, _, _ = scored(settings(reward__clip__checkpoint=f"random:{folder}"), pictures(28, 28))
  assert np.isfinite(scores["clip"]).all()


def test_only_the_rewards_in_terms_are_read(tmp_path):
  """The defaults of the other rewards name files that do not exist here."""
  config = settings(reward__terms=(("compressibility", 1.0), ("remote", 0.5)))
  rewards = reward_builders.build_rewards(config)
  assert list(rewards) == ["compressibility", "remote"] and not any(
    reward.components for reward in rewards.values()
  )


@pytest.mark.parametrize(
  "term, message",
  [
    (
      "hps",
      "config.reward.hps.checkpoint = 'checkpoints/HPSv2/HPS_v2.1_compressed.pt': no such file",
    ),
    (
      "pickscore",
      "config.reward.pickscore.checkpoint = 'yuvalkirstain/PickScore_v1': no such folder",
    ),
    (
      "aesthetic",
      "config.reward.aesthetic.checkpoint = 'openai/clip-vit-large-patch14': no such folder",
    ),
  ],
)
def test_a_missing_checkpoint_is_named(tmp_path, monkeypatch, term, message):
  monkeypatch.setenv("HF_HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  config = settings(reward__terms=((term, 1.0),))
  with pytest.raises(ConfigError, match=message):
    reward_builders.build_rewards(config)


def test_open_clip_networks_that_are_not_implemented():
  with pytest.raises(
    ValueError, match="vision_cfg has what is not implemented: timm_model_name = 'vit'"
  ):
    clip_config(model_cfg(600, False) | {"vision_cfg": {"timm_model_name": "vit"}})
  with pytest.raises(ValueError, match="model_cfg: embed_dim = None is no positive integer"):
    clip_config({"vision_cfg": {}, "text_cfg": {}})


def test_an_image_reward_given_video(hps_folder):
  folder, model = hps_folder
  save_file(open_clip_state(model), folder / "hps.safetensors")
  changes = {"reward__hps__checkpoint": folder / "hps.safetensors", "reward__hps__tokenizer": ""}
  (reward,) = reward_builders.build_rewards(
    settings(reward__terms=(("hps", 1.0),), **changes)
  ).values()
  with pytest.raises(ValueError, match="reward hps scores images, not video"):
    reward.score({}, Media(jnp.zeros((1, 4, 28, 28, 3))), jnp.zeros((1, 24)))

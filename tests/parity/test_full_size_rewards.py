"""Rewards at their published sizes and file layouts, against open_clip and transformers.

All weights are random. A test takes minutes and up to 7 GiB and is therefore not run by default. It
needs `pip install open_clip_torch`, which brings CLIP's vocabulary, too.

    pytest -m full_size -s tests/parity/test_full_size_rewards.py -k hps

test_reward_models.py has the same tests at reduced width.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from test_reward_models import (
  PROMPTS,
  padded,
  pictures,
  scored,
  settings,
  torch_embeddings,
  write_json,
)
from torch_parity import randomise
from transformers import CLIPConfig, CLIPModel

from dancegrpo_jax.data import tokenizer

open_clip = pytest.importorskip(
  "open_clip", reason="the published sizes are compared with open_clip_torch"
)
pytestmark = pytest.mark.full_size
FIXTURES = Path(__file__).parent.parent / "fixtures" / "tensors"
EOS = 49407


def published(name: str) -> dict:
  return json.loads((FIXTURES / f"{name}.json").read_text())


def write_tokenizer(folder: Path) -> np.ndarray:
  """Writes CLIP's vocabulary as a CLIPTokenizer folder.

  Returns open_clip's ids of the prompts, after a comparison with ours.
  """
  source = open_clip.SimpleTokenizer()
  names = {"<start_of_text>": tokenizer.BOS, "<end_of_text>": tokenizer.EOS}
  folder.mkdir(parents=True, exist_ok=True)
  write_json(
    folder / "vocab.json", {names.get(token, token): i for token, i in source.encoder.items()}
  )
  merges = "".join(" ".join(pair) + "\n" for pair in source.bpe_ranks)
  (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
  ends = {
    "bos_token": tokenizer.BOS,
    "eos_token": tokenizer.EOS,
    "unk_token": tokenizer.EOS,
    "pad_token": tokenizer.EOS,
  }
  write_json(
    folder / "tokenizer_config.json",
    {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **ends},
  )
  ids = source(PROMPTS).numpy()
  # Their padding is 0.
  np.testing.assert_array_equal(
    tokenizer.load_tokenizer(str(folder))(PROMPTS), np.where(ids == 0, EOS, ids)
  )
  return ids


def eight_bit(pixels: np.ndarray) -> list[np.ndarray]:
  return list(np.round(pixels * 255).astype(np.uint8))


def processed(pixels: np.ndarray) -> torch.Tensor:
  """Pixels from transformers' processor of PIL images.

  The processor has openai's configuration of ViT-L/14, which is also that of laion's ViT-H/14.
  """
  kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
  processor = kind(
    **{
      key: published("clip-l-preprocessor")[key]
      for key in ("size", "crop_size", "image_mean", "image_std")
    }
  )
  return torch.tensor(
    np.stack(processor(eight_bit(pixels), input_data_format="channels_last")["pixel_values"])
  )


def transformed(pixels: np.ndarray, preprocess_cfg: dict) -> torch.Tensor:
  """Pixels from open_clip's transform of PIL images."""
  config = open_clip.transform.PreprocessCfg(size=224, **preprocess_cfg)
  transform = open_clip.transform.image_transform_v2(config, is_train=False)
  return torch.stack([transform(Image.fromarray(image)) for image in eight_bit(pixels)])


def transformers_clip(
  folder: Path, name: str, pixels: np.ndarray, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Embeddings of a CLIPModel, which is saved in `folder` and then freed."""
  model = randomise(CLIPModel(CLIPConfig(**published(name))), seed=1)
  model.save_pretrained(folder)
  write_json(folder / "config.json", published(name))
  return torch_embeddings(model, processed(pixels), ids)


@torch.no_grad()
def open_clip_embeddings(
  model: torch.nn.Module, ready: torch.Tensor, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  rows = torch.tensor(ids, dtype=torch.long)
  return model.encode_image(ready, normalize=True).numpy(), model.encode_text(
    rows, normalize=True
  ).numpy()


def open_clip_model(model_cfg: dict) -> torch.nn.Module:
  return randomise(open_clip.CLIP(**model_cfg), seed=2)


def check(
  measured, name: str, config, term: str, pixels: np.ndarray, theirs: tuple[np.ndarray, np.ndarray]
) -> None:
  """Holds embeddings to 1e-3 relative, and scores to 1e-3.

  The error must also be 20 times smaller than the distance between any two images (or prompts).
  """
  scores, _, ours = scored(config, pixels)
  for kind, a, b in zip(("images", "prompts"), ours, theirs, strict=True):
    difference = np.linalg.norm(a - b, axis=-1)
    apart = np.linalg.norm(b[:, None] - b[None], axis=-1)[~np.eye(len(b), dtype=bool)].min()
    measured(f"{name}, {kind}", (difference / np.linalg.norm(b, axis=-1)).max(), 1e-3)
    measured(
      f"{name}, {kind}, share of the distance between two ({apart:.3f})",
      difference.max() / apart,
      1 / 20,
    )
  assert list(scores) == [term]
  measured(f"{name}, scores", np.abs(scores[term] - (theirs[0] * theirs[1]).sum(-1)).max(), 1e-3)


@pytest.fixture
def images() -> np.ndarray:
  """Three images that are not square and are larger than the towers' inputs."""
  return pictures(384, 512)


def test_clip_vit_l_14(scratch, measured, images):
  """openai/clip-vit-large-patch14, transformers' layout."""
  theirs = transformers_clip(scratch, "clip-l", images, write_tokenizer(scratch))
  write_json(scratch / "preprocessor_config.json", published("clip-l-preprocessor"))
  check(measured, "ViT-L/14", settings(reward__clip__checkpoint=scratch), "clip", images, theirs)


@pytest.mark.parametrize("name", ["laion", "dfn5b"])
def test_clip_vit_h_14(scratch, measured, images, name):
  """open_clip's layout: LAION's (gelu, shortest side) and DFN5B's (quick gelu, squashed)."""
  ids, said = write_tokenizer(scratch), published(f"{name}-open_clip")
  model = open_clip_model(said["model_cfg"])
  save_file(model.state_dict(), scratch / "open_clip_model.safetensors")
  theirs = open_clip_embeddings(model, transformed(images, said["preprocess_cfg"]), ids)
  del model
  write_json(scratch / "open_clip_config.json", said)
  check(
    measured,
    f"ViT-H/14 ({name})",
    settings(reward__clip__checkpoint=scratch),
    "clip",
    images,
    theirs,
  )


def test_hps(scratch, measured, images):
  """HPS_v2.1_compressed.pt, a pickle in float16 without a configuration beside it.

  It has open_clip's names below "state_dict".
  """
  ids, file = write_tokenizer(scratch / "tokenizer"), scratch / "HPS_v2.1_compressed.pt"
  model = open_clip_model(open_clip.get_model_config("ViT-H-14")).half()
  torch.save({"epoch": 1, "state_dict": model.state_dict()}, file)
  theirs = open_clip_embeddings(model.float(), padded(images, 224), ids)
  del model
  config = settings(
    reward__terms=(("hps", 1.0),),
    reward__hps__checkpoint=file,
    reward__hps__tokenizer=scratch / "tokenizer",
    model__allow_pickle=True,
  )
  check(measured, "HPS-v2.1", config, "hps", images, theirs)


def test_pickscore(scratch, measured, images):
  """yuvalkirstain/PickScore_v1 in transformers' layout, with the tokenizer in another folder."""
  ids, folder = write_tokenizer(scratch / "tokenizer"), scratch / "PickScore_v1"
  theirs = transformers_clip(folder, "clip-h", images, ids)
  config = settings(
    reward__terms=(("pickscore", 1.0),),
    reward__pickscore__checkpoint=folder,
    reward__pickscore__tokenizer=scratch / "tokenizer",
  )
  check(measured, "PickScore", config, "pickscore", images, theirs)

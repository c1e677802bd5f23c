"""The model card and the header of an export: what they say, and that the card's code works."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors import safe_open
from tiny_checkpoint import tiny_config, write_flux

import dancegrpo_jax
from dancegrpo_jax import train
from dancegrpo_jax.convert import bases, folders

LORA = {
  "lora__rank": 2,
  "lora__alpha": 4.0,
  "lora__targets": r".*attn.*/to_(q|k|v|out_0)/kernel",
}


@pytest.fixture(scope="module", params=["sd", "sd_lora", "flux"])
def run(request, tiny_models, tmp_path_factory):
  """(config, workdir) after two iterations, with a base in a folder of this machine."""
  place = tmp_path_factory.mktemp("run")
  changes = {"iterations": 2, "evaluation__every": 1, "checkpoint__every": 1}
  terms = (("compressibility", 0.5),)
  if request.param == "flux":
    changes |= {
      "model__family": "flux",
      "model__checkpoint": str(write_flux(place / "base")),
      "model__text_length": 8,
      "sampler__kind": "flow",
      "sampler__noise_level": 0.7,
      "reward__terms": terms,
    }
    config = tiny_config(None, **changes)
  else:
    lora = LORA if request.param == "sd_lora" else {}
    config = tiny_config(tiny_models, reward__terms=terms, **changes, **lora)
  train.run(config, place / "work")
  return config, place / "work"


def executed(card: str, folder: Path, base: Path, monkeypatch) -> np.ndarray:
  """The picture that the card's code makes, beside the export and its base."""
  link = folder.parent / base.name
  if not link.exists():
    os.symlink(base, link)
  monkeypatch.chdir(folder.parent)
  (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
  names: dict = {}
  exec(compile(code, "card", "exec"), names)
  return np.asarray(names["image"])


@pytest.mark.parametrize("part", ["pipeline", "denoiser", "lora"])
def test_the_code_of_the_card_draws(run, part, tmp_path, monkeypatch):
  config, workdir = run
  if part == "lora" and not config.lora.rank:
    pytest.skip("no adapters")
  out = tmp_path / "out"
  folders.export(config, str(workdir), out, part, "")
  card = (out / "README.md").read_text()
  assert str(workdir.parent) not in card and str(tmp_path) not in card
  image = executed(card, out, Path(config.model.checkpoint), monkeypatch)
  assert image.shape == (32, 32, 3) and image.std() > 0
  data = ModelCard(card).data
  assert data.library_name == "diffusers" and data.pipeline_tag == "text-to-image"
  assert data.license == "unknown" and data.base_model is None  # nothing is known of it
  assert ("lora" in data.tags) == (part == "lora")
  (file,) = [
    *out.glob("*.safetensors"),
    *out.glob("unet/*.safetensors"),
    *out.glob("transformer/*.safetensors"),
  ]
  with safe_open(file, "np") as opened:
    header = opened.metadata()
  assert header["format"] == "pt" and header["iterations"] == "2"
  assert header["reward"] == "compressibility 0.5"
  assert header["dancegrpo_jax"] == dancegrpo_jax.__version__
  assert header.get("ss_network_dim") == ("2" if part == "lora" else None)
  assert header.get("ss_network_alpha") == header.get("ss_network_dim")
  assert not any("architecture" in key or "date" in key for key in header)


def test_the_numbers_are_the_runs(run, tmp_path):
  config, workdir = run
  folders.export(config, f"{workdir}@1", tmp_path / "out", "denoiser", "")
  card = (tmp_path / "out" / "README.md").read_text()
  row = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
  start = json.loads((workdir / "samples" / "iteration_000000" / "prompts.json").read_text())
  assert "after 1 iterations" in card and "| iterations | 1 |" in card
  for what, key, metric in (
    ("training", "scores", "evaluation/score"),
    ("held-out", "held_out", "evaluation/held_out"),
  ):
    before, after = np.mean(start[key]), row[metric]
    assert f"| 2 {what} prompts | {before:.4f} | {after:.4f} |" in card
  # Without its workdir a checkpoint has no numbers, and the card claims none.
  alone = tmp_path / "alone"
  shutil.copytree(workdir / "checkpoints", alone / "checkpoints")
  folders.export(config, str(alone), tmp_path / "bare", "denoiser", "")
  assert "## Results" not in (tmp_path / "bare" / "README.md").read_text()


def test_what_is_known_of_a_base(tiny_models, tmp_path):
  config = tiny_config(tiny_models)
  known = bases.base_of(config, "black-forest-labs/FLUX.1-dev")
  assert known.license == "other" and known.license_name == "flux-1-dev-non-commercial-license"
  assert known.architecture == "flux-1-dev"
  # One that isn't known has the licence of its own card, if it has one.
  folder = tmp_path / "mine"
  shutil.copytree(tiny_models.model, folder)
  config = tiny_config(tiny_models, model__checkpoint=str(folder))
  assert bases.base_of(config, str(folder)) == bases.Base("mine")
  (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Mine\n")
  found = bases.base_of(config, str(folder))
  assert (found.name, found.hub_id, found.license) == ("mine", "", "apache-2.0")
  (folder / "README.md").write_text("# no front matter\n")
  assert not bases.base_of(config, str(folder)).license

"""The runs that are measured: one-GPU recipes with fewer samples and fewer trained steps.

Image sizes and numbers of sampling steps are those of the recipes. Every part takes the same
programs, so that each is compiled once. Tokenizers are this project's, at the published lengths:
their words do not matter, because the arrays that they return have the right shape.
"""

import json
import shutil
from pathlib import Path

from dancegrpo_jax.settings import config_file

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {"sd": "sd_hps.py:1gpu", "flux": "flux_hps_lora.py:1gpu"}
TINY = {"sd": "sd_hps.py:tiny", "flux": "flux_hps_lora.py:tiny"}
PUBLISHED = {"sd": "CompVis/stable-diffusion-v1-4", "flux": "black-forest-labs/FLUX.1-dev"}
# Folders of assets/ with tokenizers and the tiny networks.
RANDOM = {"sd": "random-sd", "flux": "random-flux"}
# One prompt. Stable Diffusion trains 4 of 49 steps, FLUX 4 of 11, both in 2 optimizer steps of 2
# microbatches, of 16 and of 8 transitions. No prompt is held out, and the evaluations at the start
# and the end sample one prompt with 2 steps. There are as many lanes as a chunk has rows, so that
# the evaluations use programs for decoding and scoring that the training needs anyway.
SHARED = {
  "iterations": 2,
  "data.prompts_per_iteration": 1,
  "data.held_out": "",
  "evaluation.every": 0,
  "evaluation.prompts": 1,
  "evaluation.steps": 2,
  "objective.timesteps": "random",
  "optimizer.updates_per_iteration": 2,
  "logging.tensorboard": False,
  "reward.hps.tokenizer": "assets/random-clip",
}
CUTS = {
  "sd": SHARED
  | {
    "rollout.samples_per_prompt": 16,
    "rollout.chunk": 16,
    "optimizer.microbatch": 16,
    "mesh.lanes": 16,
    "objective.timestep_fraction": 0.082,
  },
  "flux": SHARED
  | {
    "rollout.samples_per_prompt": 8,
    "rollout.chunk": 8,
    "optimizer.microbatch": 8,
    "mesh.lanes": 8,
    "objective.timestep_fraction": 0.37,
  },
}
TINY_CUT = {"iterations": 2, "logging.tensorboard": False}


def preset_of(model: str, tiny: bool) -> str:
  """FILE:preset of a model's configuration for one GPU."""
  return str(ROOT / "configs" / (TINY if tiny else CONFIGS)[model])


def overrides(model: str, tiny: bool, folder: Path) -> dict:
  """What differs from the config's file.

  Args:
    model: sd | flux.
    tiny: the tiny preset as it is.
    folder: that `describe` has filled.
  """
  if tiny:
    return TINY_CUT
  own = {
    "model.checkpoint": f"random:{folder / model}",
    "reward.hps.checkpoint": f"random:{folder / 'hps'}",
  }
  return CUTS[model] | own | {"reward.hps.tokenizer": str(folder / "hps")}


def flags(model: str, tiny: bool, folder: Path) -> list[str]:
  """The same overrides as flags of `main`."""
  changes = overrides(model, tiny, folder)
  return [
    f"--config={preset_of(model, tiny)}",
    *(f"--config.{key}={value}" for key, value in changes.items()),
  ]


def load(model: str, tiny: bool, folder: Path, **changes):
  """Loads the config, after filling its folder. In `changes`, "__" stands for "."."""
  describe(model, folder)
  words = overrides(model, tiny, folder) | {
    key.replace("__", "."): value for key, value in changes.items()
  }
  return config_file.load(
    preset_of(model, tiny), [f"{key}={value}" for key, value in words.items()]
  )


def describe(model: str, folder: Path) -> None:
  """Fills FOLDER/<model> and FOLDER/hps.

  They get the JSON files of the published networks, and tokenizers of the published lengths.
  """
  place, assets = folder / model, ROOT / "assets"
  shutil.copytree(assets / "published" / PUBLISHED[model], place, dirs_exist_ok=True)
  for name in ("tokenizer", "tokenizer_2"):
    if (assets / RANDOM[model] / name).is_dir():
      _tokenizer(assets / RANDOM[model] / name, place / name)
  _tokenizer(assets / "random-clip", folder / "hps")


def _tokenizer(source: Path, place: Path) -> None:
  """Writes a tokenizer whose texts are as long as CLIP's. T5's caller cuts and pads its texts."""
  place.mkdir(parents=True, exist_ok=True)
  for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer.json"):
    if (source / name).is_file():
      shutil.copy(source / name, place / name)
  said = json.loads((source / "tokenizer_config.json").read_text()) | {"model_max_length": 77}
  (place / "tokenizer_config.json").write_text(json.dumps(said))

"""Checkpoints in a single file: `convert import-single` writes the folder of which they were made,
and diffusers read the same file as the same weights.
"""

import functools
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dancegrpo_jax.assembly import loading
from dancegrpo_jax.checkpoints import weights
from dancegrpo_jax.checkpoints.networks import TABLES, abstract_params, class_name
from dancegrpo_jax.checkpoints.weights import specs
from dancegrpo_jax.conversion.mapping import plan
from dancegrpo_jax.conversion.table import expected_sources
from dancegrpo_jax.conversion.transfer import export_tree
from dancegrpo_jax.convert.__main__ import main
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.settings import config_file

with warnings.catch_warnings():
  warnings.simplefilter("ignore")
  import torch
  from diffusers import StableDiffusionPipeline

ROOT = Path(__file__).parent.parent
SD, FLUX = ROOT / "assets" / "emoji-sd", ROOT / "assets" / "emoji-flux"


def network(folder: Path) -> dict[str, np.ndarray]:
  """The tensors of a network's only weight file, in float32."""
  (file,) = folder.glob("*.safetensors")
  return {name: x.astype(np.float32) for name, x in load_file(file).items()}


@functools.cache
def in_dialect(folder: Path) -> dict[str, np.ndarray]:
  """The tensors of a network's folder in the names of the network's other layout."""
  config = weights.read_config(folder)
  table, own = TABLES[class_name(config)], network(folder)
  expected = expected_sources(table, specs(abstract_params(config)))
  dialect = table.dialects[0].table(expected)
  sources = expected_sources(dialect, expected)
  return export_tree(plan(dialect, sources, expected), own)


@functools.cache
def _stable_diffusion(second: bool) -> dict[str, np.ndarray]:
  """The embedded model as a file of Stable Diffusion's first release, or of 2.x."""
  prefixes = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
  file = {
    prefix + name: value
    for place, prefix in prefixes.items()
    for name, value in in_dialect(SD / place).items()
  }
  if second:
    text = {f"model.{name}": x for name, x in in_dialect(SD / "text_encoder").items()}
    last = {name: x for name, x in text.items() if ".resblocks.1." in name}
    text |= {name.replace(".1.", ".2."): np.ones_like(x) for name, x in last.items()}
    text |= {"model.text_projection": np.ones((128, 128)), "model.logit_scale": np.ones(())}
  else:
    text = {f"transformer.{name}": x for name, x in network(SD / "text_encoder").items()}
    text["transformer.text_model.embeddings.position_ids"] = np.arange(16)[None]
  file |= {f"cond_stage_model.{name}": value for name, value in text.items()}
  # The autoencoder's projections were convolutions of one pixel.
  for name in file:
    if ".mid.attn_1." in name and name.endswith("weight") and file[name].ndim == 2:
      file[name] = file[name][:, :, None, None]
  return file | {"betas": np.zeros(1000), "alphas_cumprod": np.ones(1000)}


def stable_diffusion(second: bool = False) -> dict[str, np.ndarray]:
  """A copy of `_stable_diffusion`'s tensors, for a test to change."""
  return dict(_stable_diffusion(second))


def assert_same_networks(out: Path, base: Path, places: tuple[str, ...]) -> None:
  for place in places:
    ours, expected = network(out / place), network(base / place)
    ours = {name: x for name, x in ours.items() if not name.endswith("position_ids")}
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
      np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.parametrize("second", [False, True])
def test_stable_diffusion(tmp_path, second, capsys):
  """The folder has the weights of the model that the file was made of, and builds a pipeline."""
  file, out = tmp_path / "v1-5-pruned-emaonly.safetensors", tmp_path / "out"
  save_file(stable_diffusion(second), file)
  assert main(["import-single", str(file), f"--base={SD}", f"--out={out}"]) == 0
  assert_same_networks(out, SD, ("unet", "vae", "text_encoder"))
  assert sorted(os.listdir(out)) == sorted(os.listdir(SD))
  assert f"{out}: unet, vae, text_encoder of {file}" in capsys.readouterr().out
  config = config_file.load(f"{ROOT}/configs/emoji_clip.py:tiny", [f"model.checkpoint={out}"])
  assert loading.build_pipeline(config).components.keys() == {"denoiser", "decoder", "text_encoder"}


def test_diffusers_read_the_same_file_as_the_same_weights(tmp_path):
  file, out = tmp_path / "model.safetensors", tmp_path / "out"
  save_file(stable_diffusion(), file)
  assert main(["import-single", str(file), f"--base={SD}", f"--out={out}"]) == 0
  theirs = StableDiffusionPipeline.from_single_file(
    str(file), config=str(SD), local_files_only=True, safety_checker=None
  )
  for place in ("unet", "vae"):
    expected = getattr(theirs, place).state_dict()
    ours = network(out / place)
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
      np.testing.assert_array_equal(value, expected[name].float().numpy(), err_msg=name)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_flux(tmp_path, prefix, capsys):
  """Black Forest Labs' file holds the transformer alone; the rest is the base's."""
  file, out = tmp_path / "flux1-schnell.safetensors", tmp_path / "out"
  tensors = in_dialect(FLUX / "transformer")
  assert "double_blocks.2.txt_attn.qkv.weight" in tensors
  assert tensors["single_blocks.3.linear1.weight"].shape == (7 * 128, 128)
  save_file({prefix + name: value for name, value in tensors.items()}, file)
  assert main(["import-single", str(file), f"--base={FLUX}", f"--out={out}"]) == 0
  assert_same_networks(out, FLUX, ("transformer", "vae", "text_encoder", "text_encoder_2"))
  assert sorted(os.listdir(out)) == sorted(os.listdir(FLUX))
  output = capsys.readouterr().out
  assert (
    f"{out}: transformer of {file}; vae, text_encoder, text_encoder_2, config files, tokenizers"
    in output
  )


def test_flux_of_comfyui_with_all_networks(tmp_path):
  """Every network of the file is taken from it, and none of the base's."""
  file, out = tmp_path / "flux1-dev-fp8.safetensors", tmp_path / "out"
  parts = {
    "model.diffusion_model.": in_dialect(FLUX / "transformer"),
    "vae.": in_dialect(FLUX / "vae"),
    "text_encoders.clip_l.transformer.": network(FLUX / "text_encoder"),
    "text_encoders.t5xxl.transformer.": network(FLUX / "text_encoder_2"),
  }
  tensors = {prefix + name: x for prefix, part in parts.items() for name, x in part.items()}
  save_file(tensors | {"text_encoders.clip_l.logit_scale": np.ones(())}, file)
  base = tmp_path / "base"
  for config in FLUX.rglob("*"):
    if config.is_file() and config.suffix != ".safetensors":
      target = base / config.relative_to(FLUX)
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes(config.read_bytes())
  assert main(["import-single", str(file), f"--base={base}", f"--out={out}"]) == 0
  assert_same_networks(out, FLUX, ("transformer", "vae", "text_encoder", "text_encoder_2"))


@pytest.mark.parametrize(
  "place, prefix", [("unet", ""), ("unet", "model.diffusion_model."), ("vae", "")]
)
def test_a_network_in_its_other_layout_loads_from_its_folder(tmp_path, place, prefix):
  """ComfyUI keeps a UNet, or an autoencoder (ae.safetensors), in a file of its own."""
  config = weights.read_config(SD / place)
  abstract = abstract_params(config)
  expected = weights.load(SD / place, class_name(config), abstract)
  tensors = {prefix + name: value for name, value in in_dialect(SD / place).items()}
  save_file(tensors, tmp_path / "other.safetensors")
  loaded = weights.load(tmp_path, class_name(config), abstract)
  for (path, ours), theirs in zip(*map(_leaves, (loaded, expected))):
    np.testing.assert_array_equal(ours, theirs[1], err_msg=str(path))


def _leaves(tree) -> list:
  import jax

  return jax.tree_util.tree_leaves_with_path(tree)


def test_a_pickled_checkpoint_needs_a_flag(tmp_path, capsys):
  file, out = tmp_path / "v1-4.ckpt", tmp_path / "out"
  tensors = {name: torch.tensor(np.asarray(x)) for name, x in stable_diffusion().items()}
  tensors["model_ema.diffusion_modelinput_blocks00weight"] = torch.zeros(1)
  torch.save({"state_dict": tensors, "global_step": 470000, "epoch": 3}, file)
  command = ["import-single", str(file), f"--base={SD}", f"--out={out}"]
  assert main(command) == 2 and not out.exists()
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and error.rstrip().endswith("with --allow_pickle")
  assert main([*command, "--allow_pickle"]) == 0
  assert_same_networks(out, SD, ("unet", "vae", "text_encoder"))
  assert "averaged weights (model_ema) are left out" in capsys.readouterr().out


def write(file: Path, names: list[str]) -> None:
  save_file({name: np.zeros((2, 2), np.float16) for name in names}, file)


LDM = [
  "model.diffusion_model.input_blocks.0.0.weight",
  "first_stage_model.decoder.conv_in.weight",
]
CLIP = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"
FLUX_NAMES = ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"]


@pytest.mark.parametrize(
  "names, message",
  [
    (
      [*LDM, CLIP],
      r"Stable Diffusion 1.x .* import-single \S+ --base=CompVis/stable-diffusion-v1-4",
    ),
    ([*LDM, "cond_stage_model.model.ln_final.bias"], r"Stable Diffusion 2.x .*`python -m"),
    (FLUX_NAMES, r"FLUX.1-schnell .* --base=black-forest-labs/FLUX.1-schnell --out="),
    ([*FLUX_NAMES, "guidance_in.in_layer.bias"], r"FLUX.1-dev .* --base=\S+FLUX.1-dev --out="),
    ([*LDM, "conditioner.embedders.0.x.weight"], r"Stable Diffusion XL checkpoint in one file"),
    (["lora_unet_a_to_q.lora_down.weight"], r"a LoRA; use it with --config.lora.checkpoint"),
    (["something.weight"], r"is a file, and accepted is a folder with"),
  ],
)
def test_a_file_in_place_of_a_folder_gets_one_line(tmp_path, names, message):
  """The line says what the file is, and the command that makes a folder of it."""
  file = tmp_path / "model.safetensors"
  write(file, names)
  config = config_file.load(f"{ROOT}/configs/emoji_clip.py:tiny", [f"model.checkpoint={file}"])
  with pytest.raises(ConfigError, match=message) as caught:
    loading.build_pipeline(config)
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def broken(how: str, tmp_path: Path) -> list[str]:
  """The arguments of a command that can't work."""
  file, base = tmp_path / "model.safetensors", SD
  tensors = stable_diffusion()
  if how == "another base":
    base = FLUX
  elif how == "no such base":
    base = tmp_path / "nowhere"
  elif how == "unknown tensors":
    tensors["control_lora.weight"] = np.zeros(3)
  elif how == "a tensor is missing":
    del tensors["model.diffusion_model.out.2.bias"]
  elif how == "another size":
    name = "model.diffusion_model.out.2.weight"
    tensors[name] = tensors[name][:, :32]
  elif how == "whole numbers":
    name = "model.diffusion_model.out.2.weight"
    tensors[name] = tensors[name].astype(np.int8)
  save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, file)
  if how == "truncated":
    file.write_bytes(file.read_bytes()[:-1000])
  elif how == "a folder":
    file = SD
  elif how == "no file":
    file = tmp_path / "nothing.safetensors"
  elif how == "another kind":
    write(file, ["transformer_blocks.0.weight", "x_embedder.bias"])
  return ["import-single", str(file), f"--base={base}", f"--out={tmp_path / 'out'}"]


@pytest.mark.parametrize(
  "how, message",
  [
    ("another base", "is a FluxPipeline, as its model_index.json says, and so of the family flux"),
    ("no such base", "--base = .*: no such folder"),
    ("unknown tensors", "1 tensors belong to no network .* control_lora.weight; to see all"),
    ("a tensor is missing", r"conv_out.bias .* is not in the checkpoint: .*out.2.bias"),
    ("another size", r"out.2.weight .* does not fit .*conv_out.weight"),
    ("whole numbers", r"out.2.weight .*int8 numbers are no weights"),
    ("truncated", "truncated or not a safetensors file"),
    ("a folder", "no such file .* give a checkpoint in one file"),
    ("no file", "no such file"),
    ("another kind", "not a checkpoint of one of the families"),
  ],
)
def test_what_does_not_fit_is_a_few_lines_and_writes_nothing(tmp_path, capsys, how, message):
  command = broken(how, tmp_path)
  before = sorted(os.listdir(tmp_path))
  assert main(command) == 2
  error = capsys.readouterr().err
  assert re.search(message, error), error
  assert error.count("\n") <= 12 and sorted(os.listdir(tmp_path)) == before


def test_the_command_line(tmp_path):
  """As a user calls it, with exit code 0 and without a traceback; then `inspect` on the file."""
  file, out = tmp_path / "v1-5.safetensors", tmp_path / "out"
  save_file(stable_diffusion(), file)

  def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dancegrpo_jax.convert", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)

  done = run("import-single", str(file), "--base=assets/emoji-sd", f"--out={out}")
  assert done.returncode == 0, done.stderr
  assert json.loads((out / "model_index.json").read_text())["_class_name"]
  shown = run("inspect", str(file))
  assert shown.returncode == 0
  assert "it looks like a Stable Diffusion 1.x checkpoint in one file" in shown.stdout
  assert "model.diffusion_model.out.2.bias\t[4]\tfloat32" in shown.stdout

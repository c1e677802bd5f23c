"""LoRA files against diffusers and peft.

They draw the same images from our files, and we draw the same from theirs.
"""

import json
import re

import jax
import numpy as np
import pytest
import torch
from diffusers import (
  FluxPipeline,
  FluxTransformer2DModel,
  StableDiffusionPipeline,
  UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_checkpoint import draw, relative_error, tiny_config, write_flux
from torch_parity import nchw, nhwc

from dancegrpo_jax.assembly import loading
from dancegrpo_jax.checkpoints import store
from dancegrpo_jax.convert import folders
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.errors import ConfigError

RANK, ALPHA = 4, 10.0
TARGETS = r".*attn.*/(to_(q|k|v|out_0)|add_[qkv]_proj|to_add_out)/kernel"
# The same layers in peft's spelling.
MODULES = [
  "to_q",
  "to_k",
  "to_v",
  "to_out.0",
  "add_q_proj",
  "add_k_proj",
  "add_v_proj",
  "to_add_out",
]
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module", params=["sd", "flux", "flux_scan"])
def case(request, tiny_models, tmp_path_factory):
  """(config, a workdir with a checkpoint of random adapters, these adapters)."""
  values = {"lora__rank": RANK, "lora__alpha": ALPHA, "lora__targets": TARGETS}
  if request.param == "sd":
    config = tiny_config(tiny_models, **values)
  else:
    folder = write_flux(tmp_path_factory.mktemp("flux") / "base")
    values |= {
      "model__family": "flux",
      "sampler__kind": "flow",
      "model__text_length": 8,
      "sampler__shift": 0.0,
    }
    scan = request.param == "flux_scan"
    config = tiny_config(
      None,
      model__checkpoint=str(folder),
      model__scan_blocks=scan,
      reward__terms=(("compressibility", 1.0),),
      **values,
    )
  workdir = tmp_path_factory.mktemp("trained")
  adapters = draw(loading.build_pipeline(config).adapters, seed=7)
  with store.Saver(workdir / "checkpoints", keep=1) as saver:
    saver.save(1, {"trainable": {"lora": adapters}}, {"config": config.to_dict(), "iteration": 1})
  return config, workdir, adapters


def changed(config, **values):
  """A copy of the config with other values in the lora section."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.lora.update(values)
  return config


def loaded(config) -> loading.Model:
  pipeline, mesh = loading.build_pipeline(config), sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    return loading.load(config, pipeline, {}, mesh)


def is_flux(config) -> bool:
  return config.model.family == "flux"


def arguments(config) -> list[np.ndarray]:
  rng = np.random.default_rng(5)

  def normal(*shape) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)

  if is_flux(config):
    return [
      normal(2, 4, 4, 4),
      np.array([300.5, 700.25], np.float32),
      normal(2, 8, 24),
      normal(2, 16),
    ]
  return [normal(2, 8, 8, 4), np.array([300.0, 700.0], np.float32), normal(2, 8, 16)]


def ours(config, model, adapters) -> np.ndarray:
  """The denoiser's output with the adapters; None stands for the base model."""
  x, time, *rows = arguments(config)
  rows = dict(zip(("text", "pooled"), rows)) if is_flux(config) else rows[0]
  params = model.frozen | ({} if adapters is None else {"lora": adapters})
  with jax.default_matmul_precision("highest"):
    return np.asarray(jax.jit(model.pipeline.denoise)(params, x, time, rows))


def theirs(config, network) -> np.ndarray:
  x, time, *rows = map(torch.from_numpy, arguments(config))
  with torch.no_grad():
    if not is_flux(config):
      return nhwc(network(torch.from_numpy(nchw(x.numpy())), time, rows[0]).sample)
    packed = FluxPipeline._pack_latents(torch.from_numpy(nchw(x.numpy())), 2, 4, 4, 4)
    y = network(
      packed,
      timestep=time / 1000,
      guidance=torch.full((2,), 3.5),
      encoder_hidden_states=rows[0],
      pooled_projections=rows[1],
      txt_ids=torch.zeros(8, 3),
      img_ids=FluxPipeline._prepare_latent_image_ids(2, 2, 2, "cpu", torch.float32),
    ).sample
    return nhwc(FluxPipeline._unpack_latents(y, 32, 32, 8))


def network_of(pipe):
  return pipe.transformer if isinstance(pipe, FluxPipeline) else pipe.unet


def pipeline_class(config):
  return FluxPipeline if is_flux(config) else StableDiffusionPipeline


def test_diffusers_loads_our_file_at_its_strength(case, tmp_path):
  """alpha / rank is 2.5, so that a strength of 1, or of 2.5 applied twice, would be noticed."""
  config, workdir, adapters = case
  folders.export(config, str(workdir), tmp_path / "out", "", "")
  assert {path.name for path in (tmp_path / "out").iterdir()} == {FILE, "README.md"}
  pipe = pipeline_class(config).from_pretrained(config.model.checkpoint)
  model = loaded(config)
  base = theirs(config, network_of(pipe))
  assert relative_error(ours(config, model, None), base) < 2e-5
  pipe.load_lora_weights(tmp_path / "out")
  y, expected = ours(config, model, adapters), theirs(config, network_of(pipe))
  print(f"error {relative_error(y, expected):.1e}, change {relative_error(base, expected):.2f}")
  assert relative_error(y, expected) < 2e-5 < 1e-2 < relative_error(base, expected)


def test_merged_export_is_the_same_model(case, tmp_path):
  config, workdir, adapters = case
  folders.export(config, str(workdir), tmp_path / "out", "pipeline", "raw")
  pipe = pipeline_class(config).from_pretrained(tmp_path / "out")
  assert (
    relative_error(ours(config, loaded(config), adapters), theirs(config, network_of(pipe))) < 2e-5
  )


def torch_adapters(config, alpha: float, seed: int = 3):
  """Their network with peft's adapters, all with random factors."""
  cls = FluxTransformer2DModel if is_flux(config) else UNet2DConditionModel
  network = cls.from_pretrained(
    config.model.checkpoint, subfolder="transformer" if is_flux(config) else "unet"
  )
  network.add_adapter(LoraConfig(r=RANK, lora_alpha=alpha, target_modules=MODULES))
  generator = torch.Generator().manual_seed(seed)
  for name, parameter in network.named_parameters():
    if "lora_" in name:
      parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
  return network.eval()


def saved(config, network, folder, metadata: bool) -> None:
  """Saves as diffusers' training scripts do. Older ones write no metadata and thus lose alpha."""
  key = "transformer" if is_flux(config) else "unet"
  values = {f"{key}_lora_layers": get_peft_model_state_dict(network)}
  if metadata:
    values[f"{key}_lora_adapter_metadata"] = network.peft_config["default"].to_dict()
  pipeline_class(config).save_lora_weights(folder, **values)


def test_we_write_the_names_that_diffusers_writes(case, tmp_path):
  config, workdir, _ = case
  folders.export(config, str(workdir), tmp_path / "ours", "lora", "")
  saved(config, torch_adapters(config, ALPHA), tmp_path / "theirs", metadata=False)
  a, b = (load_file(tmp_path / name / FILE) for name in ("ours", "theirs"))
  assert {name: x.shape for name, x in a.items()} == {name: x.shape for name, x in b.items()}


def test_their_file_is_the_same_model_here(case, tmp_path):
  """The strength comes from the metadata, whatever alpha this run has."""
  config, network = case[0], torch_adapters(case[0], alpha=6.0)
  saved(config, network, tmp_path, metadata=True)
  config = changed(config, checkpoint=str(tmp_path))
  model = loaded(config)
  assert (
    relative_error(ours(config, model, model.trainable["lora"]), theirs(config, network)) < 2e-5
  )


def test_other_spellings(case, tmp_path):
  """Reads other layouts of LoRA files.

  They are peft's folder with adapter_config.json, lora.down and lora.up with alphas as tensors, and
  our own files.
  """
  config, workdir, adapters = case
  network = torch_adapters(config, alpha=6.0)
  state = {name: x.contiguous() for name, x in get_peft_model_state_dict(network).items()}
  (tmp_path / "peft").mkdir()
  save_file(
    {f"base_model.model.{name}": x for name, x in state.items()},
    tmp_path / "peft" / "adapter_model.safetensors",
  )
  (tmp_path / "peft" / "adapter_config.json").write_text(
    json.dumps({"r": RANK, "lora_alpha": 6, "peft_type": "LORA"})
  )
  old = {
    name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): x for name, x in state.items()
  }
  old |= {
    name.split(".lora_A")[0] + ".alpha": torch.tensor(6.0) for name in state if "lora_A" in name
  }
  save_file(old, tmp_path / "old.safetensors")
  expected = theirs(config, network)
  for name in ("peft", "old.safetensors"):
    model = loaded(changed(config, checkpoint=str(tmp_path / name)))
    assert relative_error(ours(config, model, model.trainable["lora"]), expected) < 2e-5, name
  folders.export(config, str(workdir), tmp_path / "ours", "lora", "")
  again = loaded(changed(config, checkpoint=str(tmp_path / "ours" / FILE))).trainable["lora"]
  assert relative_error(again, adapters) < 1e-6
  assert {x.sharding.is_fully_replicated for x in jax.tree.leaves(again)} == {True}


def mistake(config, path, **values) -> str:
  with pytest.raises(ConfigError) as caught:
    loaded(changed(config, checkpoint=str(path), **values))
  message = str(caught.value)
  assert message.startswith(f"config.lora.checkpoint = {str(path)!r}: ") and "\n" not in message
  return message


def test_files_that_do_not_fit(case, tmp_path):
  config, workdir, _ = case
  folders.export(config, str(workdir), tmp_path / "out", "lora", "")
  file = tmp_path / "out" / FILE
  assert "its rank is 4, not config.lora.rank = 2; set --config.lora.rank=4" in mistake(
    config, file, rank=2
  )
  text = mistake(config, file, targets=r".*attn.*/to_(q|k)/kernel")
  assert "it adapts other layers than config.lora.targets" in text and "isn't matched" in text
  text = mistake(config, file, targets=f"({TARGETS})|.*/proj/kernel")
  assert "isn't in the file" in text
  remedy = re.search(r"set --config.lora.targets='(.*)', or merge", text)
  loaded(changed(config, checkpoint=str(file), targets=remedy[1]))
  tensors = load_file(file)
  save_file(
    {name.replace("attn", "other"): x for name, x in tensors.items()},
    tmp_path / "other.safetensors",
  )
  assert "of another model" in mistake(config, tmp_path / "other.safetensors")
  wide = {name: torch.zeros(4, 1000) if "lora_A" in name else x for name, x in tensors.items()}
  save_file(wide, tmp_path / "wide.safetensors")
  assert "of another model" in mistake(config, tmp_path / "wide.safetensors")
  save_file({"weight": torch.zeros(3)}, tmp_path / "none.safetensors")
  assert "not a LoRA in the layout of diffusers, peft or kohya: it holds weight" in mistake(
    config, tmp_path / "none.safetensors"
  )
  assert "no such folder or .safetensors file" in mistake(config, tmp_path / "nowhere")
  (tmp_path / "empty").mkdir()
  assert "the folder holds nothing; expected a folder with pytorch_lora" in mistake(
    config, tmp_path / "empty"
  )
  file.write_bytes(file.read_bytes()[:-100])
  assert "truncated" in mistake(config, file)


def test_adapters_of_a_run_without_any(case, tmp_path):
  config = changed(case[0], rank=0, alpha=0.0, targets="")
  with pytest.raises(ConfigError, match="--part=lora: this config trains every weight"):
    folders.export(config, str(case[1]), tmp_path / "out", "lora", "")
  with pytest.raises(ConfigError, match="was trained with lora.rank = 4; this config has 0"):
    folders.export(config, str(case[1]), tmp_path / "out", "", "")

"""LoRA files of HunyuanVideo: those of diffusers, and those in the names of Tencent's code."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_checkpoint import video_config, write_hunyuan_video

from dancegrpo_jax.assembly import loading
from dancegrpo_jax.checkpoints import lora_merging
from dancegrpo_jax.convert import folders
from dancegrpo_jax.devices import sharding

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

RANK, ALPHA, WIDTH = 3, 5.0, 32  # of the adapters; of the tiny transformer
TARGETS = r".*attn.*/(to_(q|k|v|out_0)|add_[qkv]_proj|to_add_out)/kernel"
MODULES = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
MODULES += ["to_add_out"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
  return write_hunyuan_video(tmp_path_factory.mktemp("base") / "hunyuan")


@pytest.fixture(scope="module")
def denoiser(base):
  """(abstract tree, table, parameters) of the transformer."""
  config = video_config(base)
  pipeline = loading.build_pipeline(config)
  component = pipeline.components["denoiser"]
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    params = loading.read(config, pipeline, ["denoiser"], mesh)["denoiser"]
  return component.table, params


def changes(denoiser, file: Path) -> dict[str, np.ndarray]:
  """What a file adds to each kernel that it changes, `[in, out]`."""
  table, params = denoiser
  whole, _ = lora_merging.merged(params, table, str(file), 1.0)
  before, after = flatten_dict(params, sep="/"), flatten_dict(whole, sep="/")
  added = {path: np.asarray(after[path]) - np.asarray(before[path]) for path in before}
  return {path: value for path, value in added.items() if np.any(value)}


def drawn(shapes: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
  """Factors for layers of these outputs and inputs, in diffusers' spelling."""
  generator = torch.Generator().manual_seed(0)
  return {
    f"{layer}.lora_{letter}.weight": torch.randn(shape, generator=generator)
    for layer, (width_out, width_in) in shapes.items()
    for letter, shape in (("A", (RANK, width_in)), ("B", (width_out, RANK)))
  }


def saved(tensors: dict[str, torch.Tensor], file: Path) -> Path:
  from safetensors.torch import save_file

  file.parent.mkdir(parents=True, exist_ok=True)
  save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file)
  return file


def test_what_diffusers_save_is_trained_further(base, denoiser, tmp_path):
  """Adapters of save_lora_weights change the model as much as they do in diffusers."""
  network = diffusers.HunyuanVideoTransformer3DModel.from_pretrained(base, subfolder="transformer")
  settings = peft.LoraConfig(
    r=RANK, lora_alpha=ALPHA, target_modules=MODULES, init_lora_weights=False
  )
  network.add_adapter(settings)
  layers = peft.utils.get_peft_model_state_dict(network)
  metadata = {"r": RANK, "lora_alpha": ALPHA, "target_modules": MODULES}
  diffusers.HunyuanVideoPipeline.save_lora_weights(
    tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
  )
  config = video_config(
    base, lora__rank=RANK, lora__alpha=2.0, lora__targets=TARGETS, lora__checkpoint=str(tmp_path)
  )
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    pipeline = loading.build_pipeline(config)
    shardings = loading.shardings_of(config, pipeline, mesh)["lora"]
    adapters = flatten_dict(loading.load_adapters(config, pipeline, shardings), sep="/")
  assert len(adapters) == len(layers)
  for name, tensor in layers.items():
    module, letter = name.removesuffix(".weight").rsplit(".lora_", 1)
    path = f"{module.replace('.0', '_0').replace('.', '/')}/{letter.lower()}"
    strength = ALPHA / 2.0 if letter == "B" else 1.0  # alpha is 2 in the run
    np.testing.assert_allclose(adapters[path], strength * tensor.T.numpy(), rtol=1e-6)
  # Merged, they are those that diffusers fuse.
  found = changes(denoiser, tmp_path)
  before = {key: value.clone() for key, value in network.state_dict().items()}
  network.fuse_lora()
  kernel = "transformer_blocks.0.attn.add_k_proj.base_layer.weight"
  theirs = (network.state_dict()[kernel] - before[kernel]).T
  ours = found["transformer_blocks_0/attn/add_k_proj/kernel"]
  np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


def layers_of_tencent() -> dict[str, tuple[int, int]]:
  """Outputs and inputs of the layers of the tiny transformer, in Tencent's names.

  Those that diffusers can't convert at this width, or convert wrongly, are tested on their own.
  """
  d, text = WIDTH, 16
  layers = {
    "single_blocks.0.linear2": (d, 5 * d),
    "single_blocks.0.modulation.linear": (3 * d, d),
    "final_layer.linear": (16, d),
    "time_in.mlp.0": (d, 256),
    "time_in.mlp.2": (d, d),
    "guidance_in.mlp.0": (d, 256),
    "guidance_in.mlp.2": (d, d),
    "vector_in.in_layer": (d, text),
    "vector_in.out_layer": (d, d),
    "txt_in.input_embedder": (d, text),
    "txt_in.t_embedder.mlp.0": (d, 256),
    "txt_in.t_embedder.mlp.2": (d, d),
    "txt_in.c_embedder.linear_1": (d, text),
    "txt_in.c_embedder.linear_2": (d, d),
  }
  refiner = "txt_in.individual_token_refiner.blocks.0"
  layers |= {
    f"{refiner}.self_attn_proj": (d, d),
    f"{refiner}.mlp.fc1": (4 * d, d),
    f"{refiner}.mlp.fc2": (d, 4 * d),
    f"{refiner}.adaLN_modulation.1": (2 * d, d),
  }
  for stream in ("img", "txt"):
    block = f"double_blocks.0.{stream}"
    layers |= {
      f"{block}_attn_qkv": (3 * d, d),
      f"{block}_attn_proj": (d, d),
      f"{block}_mlp.fc1": (4 * d, d),
      f"{block}_mlp.fc2": (d, 4 * d),
      f"{block}_mod.linear": (6 * d, d),
    }
  return layers


def test_tencents_names_are_what_diffusers_make_of_them(base, denoiser, tmp_path):
  layers = layers_of_tencent()
  tensors = {f"diffusion_model.{name}": value for name, value in drawn(layers).items()}
  file = saved(tensors, tmp_path / "tencent" / "x.safetensors")
  theirs = diffusers.HunyuanVideoPipeline.lora_state_dict(str(file.parent), weight_name=file.name)
  ours = changes(denoiser, file)
  expected = changes(denoiser, saved(theirs, tmp_path / "theirs" / "x.safetensors"))
  assert ours.keys() == expected.keys() and len(ours) == len(layers) + 2 * 2  # q, k, v of two
  for path, value in expected.items():
    np.testing.assert_allclose(ours[path], value, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_layers_of_several_parts(denoiser, tmp_path, layout):
  """Layers that diffusers don't convert here.

  They know the published width of linear1 alone, cut the A of the refiner's q, k, v in three, and
  swap halves of the last norm's A with those of B.
  """
  layers = {
    "single_blocks.0.linear1": (7 * WIDTH, WIDTH),
    "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": (3 * WIDTH, WIDTH),
    "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
  }
  factors, tensors = drawn(layers), {}
  for layer in layers:
    name = f"diffusion_model.{layer}"
    if layout == "kohya":
      name = f"lora_unet_{layer.replace('.', '_')}"
    for letter, word in (("A", "down"), ("B", "up")):
      tensors[f"{name}.lora_{word}.weight"] = factors[f"{layer}.lora_{letter}.weight"]
    tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
  found = changes(denoiser, saved(tensors, tmp_path / "x.safetensors"))
  single, refiner = "single_transformer_blocks_0", "context_embedder/token_refiner/refiner_blocks_0"
  parts = {
    "single_blocks.0.linear1": [
      *(f"{single}/attn/to_{name}" for name in "qkv"),
      f"{single}/proj_mlp",
    ],
    "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": [
      f"{refiner}/attn/to_{name}" for name in "qkv"
    ],
    "final_layer.adaLN_modulation.1": ["norm_out/linear"],
  }
  assert len(found) == 8
  for layer, paths in parts.items():
    a, b = (factors[f"{layer}.lora_{letter}.weight"].numpy() for letter in "AB")
    change = np.concatenate([found[f"{path}/kernel"] for path in paths], axis=1)
    if layer.startswith("final_layer"):  # theirs is shift and scale, ours scale and shift
      b = np.roll(b, len(b) // 2, axis=0)
    np.testing.assert_allclose(change.T, ALPHA / RANK * b @ a, atol=1e-5)


def test_merge_writes_a_folder(base, tmp_path):
  """diffusers load it, and its transformer is the base's with the adapters."""
  layers = {"transformer.proj_out": (16, WIDTH)}
  file = saved(drawn(layers), tmp_path / "lora" / "x.safetensors")
  folders.merge(video_config(base), str(file), tmp_path / "out", "pipeline", 1.0)
  pipes = [
    diffusers.HunyuanVideoPipeline.from_pretrained(folder) for folder in (base, tmp_path / "out")
  ]
  before, after = (pipe.transformer.proj_out.weight.detach().numpy() for pipe in pipes)
  a, b = (value.numpy() for value in drawn(layers).values())
  np.testing.assert_allclose(after - before, b @ a, atol=1e-5)

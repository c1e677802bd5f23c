"""LoRA files in every layout that people bring, against diffusers and peft.

Each file is read twice: merged into the weights, and as adapters that a run trains further. Their
networks with the adapters draw what ours draw with the merged weights.
"""

import json
from functools import cache
from pathlib import Path

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
from flax.traverse_util import flatten_dict
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_checkpoint import ROOT, relative_error, tiny_config

from dancegrpo_jax.checkpoints import lora_merging, weights
from dancegrpo_jax.checkpoints.networks import abstract_params
from dancegrpo_jax.convert import folders
from dancegrpo_jax.errors import ConversionError
from dancegrpo_jax.models import lora
from dancegrpo_jax.settings import config_file

ASSETS = ROOT / "assets"
FILE = "pytorch_lora_weights.safetensors"
# No power of two, so that a product is not right by chance of rounding.
RANK, ALPHA = 6, 5.0
ATTENTION = r".*attn.*/(to_(q|k|v|out_0)|add_[qkv]_proj|to_add_out)/kernel"
MODULES = ["to_q", "to_k", "to_v", "to_out.0"]

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


# ---- Networks


def torch_network(kind: str):
  if kind == "sd":
    return UNet2DConditionModel.from_pretrained(ASSETS / "emoji-sd", subfolder="unet").eval()
  return FluxTransformer2DModel.from_pretrained(
    ASSETS / "emoji-flux", subfolder="transformer"
  ).eval()


def pipeline(kind: str):
  cls = StableDiffusionPipeline if kind == "sd" else FluxPipeline
  return cls.from_pretrained(ASSETS / f"emoji-{kind}")


def network_in(pipe):
  return pipe.transformer if isinstance(pipe, FluxPipeline) else pipe.unet


def output(network) -> np.ndarray:
  """Of random inputs."""
  generator, c = torch.Generator().manual_seed(5), network.config

  def normal(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=generator)

  with torch.no_grad():
    if isinstance(network, UNet2DConditionModel):
      x, text = normal(2, c.in_channels, 8, 8), normal(2, 5, c.cross_attention_dim)
      return network(x, torch.tensor([300.0, 700.0]), text).sample.numpy()
    return network(
      normal(2, 4, c.in_channels),
      timestep=torch.tensor([0.3, 0.7]),
      encoder_hidden_states=normal(2, 5, c.joint_attention_dim),
      pooled_projections=normal(2, c.pooled_projection_dim),
      txt_ids=torch.zeros(5, 3),
      img_ids=FluxPipeline._prepare_latent_image_ids(2, 2, 2, "cpu", torch.float32),
    ).sample.numpy()


@pytest.fixture(scope="module", params=["sd", "flux"])
def kind(request) -> str:
  return request.param


def read_base(kind: str):
  """(parameters, name) of our network."""
  folder = ASSETS / f"emoji-{kind}" / ("unet" if kind == "sd" else "transformer")
  config = weights.read_config(folder)
  return weights.load(folder, config["_class_name"], abstract_params(config)), config["_class_name"]


@pytest.fixture(scope="module")
def bases():
  return {kind: read_base(kind) for kind in ("sd", "flux")}


def with_weights(kind: str, name: str, params, folder: Path):
  """Their network with our weights."""
  weights.save(folder, name, params, dtype="float32")
  network = torch_network(kind)
  network.load_state_dict(load_file(next(folder.glob("*.safetensors"))))
  return network


def merged_tree(kind: str, bases, file: Path):
  """(the weights with a file added, lines for the user)."""
  return lora_merging.merged(*bases[kind], file)


def merged(kind: str, bases, file: Path):
  """(their network with the weights that we merge, these weights, lines for the user)."""
  tree, notes = merged_tree(kind, bases, file)
  return with_weights(kind, bases[kind][1], tree, file.parent / "merged"), tree, notes


def as_adapters(kind: str, bases, file: Path, rank=RANK, alpha=3.0, targets=ATTENTION):
  """(the weights with the adapters of a run that starts from a file, lines for the user)."""
  params, name = bases[kind]
  settings = lora.Lora(rank, alpha, targets)
  adapters, notes = weights.load_lora(
    file, name, lora.abstract(params, settings), params, settings.scale
  )
  return lora.merged(params, adapters, settings.scale), notes


def assert_same(tree, other) -> None:
  a, b = flatten_dict(tree, sep="/"), flatten_dict(other, sep="/")
  for path, value in a.items():
    np.testing.assert_allclose(np.asarray(value), np.asarray(b[path]), atol=1e-6, err_msg=path)


# ---- Adapters and files


def adapted(kind: str, **changes):
  """(their network with peft's adapters of random factors, the factors by layer)."""
  values = {"r": RANK, "lora_alpha": ALPHA, "target_modules": MODULES, "init_lora_weights": False}
  if kind == "flux":
    values["target_modules"] = [*MODULES, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
  network = torch_network(kind)
  torch.manual_seed(3)
  network.add_adapter(LoraConfig(**(values | changes)))
  state = get_peft_model_state_dict(network)
  stems = [name.removesuffix(".lora_A.weight") for name in state if "lora_A" in name]
  return network, {
    stem: (state[f"{stem}.lora_A.weight"], state[f"{stem}.lora_B.weight"]) for stem in stems
  }


@pytest.fixture(scope="module")
def made():
  """`made(kind)` is `adapted(kind)` and the output of its network, made once."""

  @cache
  def make(kind: str):
    network, factors = adapted(kind)
    expected = output(network)
    assert relative_error(output(torch_network(kind)), expected) > 1e-3
    return network, factors, expected

  return make


def prefix_of(kind: str) -> str:
  return "unet" if kind == "sd" else "transformer"


def written(tensors: dict, file: Path, metadata=None) -> Path:
  file.parent.mkdir(parents=True, exist_ok=True)
  save_file({name: x.contiguous().clone() for name, x in tensors.items()}, file, metadata)
  return file


def spelt(factors: Factors, form: str, down: str, up: str, alpha: str = "", value=ALPHA) -> dict:
  """The tensors with "{}" in `form` for the layer; `alpha` is the end of the alpha's name."""
  tensors = {}
  for layer, (a, b) in factors.items():
    tensors |= {form.format(layer) + down: a, form.format(layer) + up: b}
    if alpha:
      tensors[form.format(layer) + alpha] = torch.tensor(value)
  return tensors


def kohya(factors: Factors, prefix: str, value=ALPHA) -> dict:
  flat = {layer.replace(".", "_"): pair for layer, pair in factors.items()}
  return spelt(flat, prefix + "{}", ".lora_down.weight", ".lora_up.weight", ".alpha", value)


def peft_json(folder: Path, **changes) -> None:
  values = {"r": RANK, "lora_alpha": ALPHA, "peft_type": "LORA"} | changes
  (folder / "adapter_config.json").write_text(json.dumps(values))


def write_diffusers(kind, network, factors, folder):
  tensors = {f"{prefix_of(kind)}_lora_layers": get_peft_model_state_dict(network)}
  tensors[f"{prefix_of(kind)}_lora_adapter_metadata"] = network.peft_config["default"].to_dict()
  type(pipeline(kind)).save_lora_weights(folder, **tensors)
  return folder / FILE


def write_adapter(kind, network, factors, folder):
  network.save_lora_adapter(folder)
  return folder / FILE


def write_peft(kind, network, factors, folder):
  form = "base_model.model.{}"
  tensors = spelt(factors, form, ".lora_A.default.weight", ".lora_B.default.weight")
  file = written(tensors, folder / "adapter_model.safetensors")
  peft_json(folder)
  return file


def write_kohya(kind, network, factors, folder):
  prefix = "lora_unet_" if kind == "sd" else "lora_transformer_"
  return written(kohya(factors, prefix), folder / "any_name.safetensors")


def write_comfyui(kind, network, factors, folder):
  tensors = spelt(factors, "diffusion_model.{}", ".lora_down.weight", ".lora_up.weight", ".alpha")
  return written(tensors, folder / "comfyui.safetensors")


LAYOUTS = {
  "diffusers": write_diffusers,
  "save_lora_adapter": write_adapter,
  "peft": write_peft,
  "kohya": write_kohya,
  "comfyui": write_comfyui,
}
# diffusers' `load_lora_weights` reads these.
READ_BY_DIFFUSERS = {
  ("sd", "diffusers"),
  ("flux", "diffusers"),
  ("sd", "kohya"),
  ("flux", "kohya"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_has_the_strength_it_was_made_with(kind, layout, bases, made, tmp_path, measured):
  network, factors, expected = made(kind)
  file = LAYOUTS[layout](kind, network, factors, tmp_path / "lora")
  if (kind, layout) in READ_BY_DIFFUSERS:
    pipe = pipeline(kind)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    measured("diffusers", relative_error(output(network_in(pipe)), expected), 2e-5)
  ours, tree, notes = merged(kind, bases, file)
  measured("ours", relative_error(output(ours), expected), 2e-5)
  assert_same(as_adapters(kind, bases, file)[0], tree)
  assert notes == (("its alpha is that of adapter_config.json beside it",) * (layout == "peft"))


def test_ranks_and_alphas_that_differ(kind, bases, tmp_path, measured):
  patterns = {"rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_k": 7.0, "to_out.0": 1.0}}
  network, factors = adapted(kind, **patterns)
  file = write_diffusers(kind, network, factors, tmp_path / "lora")
  pipe = pipeline(kind)
  pipe.load_lora_weights(tmp_path / "lora")
  expected = output(network_in(pipe))
  measured("peft", relative_error(output(network), expected), 2e-5)
  ours, tree, _ = merged(kind, bases, file)
  measured("merged", relative_error(output(ours), expected), 2e-5)
  for rank in (RANK, 8):
    weights_of_run, (note,) = as_adapters(kind, bases, file, rank=rank)
    assert_same(weights_of_run, tree)
    assert note.startswith("its layers have rank 3 or 6 and alpha / rank 0.1667 or 0.8333 or 1.167")
  with pytest.raises(ConversionError, match="its rank is 3, 6, not config.lora.rank = 4; set"):
    as_adapters(kind, bases, file, rank=4)


def test_kohyas_alphas_and_ranks_that_differ(kind, bases, tmp_path, measured):
  """The expected network of Stable Diffusion is peft's, because diffusers 0.42 give all attention
  layers of a UNet the alpha that most have: "alpha_pattern keys did not match", they warn.
  """
  ranks, alphas = {"to_q": 3, "to_k": 8}, {"to_k": 7.0, "to_v": 2.0}
  network, factors = adapted(kind, rank_pattern=ranks, alpha_pattern=alphas)
  tensors = kohya(factors, "lora_unet_" if kind == "sd" else "lora_transformer_")
  for end, alpha in alphas.items():
    tensors |= {name: torch.tensor(alpha) for name in tensors if name.endswith(f"{end}.alpha")}
  file = written(tensors, tmp_path / "lora" / "any.safetensors")
  expected = output(network)
  if kind == "flux":
    pipe = pipeline(kind)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    measured("diffusers", relative_error(output(pipe.transformer), expected), 2e-5)
  ours, tree, _ = merged(kind, bases, file)
  measured("ours", relative_error(output(ours), expected), 2e-5)
  assert_same(as_adapters(kind, bases, file, rank=8)[0], tree)


def test_new_ranks_can_be_trained(bases, made, tmp_path):
  """Their B is 0, and their A is not, or neither would have a gradient."""
  network, factors, _ = made("sd")
  file = write_kohya("sd", network, factors, tmp_path / "lora")
  params, name = bases["sd"]
  settings = lora.Lora(8, 8.0, ATTENTION)
  adapters, _ = weights.load_lora(file, name, lora.abstract(params, settings), params, 1.0)
  for path, value in flatten_dict(adapters, sep="/").items():
    if path.endswith("/b"):
      assert not value[RANK:].any()
    else:
      bound = value.shape[0] ** -0.5
      assert np.abs(value[:, RANK:]).min() > 0 and np.abs(value[:, RANK:]).max() <= bound


@pytest.mark.parametrize("ending", [".alpha", ".lora.alpha"])
def test_alpha_tensors_of_dotted_names_count(kind, ending, bases, made, tmp_path, measured):
  """As FLUX's loader in diffusers and ComfyUI have it; the expected network is peft's."""
  _, factors, expected = made(kind)
  tensors = spelt(factors, prefix_of(kind) + ".{}", ".lora.down.weight", ".lora.up.weight", ending)
  ours, *_ = merged(kind, bases, written(tensors, tmp_path / "lora" / FILE))
  measured("ours", relative_error(output(ours), expected), 2e-5)


def test_older_names_of_attention(bases, made, tmp_path, measured):
  """diffusers before 0.21 called the layers attn1.processor.to_out_lora; the strength is 1."""
  _, factors, _ = made("sd")
  names = {
    layer.replace(".attn1.", ".attn1.processor.")
    .replace(".attn2.", ".attn2.processor.")
    .replace("to_out.0", "to_out"): pair
    for layer, pair in factors.items()
  }
  tensors = spelt(names, "unet.{}", "_lora.down.weight", "_lora.up.weight")
  file = written(tensors, tmp_path / "lora" / FILE)
  pipe = pipeline("sd")
  pipe.load_lora_weights(tmp_path / "lora")
  ours, *_ = merged("sd", bases, file)
  measured("ours", relative_error(output(ours), output(pipe.unet)), 2e-5)


# ---- Places of alpha


def test_what_wins_where_alpha_is_in_several_places(bases, made, tmp_path, measured):
  """The tensor of a layer, then the header, then a file beside it."""
  _, factors, expected = made("sd")
  header = {"lora_adapter_metadata": json.dumps({"unet.r": RANK, "unet.lora_alpha": ALPHA})}
  plain = spelt(factors, "unet.{}", ".lora_A.weight", ".lora_B.weight")
  with_header = written(plain, tmp_path / "header" / FILE, header)
  alphas = {f"{layer}.alpha": torch.tensor(ALPHA) for layer in factors}
  other = {"lora_adapter_metadata": json.dumps({"unet.r": RANK, "unet.lora_alpha": 50.0})}
  with_tensors = written(
    plain | {f"unet.{name}": x for name, x in alphas.items()}, tmp_path / "tensors" / FILE, other
  )
  for folder in ("header", "tensors"):
    peft_json(tmp_path / folder, lora_alpha=99)
    (tmp_path / folder / "lora_config.json").write_text(json.dumps({"lora_alpha": 77}))
  for file in (with_header, with_tensors):
    ours, _, notes = merged("sd", bases, file)
    measured(file.parent.name, relative_error(output(ours), expected), 2e-5)
    assert notes == ()


@pytest.mark.parametrize(
  "kind, name, content",
  [
    (
      "sd",
      "lora_config.json",
      {"step": 3, "lora_params": {"lora_rank": RANK, "lora_alpha": ALPHA}},
    ),
    ("flux", "lora_config.json", {"lora_rank": RANK, "lora_alpha": ALPHA}),
    ("sd", "adapter_config.json", {"lora_alpha": ALPHA / RANK**0.5, "use_rslora": True}),
  ],
)
def test_alpha_beside_the_file(name, content, kind, bases, made, tmp_path, measured):
  _, factors, expected = made(kind)
  tensors = spelt(factors, prefix_of(kind) + ".{}", ".lora_A.weight", ".lora_B.weight")
  file = written(tensors, tmp_path / "lora" / FILE)
  (tmp_path / "lora" / name).write_text(json.dumps(content))
  ours, _, (note,) = merged(kind, bases, file)
  assert note == f"its alpha is that of {name} beside it"
  measured("ours", relative_error(output(ours), expected), 2e-5)


# ---- FLUX in the names of its authors


def fused(tensors: dict[str, tuple[int, int]], seed: int = 4) -> Factors:
  """Random factors of layers with these outputs and inputs."""
  generator = torch.Generator().manual_seed(seed)

  def normal(*shape) -> torch.Tensor:
    return 0.2 * torch.randn(shape, generator=generator)

  return {layer: (normal(RANK, i), normal(o, RANK)) for layer, (o, i) in tensors.items()}


def black_forest(single: bool) -> Factors:
  """Adapters of every kind of layer in emoji-flux. diffusers have the width of linear1 of FLUX.1
  alone.
  """
  d, layers = 128, {}
  for i in range(3):
    for stream in ("img", "txt"):
      layers |= {
        f"double_blocks.{i}.{stream}_attn.qkv": (3 * d, d),
        f"double_blocks.{i}.{stream}_attn.proj": (d, d),
        f"double_blocks.{i}.{stream}_mlp.0": (4 * d, d),
        f"double_blocks.{i}.{stream}_mlp.2": (d, 4 * d),
        f"double_blocks.{i}.{stream}_mod.lin": (6 * d, d),
      }
  for i in range(4):
    layers |= {
      f"single_blocks.{i}.linear2": (d, 5 * d),
      f"single_blocks.{i}.modulation.lin": (3 * d, d),
    }
    if single:
      layers[f"single_blocks.{i}.linear1"] = (7 * d, d)
  return fused(layers)


@pytest.mark.parametrize("layout", ["kohya", "comfyui", "without alpha"])
def test_fluxs_own_names_are_diffusers_layers(layout, bases, tmp_path, measured):
  factors = black_forest(single=False)
  if layout == "kohya":
    tensors = kohya(factors, "lora_unet_")
  else:
    alpha = ".alpha" if layout == "comfyui" else ""
    names = (".lora_down.weight", ".lora_up.weight", alpha)
    tensors = spelt(factors, "diffusion_model.{}", *names)
  file = written(tensors, tmp_path / "lora" / "any.safetensors")
  pipe = pipeline("flux")
  pipe.load_lora_weights(file.parent, weight_name=file.name)
  ours, *_ = merged("flux", bases, file)
  measured("ours", relative_error(output(ours), output(pipe.transformer)), 2e-5)


def test_xlabs_names_are_diffusers_layers(bases, tmp_path, measured):
  d = 128
  layers = {}
  for i in range(3):
    for k in (1, 2):
      layers |= {
        f"double_blocks.{i}.processor.qkv_lora{k}": (3 * d, d),
        f"double_blocks.{i}.processor.proj_lora{k}": (d, d),
      }
  file = written(
    spelt(fused(layers), "{}", ".down.weight", ".up.weight"), tmp_path / "lora" / "x.safetensors"
  )
  pipe = pipeline("flux")
  pipe.load_lora_weights(file.parent, weight_name=file.name)
  ours, tree, _ = merged("flux", bases, file)
  measured("ours", relative_error(output(ours), output(pipe.transformer)), 2e-5)
  targets = r"transformer_blocks_.*attn.*/kernel"
  assert_same(as_adapters("flux", bases, file, targets=targets)[0], tree)


def test_every_layer_of_flux_against_its_product(bases, tmp_path):
  """linear1 is q, k, v and the feed-forward network; the halves of the last norm are swapped."""
  d = 128
  factors = black_forest(single=True) | fused(
    {"final_layer.adaLN_modulation.1": (2 * d, d), "final_layer.linear": (16, d), "img_in": (d, 16)}
  )
  file = written(kohya(factors, "lora_unet_"), tmp_path / "lora" / "x.safetensors")
  tree, _ = merged_tree("flux", bases, file)
  base, flat = flatten_dict(bases["flux"][0], sep="/"), flatten_dict(tree, sep="/")

  def change(path: str) -> np.ndarray:
    kernel = f"{path}/kernel"
    return (np.asarray(flat[kernel], np.float64) - np.asarray(base[kernel], np.float64)).T

  def product(layer: str) -> np.ndarray:
    a, b = (x.double().numpy() for x in factors[layer])
    return ALPHA / RANK * b @ a

  block = "single_transformer_blocks_2"
  parts = [
    change(f"{block}/{name}") for name in ("attn/to_q", "attn/to_k", "attn/to_v", "proj_mlp")
  ]
  np.testing.assert_allclose(np.concatenate(parts), product("single_blocks.2.linear1"), atol=1e-6)
  shift, scale = np.split(product("final_layer.adaLN_modulation.1"), 2)
  np.testing.assert_allclose(change("norm_out/linear"), np.concatenate([scale, shift]), atol=1e-6)
  np.testing.assert_allclose(change("proj_out"), product("final_layer.linear"), atol=1e-6)
  np.testing.assert_allclose(change("x_embedder"), product("img_in"), atol=1e-6)


def test_the_last_layers_halves_are_swapped_as_in_diffusers(bases, tmp_path):
  """With an alpha that is the rank, because diffusers leave alpha out here."""
  factors = fused({"final_layer.adaLN_modulation.1": (256, 128), "final_layer.linear": (16, 128)})
  file = written(kohya(factors, "lora_unet_", float(RANK)), tmp_path / "lora" / "x.safetensors")
  tree, _ = merged_tree("flux", bases, file)
  theirs = FluxPipeline.lora_state_dict(str(file.parent), weight_name=file.name)
  for module, path in (("norm_out.linear", ("norm_out", "linear")), ("proj_out", ("proj_out",))):
    ours, base = tree, bases["flux"][0]
    for key in (*path, "kernel"):
      ours, base = ours[key], base[key]
    b, a = (theirs[f"{module}.lora_{letter}.weight"].numpy() for letter in "BA")
    change = np.asarray(ours, np.float64) - np.asarray(base, np.float64)
    np.testing.assert_allclose(change.T, b.astype(np.float64) @ a, atol=1e-6)


# ---- Text encoders, convolutions, and what is refused


TEXT = {
  "diffusers": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
  "diffusers, second": "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
  "kohya": "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha",
  "kohya, first": "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
  "comfyui": "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight",
  "peft": "base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.default.weight",
  "DoRA": "lora_te_text_model_encoder_layers_0_mlp_fc1.dora_scale",
}


@pytest.mark.parametrize("name", TEXT.values(), ids=TEXT.keys())
def test_a_text_encoder_is_named_and_left_out(name, kind, bases, made, tmp_path):
  _, factors, _ = made(kind)
  plain = spelt(factors, prefix_of(kind) + ".{}", ".lora_A.weight", ".lora_B.weight")
  expected, _ = merged_tree(kind, bases, written(plain, tmp_path / "without" / FILE))
  file = written(plain | {name: torch.ones(4, 8)}, tmp_path / "lora" / FILE)
  tree, (note,) = merged_tree(kind, bases, file)
  assert_same(tree, expected)
  assert "adapters of text encoders are left out" in note and name in note and "\n" not in note
  alone = written({name: torch.ones(4, 8)}, tmp_path / "alone" / FILE)
  with pytest.raises(ConversionError, match="it holds adapters of text encoders alone"):
    merged_tree(kind, bases, alone)


CONVOLUTIONS = [*MODULES, "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "conv_in"]


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_convolutions_are_merged(layout, bases, tmp_path, measured):
  network, factors = adapted("sd", target_modules=CONVOLUTIONS)
  assert any(a.ndim == 4 and a.shape[2] == 3 for a, _ in factors.values())
  file = LAYOUTS[layout]("sd", network, factors, tmp_path / "lora")
  ours, tree, notes = merged("sd", bases, file)
  measured("ours", relative_error(output(ours), output(network)), 2e-5)
  assert notes == ()
  with pytest.raises(
    ConversionError, match=r"it adapts \d+ convolutions .*convert merge"
  ) as caught:
    as_adapters("sd", bases, file)
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


REFUSED = {
  "lora_magnitude_vector": "it holds DoRA",
  "lora_magnitude_vector.default.weight": "it holds DoRA",
  "dora_scale": "it holds DoRA",
  "lora_mid.weight": "lora_mid",
  "hada_w1_a": "it holds LoHa",
  "lokr_w1": "it holds LoKr",
  "diff_b": "whole differences of weights",
  "lora_B.bias": "it holds LoRA biases",
}


@pytest.mark.parametrize("name, message", REFUSED.items())
def test_other_kinds_of_adapters_are_one_line(name, message, kind, bases, made, tmp_path):
  _, factors, _ = made(kind)
  tensors = spelt(factors, prefix_of(kind) + ".{}", ".lora_A.weight", ".lora_B.weight")
  tensors |= {f"{prefix_of(kind)}.{layer}.{name}": torch.ones(3) for layer in factors}
  file = written(tensors, tmp_path / "lora" / FILE)
  with pytest.raises(ConversionError, match=message) as caught:
    merged_tree(kind, bases, file)
  text = str(caught.value)
  assert "\n" not in text and len(text) < 500 and "more" in text


def test_files_that_contradict_themselves(bases, made, tmp_path):
  _, factors, _ = made("sd")
  plain = spelt(factors, "unet.{}", ".lora_A.weight", ".lora_B.weight")
  layer, (a, b) = next(iter(factors.items()))

  def message(tensors: dict, **changes) -> str:
    file = written(tensors, tmp_path / "lora" / FILE)
    peft_json(tmp_path / "lora", **changes)
    with pytest.raises(ConversionError) as caught:
      merged_tree("sd", bases, file)
    assert "\n" not in str(caught.value)
    return str(caught.value)

  twice = plain | kohya({layer: (a, b)}, "lora_unet_")
  assert "it holds two adapters of one layer" in message(twice)
  other = plain | {f"unet.{layer}.lora_A.other.weight": a, f"unet.{layer}.lora_B.other.weight": b}
  assert "it holds two adapters of one layer" in message(other)
  lacking = {name: x for name, x in plain.items() if name != f"unet.{layer}.lora_B.weight"}
  assert f"it lacks a factor that belongs to unet.{layer}.lora_A.weight" in message(lacking)
  orphan = plain | {"unet.conv_in.alpha": torch.tensor(1.0)}
  assert "it lacks a factor that belongs to unet.conv_in.alpha" in message(orphan)
  foreign = {name.replace("attn", "other"): x for name, x in plain.items()}
  assert "of another model" in message(foreign)
  assert "made with use_dora (adapter_config.json)" in message(plain, use_dora=True)
  assert "made with LOHA (adapter_config.json)" in message(plain, peft_type="LOHA")
  assert "which is no finite number" in message(plain, lora_alpha="five")
  assert "an alpha_pattern that can't be read" in message(plain, alpha_pattern={"to_(": 1})
  assert "an alpha_pattern that can't be read" in message(plain, alpha_pattern=["to_q"])
  endless = plain | {f"unet.{layer}.alpha": torch.tensor(float("inf"))}
  assert "alpha = inf, which is no finite number" in message(endless)
  assert "quantised" in message({name: x.to(torch.int8) for name, x in plain.items()})
  assert "of another model" in message({name: x[:0, :0] for name, x in plain.items()})


# ---- The command


def test_convert_merge_writes_a_pipeline(tmp_path, measured, capsys):
  network, factors = adapted("sd", target_modules=CONVOLUTIONS)
  file = write_diffusers("sd", network, factors, tmp_path / "lora")
  tensors = load_file(file)
  text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
  written(tensors | {text: torch.ones(4, 64)}, tmp_path / "text" / FILE)
  peft_json(tmp_path / "text")
  config = tiny_config(None, model__checkpoint=str(ASSETS / "emoji-sd"))
  folders.merge(config, str(tmp_path / "text"), tmp_path / "out", "pipeline", 1.0)
  said = capsys.readouterr().out
  assert said.count("note: ") == 2 and "adapters of text encoders are left out" in said
  pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
  measured("merged", relative_error(output(pipe.unet), output(network)), 2e-5)
  folders.merge(config, str(file), tmp_path / "half", "denoiser", 0.5)
  half, whole, base = (
    load_file(path)["mid_block.resnets.0.conv1.weight"]
    for path in (
      tmp_path / "half" / "diffusion_pytorch_model.safetensors",
      tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors",
      ASSETS / "emoji-sd" / "unet" / "diffusion_pytorch_model.safetensors",
    )
  )
  torch.testing.assert_close(half - base, (whole - base) / 2, atol=1e-6, rtol=1e-4)
  with pytest.raises(ConversionError, match="--lora=.*nowhere: no such folder"):
    folders.merge(config, str(tmp_path / "nowhere"), tmp_path / "no", "denoiser", 1.0)
  assert not (tmp_path / "no").exists() and jax.process_count() == 1


def test_stacked_blocks_are_merged_as_single_ones(bases, tmp_path):
  """Some layers of the stack have no adapter."""
  factors = {name: x for name, x in black_forest(single=True).items() if "blocks.1." not in name}
  file = written(kohya(factors, "lora_unet_"), tmp_path / "lora" / "x.safetensors")
  tree, _ = merged_tree("flux", bases, file)
  weights.save(tmp_path / "single", bases["flux"][1], tree, dtype="float32")
  flags = [f"model.checkpoint={ASSETS / 'emoji-flux'}", "model.scan_blocks=True"]
  config = config_file.load(f"{ROOT / 'configs' / 'emoji_flow_clip.py'}:tiny", flags)
  folders.merge(config, str(file), tmp_path / "stacked", "denoiser", 1.0)
  single, stacked = (
    load_file(tmp_path / name / "diffusion_pytorch_model.safetensors")
    for name in ("single", "stacked")
  )
  assert single.keys() == stacked.keys()
  for name, value in single.items():
    torch.testing.assert_close(value, stacked[name], atol=1e-6, rtol=0, msg=name)

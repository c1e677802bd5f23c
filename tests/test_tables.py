"""The conversion tables against the inventories of published files.

fixtures/tensors holds them: config.json as published, and name<TAB>shape.
"""

import functools
import gzip
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from dancegrpo_jax.checkpoints import recognition
from dancegrpo_jax.checkpoints.networks import TABLES, abstract_params, class_name
from dancegrpo_jax.checkpoints.weights import specs
from dancegrpo_jax.conversion import names
from dancegrpo_jax.conversion.mapping import Mapping, plan
from dancegrpo_jax.conversion.table import Spec, expected_sources
from dancegrpo_jax.conversion.tables.clip import OPEN_CLIP
from dancegrpo_jax.conversion.tables.language_models import without_last_layers
from dancegrpo_jax.conversion.tables.rows import tree_path
from dancegrpo_jax.errors import ConversionError
from dancegrpo_jax.models import clip, decoder_lm, flux, hunyuan_video, t5
from dancegrpo_jax.pipelines.networks import abstract_hunyuan_video

FIXTURES = Path(__file__).parent / "fixtures" / "tensors"
F32 = np.dtype(np.float32)

# Parameters as counted by diffusers and transformers.
NETWORKS = {
  "sd14-unet": 859_520_964,
  "sd21-unet": 865_910_724,
  "sd14-vae": 83_653_863,
  "sd21-vae": 83_653_863,
  "sd14-text": 123_060_480,
  "sd21-text": 340_387_840,
  "clip-l": 427_616_513,
  "clip-h": 986_109_441,
  "flux-dev": 11_901_408_320,
  "flux-schnell": 11_891_178_560,
  "flux-t5": 4_762_310_656,
  "flux-text": 123_060_480,
  "flux-vae": 83_819_683,
  "hunyuan-video-vae": 246_478_803,
  "hunyuan-video": 12_821_012_544,
  "hunyuan-llama": 7_505_186_816,
}
TODAYS = [name for name in NETWORKS if name != "clip-h"]


def config(name: str) -> dict:
  """The published config.json. Those of diffusers have no common field for the class."""
  return json.loads((FIXTURES / f"{name}.json").read_text())


def inventory(file: str) -> dict[str, Spec]:
  with gzip.open(FIXTURES / f"{file}.tsv.gz", "rt") as lines:
    pairs = [line.rstrip("\n").split("\t") for line in lines]
  return {name: Spec(tuple(json.loads(shape)), F32) for name, shape in pairs}


@functools.cache
def parameters(name: str, scan: bool = False) -> dict[str, Spec]:
  if not scan:
    return specs(abstract_params(config(name)))
  kind = class_name(config(name))
  if kind == "FluxTransformer2DModel":
    network = flux.from_json(config(name), scan_blocks=True)
    arguments = [np.zeros((1, 2, 2, 16)), np.zeros(1)]
    arguments += [
      np.zeros((1, 1, network.joint_attention_dim)),
      np.zeros((1, network.pooled_projection_dim)),
    ]
    arguments = [x.astype(np.float32) for x in arguments + [np.zeros(1)] * network.guidance_embeds]
  elif kind == "HunyuanVideoTransformer3DModel":
    return specs(abstract_hunyuan_video(hunyuan_video.from_json(config(name), scan_blocks=True)))
  elif kind == "LlamaModel":
    network = decoder_lm.from_json(config(name), scan_blocks=True)
    arguments = [np.zeros((1, 1), np.int32)]
  elif kind == "T5EncoderModel":
    network, arguments = t5.from_json(config(name), scan_blocks=True), [np.zeros((1, 1), np.int32)]
  elif kind == "CLIPTextModel":
    network = clip.ClipText.from_json(config(name), scan_layers=True)
    arguments = [np.zeros((1, 1), np.int32)]
  else:
    network = clip.Clip.from_json(config(name), scan_layers=True)
    arguments = [np.zeros((1, 1), np.int32), np.zeros((1, 224, 224, 3), np.float32)]
  return specs(jax.eval_shape(network.init, jax.random.key(0), *arguments)["params"])


def planned(name: str, file: str, scan: bool = False) -> Mapping:
  """The plan, after a check that it uses all parameters and tensors.

  The second name of a tied weight is exempt.
  """
  table = TABLES[class_name(config(name))]
  mapping = plan(table, inventory(file), parameters(name, scan))
  assert set(mapping.by_source) == set(inventory(file)) - set(dict(table.copies)) and all(
    mapping.by_target.values()
  )
  assert all(
    bool(blocks) != (name in mapping.buffers) for name, blocks in mapping.by_source.items()
  )
  return mapping


@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_counts(name):
  assert sum(math.prod(spec.shape) for spec in parameters(name).values()) == NETWORKS[name]


@pytest.mark.parametrize("name", TODAYS)
def test_todays_names_are_mapped(name):
  assert not planned(name, name).buffers


@pytest.mark.parametrize("name", ["flux-text", "flux-t5"])
def test_published_names_of_fluxs_text_encoders_are_mapped(name):
  """Without the position_ids of older files, and with one name of T5's tied embedding."""
  assert not planned(name, f"{name}.published").buffers


@pytest.mark.parametrize(
  "name, file, last",
  [
    (
      "flux-dev",
      "flux-dev",
      "transformer_blocks/attn/add_q_proj/kernel: transformer_blocks.18.attn.add_q_proj.weight",
    ),
    (
      "flux-schnell",
      "flux-schnell",
      "single_transformer_blocks/proj_mlp/bias: single_transformer_blocks.37.proj_mlp.bias",
    ),
    (
      "flux-t5",
      "flux-t5.published",
      "encoder/block/layer_1/DenseReluDense/wi_1/kernel:"
      " encoder.block.23.layer.1.DenseReluDense.wi_1.weight",
    ),
    (
      "hunyuan-video",
      "hunyuan-video",
      "single_transformer_blocks/proj_mlp/bias: single_transformer_blocks.39.proj_mlp.bias",
    ),
    (
      "hunyuan-video",
      "hunyuan-video",
      "context_embedder/token_refiner/refiner_blocks/ff/net_0/proj/kernel:"
      " context_embedder.token_refiner.refiner_blocks.1.ff.net.0.proj.weight",
    ),
    (
      "hunyuan-llama",
      "hunyuan-llama",
      "layers/self_attn/k_proj/kernel: layers.31.self_attn.k_proj.weight",
    ),
  ],
)
def test_stacked_blocks_are_mapped(name, file, last):
  path, tensor = last.split(": ")
  blocks = sorted(
    planned(name, file, scan=True).by_target[path], key=lambda block: block.target_box
  )
  assert blocks[-1].source == tensor and len(blocks) == int(re.search(r"\d+", tensor)[0]) + 1
  assert {
    n: s.shape
    for n, s in expected_sources(TABLES[class_name(config(name))], parameters(name, True)).items()
  } == {n: s.shape for n, s in inventory(file).items()}


def test_either_name_of_t5s_embedding_and_a_whole_t5():
  """Files have the tied matrix with one name, the other, or both.

  The decoder of a full T5 is left out.
  """
  table, tensors, targets = TABLES["T5EncoderModel"], inventory("flux-t5"), parameters("flux-t5")
  shared, copy = "shared.weight", "encoder.embed_tokens.weight"
  assert copy not in plan(table, tensors, targets).sources
  other = {name: spec for name, spec in tensors.items() if name != shared}
  assert [block.source for block in plan(table, other, targets).by_target["shared/embedding"]] == [
    copy
  ]
  whole = tensors | {
    name: tensors[shared] for name in ("decoder.embed_tokens.weight", "lm_head.weight")
  }
  assert plan(table, whole, targets).sources.keys() == tensors.keys() - {copy}
  with pytest.raises(ConversionError, match="shared/embedding .* is not in the checkpoint"):
    plan(
      table, {name: spec for name, spec in tensors.items() if name not in (shared, copy)}, targets
    )


def test_skyreels_is_hunyuan_video_with_more_channels():
  """Only the patch embedding differs; the number of parameters is that of its published file."""
  changed = config("hunyuan-video") | {"in_channels": 32}
  targets = specs(abstract_params(changed))
  assert sum(math.prod(spec.shape) for spec in targets.values()) == 12_821_209_152
  weight = {"x_embedder.proj.weight": Spec((3072, 32, 1, 2, 2), F32)}
  table, tensors = TABLES["HunyuanVideoTransformer3DModel"], inventory("hunyuan-video")
  assert expected_sources(table, targets) == tensors | weight
  with pytest.raises(ConversionError, match=r"x_embedder.proj.weight \[3072, 16, 1, 2, 2\]"):
    plan(table, tensors, targets)


@pytest.mark.parametrize("name", ["flux-dev", "hunyuan-video", "hunyuan-llama"])
def test_files_are_recognised(name):
  """HunyuanVideo has FLUX's names and some more."""
  kind = recognition.kind_of(inventory(name))
  assert kind is not None and kind.title == f"a file of the network {class_name(config(name))}"


@pytest.mark.parametrize(
  "prefix, others",
  [
    ("", ()),
    ("model.", ("lm_head.weight", "model.rotary_emb.inv_freq")),
    ("language_model.model.", ("language_model.lm_head.weight", "vision_tower.conv.weight")),
    ("model.language_model.", ("lm_head.weight", "model.visual.conv.weight")),
  ],
)
def test_llamas_in_larger_files(prefix, others):
  """A model with its head, and one with a vision tower; with all layers, and with 30 of 32."""
  spec = Spec((1,), F32)
  tensors = {prefix + name: each for name, each in inventory("hunyuan-llama").items()}
  tensors |= dict.fromkeys(others, spec)
  table, published = TABLES["LlamaModel"], config("hunyuan-llama")
  bare = {short: tensors[name] for short, name in names.bare(table, tensors).items()}
  assert len(plan(table, bare, parameters("hunyuan-llama")).sources) == 290
  network = decoder_lm.from_json(published, scan_blocks=True, layers=30, final_norm=False)
  arguments = jax.random.key(0), np.zeros((1, 1), np.int32)
  targets = specs(jax.eval_shape(network.init, *arguments)["params"])
  mapping = plan(without_last_layers(table, 30, 32), bare, targets)
  assert len(mapping.sources) == 1 + 30 * 9
  assert sum(math.prod(spec.shape) for spec in targets.values()) == 7_068_958_720
  with pytest.raises(ConversionError, match="layers.30"):
    plan(table, bare, targets)


@pytest.mark.parametrize(
  "name", ["sd14-vae", "sd21-vae", "sd14-text", "sd21-text", "clip-l", "clip-h"]
)
def test_published_names_are_mapped(name):
  buffers = planned(name, f"{name}.published").buffers
  assert len(buffers) == {"text": 1, "vae": 0}.get(name[5:], 2)
  assert all(buffer.endswith("position_ids") for buffer in buffers)


@pytest.mark.parametrize("name", ["sd14-text", "sd21-text", "clip-l", "clip-h"])
def test_stacked_layers_are_mapped(name):
  mapping = planned(name, f"{name}.published", scan=True)
  depth = config(name).get("text_config", config(name))["num_hidden_layers"]
  path = ("text_model/" if name.startswith("clip") else "") + "encoder/layers/mlp/fc1/kernel"
  assert [block.source for block in mapping.by_target[path]] == sorted(
    f"text_model.encoder.layers.{i}.mlp.fc1.weight" for i in range(depth)
  )


@pytest.mark.parametrize("scan", [False, True])
def test_open_clip_names_are_mapped(scan):
  mapping = plan(OPEN_CLIP, inventory("clip-h.open_clip"), parameters("clip-h", scan))
  assert set(mapping.by_source) == set(inventory("clip-h.open_clip")) and all(
    mapping.by_source.values()
  )
  assert len(mapping.by_source["transformer.resblocks.3.attn.in_proj_weight"]) == 3
  assert {
    n: s.shape for n, s in expected_sources(OPEN_CLIP, parameters("clip-h", scan)).items()
  } == {n: s.shape for n, s in inventory("clip-h.open_clip").items()}


@pytest.mark.parametrize(
  "name, file",
  [
    ("sd14-unet", "sd14-unet"),
    ("sd21-unet", "sd21-unet"),
    ("sd14-vae", "sd14-vae"),
    ("sd21-vae", "sd21-vae"),
    ("sd14-text", "sd14-text.published"),
    ("sd21-text", "sd21-text.published"),
    ("clip-l", "clip-l.published"),
    ("flux-dev", "flux-dev"),
    ("flux-schnell", "flux-schnell"),
    ("flux-vae", "flux-vae"),
    ("hunyuan-video-vae", "hunyuan-video-vae"),
    ("flux-t5", "flux-t5.published"),
    ("flux-text", "flux-text.published"),
    ("hunyuan-video", "hunyuan-video"),
    ("hunyuan-llama", "hunyuan-llama"),
  ],
)
def test_names_and_shapes_of_exported_files(name, file):
  """Today's names, with the prefix of the published text encoders.

  All versions of transformers read this prefix.
  """
  wanted = {
    tensor: spec for tensor, spec in inventory(file).items() if not tensor.endswith("position_ids")
  }
  assert expected_sources(TABLES[class_name(config(name))], parameters(name)) == wanted


def test_old_attention_names_of_the_autoencoder():
  mapping = planned("sd14-vae", "sd14-vae.published")
  for old, new in (
    ("query", "to_q"),
    ("key", "to_k"),
    ("value", "to_v"),
    ("proj_attn", "to_out_0"),
  ):
    (block,) = mapping.by_source[f"decoder.mid_block.attentions.0.{old}.weight"]
    assert block.target == f"decoder/mid_block/attentions_0/{new}/kernel"


def test_conv_and_linear_projections_do_not_mix():
  """This is the one difference between the two UNets that a table could hide."""
  with pytest.raises(ConversionError) as caught:
    plan(TABLES["UNet2DConditionModel"], inventory("sd14-unet"), parameters("sd21-unet"))
  assert "down_blocks.0.attentions.0.proj_in.weight [320, 320, 1, 1] does not fit" in str(
    caught.value
  )


def test_paths_follow_the_torch_names():
  assert tree_path("down_blocks.0.resnets.1.conv1") == "down_blocks_0/resnets_1/conv1"
  assert (
    tree_path("transformer_blocks.{k}.attn1.to_out.0") == "transformer_blocks_{k}/attn1/to_out_0"
  )
  assert tree_path("ff.net.0.proj") == "ff/net_0/proj"

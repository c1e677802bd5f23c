"""HunyuanVideo's folders: what is read, imported, exported and inspected, beside diffusers and
transformers.
"""

import inspect
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
import tokenizers
from tiny_checkpoint import (
  LLAMA,
  assert_trees_equal,
  video_config,
  write_hunyuan_video,
)

from dancegrpo_jax.assembly import loading
from dancegrpo_jax.checkpoints import store, weights
from dancegrpo_jax.compilation import inventory
from dancegrpo_jax.convert import __main__ as command
from dancegrpo_jax.convert import bases, folders
from dancegrpo_jax.devices import sharding

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
  return write_hunyuan_video(tmp_path_factory.mktemp("base") / "hunyuan")


def loaded(folder: Path | str, **changes) -> loading.Model:
  """The model of a folder, in float32."""
  config = video_config(folder, **changes)
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    return loading.load(config, loading.build_pipeline(config), {}, mesh)


@pytest.fixture(scope="module")
def expected(base) -> loading.Model:
  return loaded(base)


def check_same(model: loading.Model, expected: loading.Model) -> None:
  for field in ("trainable", "frozen"):
    assert_trees_equal(getattr(expected, field), getattr(model, field))


def tensors(pipe) -> dict[str, torch.Tensor]:
  """Every tensor of a diffusers pipeline, by component and name."""
  return {
    f"{name}.{key}": value
    for name, part in pipe.components.items()
    if isinstance(part, torch.nn.Module)
    for key, value in part.state_dict().items()
  }


def pipeline(folder: Path):
  """The folder in diffusers, with no argument at all."""
  return diffusers.HunyuanVideoPipeline.from_pretrained(folder)


# What today's libraries save


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_saved_by_diffusers(base, expected, tmp_path, shards):
  pipeline(base).save_pretrained(tmp_path, max_shard_size=shards)
  assert (len(list((tmp_path / "transformer").glob("*-of-*"))) > 2) == (shards == "20KB")
  check_same(loaded(tmp_path), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", ["", "half"])
def test_saved_in_half_precision(base, expected, tmp_path, dtype, variant):
  """Values are those of torch's cast, read into float32. A variant is found by its name."""
  torch_dtype = getattr(torch, dtype)
  pipe = diffusers.HunyuanVideoPipeline.from_pretrained(base, dtype=torch_dtype)
  pipe.save_pretrained(tmp_path, variant=variant or None)
  if variant:
    assert list((tmp_path / "vae").glob(f"*.{variant}.safetensors"))
  kernel = loaded(tmp_path, model__variant=variant).trainable["denoiser"]["proj_out"]["kernel"]
  theirs = pipeline(base).transformer.proj_out.weight.to(torch_dtype).float().detach().numpy().T
  np.testing.assert_array_equal(np.asarray(kernel), theirs)


def with_head(base: Path, folder: Path) -> Path:
  """The folder with the language model as a LlamaForCausalLM, as transformers save it."""
  shutil.copytree(base, folder)
  config = json.loads((base / "text_encoder" / "config.json").read_text())
  network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
  network.model.load_state_dict(pipeline(base).text_encoder.state_dict())
  shutil.rmtree(folder / "text_encoder")
  network.save_pretrained(folder / "text_encoder")
  index = json.loads((folder / "model_index.json").read_text())
  index["text_encoder"] = ["transformers", "LlamaForCausalLM"]
  (folder / "model_index.json").write_text(json.dumps(index))
  return folder


def test_a_language_model_with_a_head(base, expected, tmp_path, capsys):
  folder = with_head(base, tmp_path / "head")
  check_same(loaded(folder), expected)
  assert command.main(["inspect", str(folder)]) == 0
  printed = capsys.readouterr().out
  assert f"# {folder}/text_encoder (LlamaForCausalLM): " in printed
  assert "# lm_head.weight: left out" in printed


# Import and inspection


def test_import(base, expected, tmp_path, capsys):
  folders.import_checkpoint(video_config(base), tmp_path / "orbax")
  check_same(loaded(tmp_path / "orbax"), expected)
  assert command.main(["inspect", str(tmp_path / "orbax")]) == 2
  assert (
    f"a folder of `convert import`, whose weights are an Orbax tree; inspect {base}, from which"
    in capsys.readouterr().err
  )


def test_inspect(base, capsys):
  assert command.main(["inspect", str(base)]) == 0
  printed = capsys.readouterr().out
  for place, kind in (
    ("transformer", "HunyuanVideoTransformer3DModel"),
    ("vae", "AutoencoderKLHunyuanVideo"),
    ("text_encoder", "LlamaModel"),
    ("text_encoder_2", "CLIPTextModel"),
  ):
    assert f"# {base}/{place} ({kind}): " in printed
    (file,) = (base / place).glob("*.safetensors")
    assert command.main(["inspect", str(file)]) == 0
    assert f"it looks like a file of the network {kind}" in capsys.readouterr().out


# Export


@pytest.fixture(scope="module")
def workdir(base, tmp_path_factory) -> Path:
  """A run's checkpoint, whose transformer is not that of the base."""
  config = video_config(base, sampler__shift=5.0, evaluation__steps=3)
  place = tmp_path_factory.mktemp("work")
  component = loading.build_pipeline(config).components["denoiser"]
  drawn = weights.draw(component.abstract, seed=1, table=component.table)
  with store.Saver(place / "checkpoints", keep=1) as saver:
    meta = {"config": config.to_dict(), "iteration": 1}
    saver.save(1, {"trainable": {"denoiser": drawn}}, meta)
  return place


def exported(base: Path, workdir: Path, out: Path) -> dict[str, torch.Tensor]:
  """What diffusers load from an export of a run with this base."""
  folders.export(video_config(base), str(workdir), out, "pipeline", "")
  return tensors(pipeline(out))


def check_export(found: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
  """Only the transformer has changed."""
  assert found.keys() == before.keys()
  trained = [name for name in before if name.startswith("transformer.")]
  assert not any(torch.equal(found[name], before[name]) for name in trained if "to_q.w" in name)
  for name in before.keys() - set(trained):
    assert torch.equal(found[name], before[name]), name


def test_export(base, workdir, tmp_path):
  """diffusers load it with no argument; what was not trained is the same, to the bit.

  That includes the last layers of the language model, which are not run here.
  """
  before = tensors(pipeline(base))
  last = f"text_encoder.layers.{LLAMA['num_hidden_layers'] - 1}.mlp.up_proj.weight"
  assert last in before
  check_export(exported(base, workdir, tmp_path / "out"), before)
  names = {file.name for file in (tmp_path / "out" / "tokenizer").iterdir()}
  assert names == {file.name for file in (base / "tokenizer").iterdir()}
  text = "a red cat on a blue background"
  backend = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer" / "tokenizer.json"))
  assert pipeline(tmp_path / "out").tokenizer(text)["input_ids"] == backend.encode(text).ids


def test_export_of_a_language_model_with_a_head(base, workdir, tmp_path):
  folder = with_head(base, tmp_path / "head")
  check_export(exported(folder, workdir, tmp_path / "out"), tensors(pipeline(folder)))


def test_an_export_loads_again(base, expected, workdir, tmp_path):
  folders.export(video_config(base), str(workdir), tmp_path / "out", "pipeline", "")
  model = loaded(tmp_path / "out")
  assert_trees_equal(expected.frozen, model.frozen)


def test_export_with_an_imported_base(base, workdir, tmp_path, capsys):
  """An imported tree lacks the layers that are not run, and a line says so."""
  folders.import_checkpoint(video_config(base), tmp_path / "orbax")
  found = exported(tmp_path / "orbax", workdir, tmp_path / "out")
  printed = capsys.readouterr().out
  assert "note: text_encoder: layers.2.{*}, layers.3.{*}, norm.weight are not in" in printed
  before = tensors(pipeline(base))
  unused = [name for name in before if name.startswith(("text_encoder.layers.3", "text_encoder.n"))]
  unused += [name for name in before if name.startswith("text_encoder.layers.2")]
  left = {name: value for name, value in before.items() if name not in unused}
  check_export({name: found[name] for name in left}, left)


def test_a_transformer_in_a_single_file(base, expected, tmp_path):
  """Its other networks are those of the base."""
  file = shutil.copy(
    next((base / "transformer").glob("*.safetensors")), tmp_path / "mine.safetensors"
  )
  out = tmp_path / "out"
  assert command.main(["import-single", str(file), f"--base={base}", f"--out={out}"]) == 0
  check_same(loaded(out), expected)
  theirs, before = tensors(pipeline(out)), tensors(pipeline(base))
  assert all(torch.equal(theirs[name], before[name]) for name in before)


def test_a_transformer_in_tencents_names(base, tmp_path, capsys):
  """The names of the published mp_rank_00_model_states.pt."""
  from safetensors.numpy import save_file

  file = tmp_path / "tencent.safetensors"
  names = (
    "double_blocks.0.img_attn_qkv.weight",
    "txt_in.individual_token_refiner.blocks.0.self_attn_qkv.weight",
    "single_blocks.0.linear1.weight",
  )
  save_file({name: np.zeros((2, 2), np.float32) for name in names}, file)
  assert command.main(["import-single", str(file), f"--base={base}", f"--out={tmp_path}/o"]) == 2
  assert (
    "it looks like a HunyuanVideo transformer in the names of Tencent; take the folder in"
    in capsys.readouterr().err
  )


# The model card


class Written:
  """Takes the place of diffusers' export_to_video, which needs imageio, and keeps its arguments."""

  def __init__(self):
    self.signature = inspect.signature(diffusers.utils.export_to_video)

  def __call__(self, *args, **kwargs) -> str:
    self.arguments = self.signature.bind(*args, **kwargs).arguments
    return self.arguments["output_video_path"]


def run_card(config, workdir: Path, out: Path, part: str, monkeypatch) -> tuple[str, dict]:
  """The card of an export, and the names that its code defines beside the export and its base."""
  folders.export(config, str(workdir), out, part, "")
  card = (out / "README.md").read_text()
  base = Path(config.model.checkpoint)
  if not (out.parent / base.name).exists():
    os.symlink(base, out.parent / base.name)
  monkeypatch.chdir(out.parent)
  (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
  names: dict = {}
  with warnings.catch_warnings():
    warnings.filterwarnings("error", category=FutureWarning, message=".*dtype.*")
    exec(compile(code, "card", "exec"), names)
  return card, names


@pytest.mark.parametrize("part", ["pipeline", "denoiser"])
def test_the_code_of_the_card(base, workdir, tmp_path, monkeypatch, part):
  written = Written()
  monkeypatch.setattr(diffusers.utils, "export_to_video", written)
  config = video_config(base, model__fps=12.0)
  card, names = run_card(config, workdir, tmp_path / "out", part, monkeypatch)
  assert len(names["video"]) == 9 and names["video"][0].size == (32, 16)
  assert written.arguments == {
    "video_frames": names["video"],
    "output_video_path": "sample.mp4",
    "fps": 12,
  }
  scheduler = names["pipeline"].scheduler
  assert scheduler.config.shift == 5.0 and len(scheduler.timesteps) == 3
  assert names["pipeline"].guidance_scale == config.sampler.embedded_guidance
  assert "9 frames of 16 x 32 pixels, 12 a second" in card
  data = huggingface_hub.ModelCard(card).data
  assert data.pipeline_tag == "text-to-video" and "hunyuan-video" in data.tags
  assert "prompt_template" not in card  # diffusers' default


def test_the_card_of_an_image(base, workdir, tmp_path, monkeypatch):
  """The template for images is no default of diffusers."""
  config = video_config(base, model__frames=1, model__template="image")
  card, names = run_card(config, workdir, tmp_path / "out", "pipeline", monkeypatch)
  assert names["image"].size == (32, 16)
  assert "'crop_start': " in card and 'image.save("sample.png")' in card
  assert huggingface_hub.ModelCard(card).data.pipeline_tag == "text-to-image"


def test_what_is_known_of_the_published_base(base):
  known = bases.base_of(video_config(base), "hunyuanvideo-community/HunyuanVideo")
  assert known.license == "other" and known.license_name == "tencent-hunyuan-community"
  assert known.license_link == "https://huggingface.co/tencent/HunyuanVideo/blob/main/LICENSE"


# Without weights and tokenizers


def test_a_plan_needs_no_tokenizers(base, tmp_path):
  """The template has 95 tokens then, as with the published tokenizer."""
  for file in (*base.glob("*/config.json"), base / "scheduler" / "scheduler_config.json"):
    (tmp_path / file.parent.name).mkdir(exist_ok=True)
    shutil.copy(file, tmp_path / file.parent.name)
  config = inventory.without_weights(video_config(f"random:{tmp_path}"))
  taken = inventory.take(config, sharding.make_mesh(config.mesh), 8, 0)
  (encode,) = (call for call in taken.calls if call.name == "encode")
  _, tokens = encode.arguments
  assert tokens["llama"].shape[1] == 95 + config.model.text_length
  assert tokens["clip"].shape[1] == 77
  assert taken.model.pipeline.latent_shape == (3, 4, 8, 4)

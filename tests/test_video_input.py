"""What a user of video models gets wrong: one line each, with a remedy, before weights are read."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import tokenizers
import transformers
from tiny_checkpoint import PROMPTS, ROOT, VIDEO, overrides, write_flux, write_hunyuan_video

from dancegrpo_jax import main
from dancegrpo_jax.checkpoints import weights
from dancegrpo_jax.data import llama_tokenizer
from dancegrpo_jax.pipelines import templates

TEXTS = [templates.NAMED["video"].filled(prompt) for prompt in (*PROMPTS, "", "  two\nlines ünï ")]


@pytest.fixture(scope="module")
def models(tiny_models, tmp_path_factory) -> dict[str, Path]:
  """A checkpoint of each family."""
  place = tmp_path_factory.mktemp("families")
  return {
    "stable_diffusion": tiny_models.model,
    "flux": write_flux(place / "flux"),
    "hunyuan_video": write_hunyuan_video(place / "video"),
  }


@pytest.fixture
def answer(models, tmp_path, capsys, monkeypatch) -> Callable[..., str]:
  """`(**changes) -> line` of a run that must end with one line and reads no weights.

  `change` is made to a copy of the HunyuanVideo folder; the others are those of the config.
  """

  def unreachable(*_, **__):
    raise AssertionError("weights are read")

  monkeypatch.setattr(weights, "load", unreachable)

  def run(change: Callable[[Path], object] | None = None, **changes) -> str:
    folder = models["hunyuan_video"]
    if change:
      folder = Path(shutil.copytree(folder, tmp_path / "copy"))
      change(folder)
    values = VIDEO | {"model__checkpoint": folder} | changes
    flags = [f"--config.{word}" for word in overrides(None, **values)]
    config = f"--config={ROOT / 'configs' / 'emoji_clip.py'}:tiny"
    assert main.main([config, *flags, f"--workdir={tmp_path / 'work'}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in "".join(lines), lines
    return errors[0].removeprefix("error: ")

  return run


def with_json(file: str, **entries) -> Callable[[Path], object]:
  """A change of a checkpoint: other entries in one of its JSON files."""

  def change(folder: Path) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))

  return change


SETTINGS = {
  "8 frames": ({"model__frames": 8}, "model.frames = 8: must be 4 n + 1; use 5 or 9"),
  "10 frames": ({"model__frames": 10}, "model.frames = 10: must be 4 n + 1; use 9 or 13"),
  "3 frames": ({"model__frames": 3}, "model.frames = 3: must be 4 n + 1; use 1 or 5"),
  "no frames": ({"model__frames": 0}, "model.frames = 0: must be at least 1"),
  "size": (
    {"model__size": (20, 32)},
    "model.size = (20, 32): height and width must be multiples of 8 for this checkpoint",
  ),
  "no frames a second": ({"model__fps": 0.0}, "model.fps = 0.0: must be above 0"),
  "tiling": (
    {"model__decode_tiling": "timee"},
    "model.decode_tiling = 'timee': unknown; one of none, time, diffusers; did you mean 'time'?",
  ),
  "a template without a place": (
    {"model__template": "describe"},
    "model.template = 'describe': unknown; one of video, image, or a text of your own with one {}"
    " where the prompt goes",
  ),
  "a reward of images": (
    {"reward__compressibility__frames": "error"},
    "reward.compressibility.frames = 'error': the reward 'compressibility' scores images, and the"
    " model draws 9 frames; set it to first, middle, all, sheet, or a number of frames",
  ),
  "a reward of more frames": (
    {"reward__compressibility__frames": "12"},
    "reward.compressibility.frames = '12': a video has 9 frames only; set it to at most 9",
  ),
  "a reward of other sizes": (
    {"reward__terms": (("moving_emoji/vq", 1.0),)},
    "reward: the reward 'moving_emoji' judges clips of at least 3 frames of 32 x 32 pixels, and the"
    " model draws [9, 16, 32, 3]; take it out of reward.terms and reward.watch",
  ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(answer, name):
  changes, message = SETTINGS[name]
  assert answer(**changes) == f"config.{message}"


IMAGES = {
  "stable_diffusion": {"sampler__kind": "ddim", "model__frames": 1},
  "flux": {"model__frames": 1},
  "hunyuan_video": {},
}
CLASSES = {
  "stable_diffusion": "StableDiffusionPipeline",
  "flux": "FluxPipeline",
  "hunyuan_video": "HunyuanVideoPipeline",
}


@pytest.mark.parametrize(("family", "found"), itertools.permutations(CLASSES, 2))
def test_a_checkpoint_of_another_family(answer, models, family, found):
  checkpoint = models[found]
  line = answer(model__family=family, model__checkpoint=checkpoint, **IMAGES[family])
  assert line == (
    f"config.model.checkpoint = {str(checkpoint)!r}: is a {CLASSES[found]}, as its model_index.json"
    f" says, and so of the family {found}; set --config.model.family={found}, or name a"
    f" {CLASSES[family]}"
  )


def test_a_pipeline_of_no_family(answer):
  """Where files are missing, the line says what the folder is."""

  def change(folder: Path) -> None:
    with_json("model_index.json", _class_name="WanPipeline")(folder)
    shutil.rmtree(folder / "text_encoder_2")

  line = answer(change)
  assert "the folder lacks text_encoder_2/config.json" in line
  assert "(model_index.json: WanPipeline); accepted is a folder with" in line


@pytest.mark.parametrize("family", ["stable_diffusion", "flux"])
def test_frames_of_a_model_of_images(answer, models, family):
  values = IMAGES[family] | {"model__frames": 9}
  line = answer(model__family=family, model__checkpoint=models[family], **values)
  assert line == f"config.model.frames = 9: {family} draws images; use 1"


def test_image_to_video(answer):
  """The published transformers of image-to-video have twice the channels, and one more."""
  assert answer(with_json("transformer/config.json", in_channels=8)) == (
    "transformer/config.json: in_channels 8 is not the autoencoder's latent_channels 4 but twice as"
    " many: image-to-video is not implemented; take a text-to-video checkpoint"
  )


def test_conditions_on_an_image(answer):
  change = with_json("transformer/config.json", image_condition_type="latent_concat")
  line = answer(change)
  assert "image_condition_type = 'latent_concat' (implemented: None)" in line


# Tokenizers


def changed_tokenizer(change: Callable[[dict], object]) -> Callable[[Path], object]:
  """A change of a checkpoint: of the content of tokenizer.json."""

  def of_folder(folder: Path) -> None:
    file = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))

  return of_folder


def without_chat(content: dict) -> None:
  content["added_tokens"] = [
    token for token in content["added_tokens"] if token["content"] not in llama_tokenizer.CHAT
  ]


def test_a_tokenizer_without_its_marks(answer):
  assert answer(changed_tokenizer(without_chat)) == (
    "tokenizer/tokenizer.json: <|end_header_id|>, <|eot_id|>, <|start_header_id|> of"
    " config.model.template is not among its added tokens; take the tokenizer of the checkpoint's"
    " language model, or another template"
  )


REMEDY = "take the original tokenizer.json of the checkpoint's language model"


def test_a_tokenizer_without_bos(answer):
  line = answer(changed_tokenizer(lambda content: content.update(post_processor=None)))
  assert "tokenizer.json: an empty text becomes the ids [], where a Llama tokenizer gives" in line
  assert line.endswith(REMEDY)


def test_a_tokenizer_that_names_no_bos(answer):
  line = answer(with_json("tokenizer/tokenizer_config.json", bos_token=None))
  assert line.endswith(f"tokenizer.json: tokenizer_config.json names no bos_token; {REMEDY}")


def test_a_tokenizer_of_another_kind(answer, models):
  def change(folder: Path) -> None:
    shutil.copytree(models["flux"] / "tokenizer_2", folder / "tokenizer", dirs_exist_ok=True)

  assert "tokenizer_class = 'T5Tokenizer' is not implemented" in answer(change)


def test_a_truncated_tokenizer(answer):
  line = answer(lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{"))
  assert "tokenizer.json: can't be read (JSONDecodeError" in line and line.endswith(REMEDY)


def named_llama(folder: Path) -> Path:
  """Gives a checkpoint's tokenizer the class that the published folders name."""
  index = json.loads((folder / "model_index.json").read_text())
  index["tokenizer"] = ["transformers", "LlamaTokenizerFast"]
  (folder / "model_index.json").write_text(json.dumps(index))
  with_json("tokenizer/tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")(folder)
  return folder


def test_the_published_class_of_tokenizers(models, tmp_path):
  """The ids are those of the file by the library that wrote it, whatever transformers do."""
  folder = named_llama(Path(shutil.copytree(models["hunyuan_video"], tmp_path / "named")))
  file = folder / "tokenizer" / "tokenizer.json"
  theirs = tokenizers.Tokenizer.from_file(str(file))
  rows = llama_tokenizer.load_llama_tokenizer(str(file.parent))(TEXTS, 512)
  for text, row in zip(TEXTS, rows, strict=True):
    ids = theirs.encode(text).ids
    assert row[: len(ids)].tolist() == ids and (row[len(ids) :] == -1).all()
    assert len(ids) > 90 and len(ids) < 140  # words, not letters


def test_a_tokenizer_that_a_broken_class_has_saved(answer, models, tmp_path):
  """LlamaTokenizerFast of transformers 5 writes a tokenizer.json that drops all spaces.

  A version that doesn't is one whose file is read as any other.
  """
  folder = named_llama(Path(shutil.copytree(models["hunyuan_video"], tmp_path / "named")))
  original = folder / "tokenizer" / "tokenizer.json"
  kind = transformers.LlamaTokenizerFast
  kind.from_pretrained(folder / "tokenizer").save_pretrained(tmp_path / "saved")
  written = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
  if written["pre_tokenizer"] == json.loads(original.read_text())["pre_tokenizer"]:
    pytest.skip("this version of transformers saves it as it was")
  line = answer(
    lambda copy: shutil.copytree(tmp_path / "saved", copy / "tokenizer", dirs_exist_ok=True)
  )
  assert "tokenizer.json: drops spaces: 'a b' and 'ab' become the same ids" in line
  assert line.endswith(REMEDY)


# Files of the checkpoint


@pytest.mark.parametrize(
  "file",
  [
    *(f"{place}/config.json" for place in ("transformer", "vae", "text_encoder", "text_encoder_2")),
    "scheduler/scheduler_config.json",
  ],
)
def test_unknown_keys(answer, file):
  assert "surprise = [1] (an unknown key)" in answer(with_json(file, surprise=[1]))


def test_the_classes_are_those_of_diffusers():
  for name in CLASSES.values():
    assert issubclass(getattr(diffusers, name), diffusers.DiffusionPipeline)

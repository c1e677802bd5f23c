"""Clips through the commands, with a tiny HunyuanVideo: training with rewards of images, of whole
clips and of a server; resuming; cached embeddings; samples and evaluations; a selection; LoRA.

test_video_anywhere.py has the promises on several meshes.
"""

import io
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from PIL import Image
from test_remote import process
from tiny_checkpoint import (
  ROOT,
  assert_trees_equal,
  moves_between_devices,
  overrides,
  relative_error,
  write_hunyuan_video,
)

from dancegrpo_jax import evaluate, main, programs, sample
from dancegrpo_jax.assembly import loading, sampling
from dancegrpo_jax.checkpoints import chosen, components, store
from dancegrpo_jax.compilation import calls
from dancegrpo_jax.convert import __main__ as convert
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.report import clips, metrics
from dancegrpo_jax.settings import config_file

CONFIG = f"--config={ROOT / 'configs' / 'emoji_clip.py'}:tiny"
FRAMES, SIZE, FPS = 9, 16, 12.0
# Of these some fill all 8 tokens, and others don't.
TEXTS = (
  "cat",
  "a red boat",
  "a red boat a blue house",
  "a red cat a blue boat a red house",
  "blue apple",
  "house",
  "a blue cat",
  "a blue apple a red apple",
)
FUNCTION = '''
SEEN = []

def brightening(pixels, prompts, metadata):
  """How much brighter the last frame of a clip is than its first."""
  SEEN.append(pixels.shape)
  assert pixels.dtype == "float32" and pixels.min() >= 0 and pixels.max() <= 1
  assert len(prompts) == len(metadata) == len(pixels)
  return pixels[:, -1].mean((1, 2, 3)) - pixels[:, 0].mean((1, 2, 3))
'''
KINDS = """
import numpy as np
from dancegrpo_jax.rewards.base import Reward, RewardKind

def on_host(name, section, files, networks):
  def score(media, examples):
    return {name: np.full(len(examples), media.fps, np.float32)}
  return Reward(name=name, kind="host", terms=(name,), score=score)

def on_devices(name, section, files, networks):
  def score(params, media, features):
    return {name: features + media.fps}
  return Reward(
    name=name,
    kind="device",
    terms=(name,),
    score=score,
    prepare=lambda examples: np.zeros(len(examples), np.float32),
    features=lambda params, prepared: prepared,
  )

HOST = RewardKind(build=on_host)
DEVICE = RewardKind(build=on_devices)
"""
BRIGHTENING = "clip_function:brightening"
HOST_FPS, DEVICE_FPS = "clip_kinds:HOST", "clip_kinds:DEVICE"
LORA = {
  "lora__rank": 4,
  "lora__alpha": 8.0,
  "lora__targets": r".*attn/(to_[qkv]|to_out_0|add_[qkv]_proj|to_add_out)/kernel",
}


class Setting(NamedTuple):
  """Where the models, prompts and rewards are, and the fields of a run."""

  root: Path
  fields: dict


@pytest.fixture(scope="module", autouse=True)
def quick_to_compile():
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def setting(tmp_path_factory, program_cache):
  root = tmp_path_factory.mktemp("video_run")
  (root / "clip_function.py").write_text(FUNCTION)
  (root / "clip_kinds.py").write_text(KINDS)
  (root / "texts.txt").write_text("\n".join(TEXTS) + "\n")
  fields = {
    "model__family": "hunyuan_video",
    "model__checkpoint": write_hunyuan_video(root / "hunyuan"),
    "model__size": (SIZE, SIZE),
    "model__frames": FRAMES,
    "model__fps": FPS,
    "model__text_length": 8,
    "sampler__kind": "flow",
    "sampler__steps": 3,
    "sampler__shift": 0.0,
    "sampler__noise_level": 0.7,
    "sampler__embedded_guidance": 6.0,
    "data__prompts": root / "texts.txt",
    "data__held_out": "",
    "data__prompts_per_iteration": len(TEXTS),
    "iterations": 2,
    "rollout__chunk": 8,
    "optimizer__learning_rate": 1e-3,
    "ema__decay": 0.5,
    "evaluation__every": 2,
    "evaluation__samples": 1,
    "checkpoint__every": 1,
    "checkpoint__keep": 2,
    "reward__terms": (("compressibility", 1.0), (BRIGHTENING, 1.0)),
    "reward__compressibility__frames": "all",
    "reward__watch": f"{HOST_FPS},{DEVICE_FPS}",
    "logging__compilation_cache": program_cache,
  }
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(root)
    yield Setting(root, fields)


def words(setting: Setting, **changes) -> list[str]:
  return overrides(None, **setting.fields | changes)


def config_of(setting: Setting, **changes) -> ConfigDict:
  return config_file.load(CONFIG.removeprefix("--config="), words(setting, **changes))


def flags(setting: Setting, **changes) -> list[str]:
  return [CONFIG, *(f"--config.{word}" for word in words(setting, **changes))]


def train(setting: Setting, workdir: Path, **changes) -> int:
  """The command's exit code."""
  return main.main([*flags(setting, **changes), f"--workdir={workdir}"])


@pytest.fixture(scope="module")
def straight(setting) -> Path:
  """The workdir of a run of two iterations."""
  assert train(setting, setting.root / "straight") == 0
  return setting.root / "straight"


def computed(workdir: Path) -> list[dict]:
  """The metrics without those of the clock."""
  timed = ("time/", "samples_per_second")
  return [
    {key: value for key, value in row.items() if not key.startswith(timed)}
    for row in metrics.read(workdir)
  ]


@pytest.fixture(scope="module")
def saved(setting):
  """`workdir -> fields` of a run's last checkpoint, on the host."""
  config = config_of(setting)
  mesh = sharding.make_mesh(config.mesh)
  outline = loading.outline(config, loading.build_pipeline(config), {}, mesh)
  abstract = loading.abstract_state(config, outline, mesh, len(TEXTS))
  return lambda workdir: jax.device_get(
    store.restore(store.folder_of(workdir), abstract).state._asdict()
  )


def test_rewards_get_whole_clips_and_their_fps(straight):
  import clip_function

  assert {shape[1:] for shape in clip_function.SEEN} == {(FRAMES, SIZE, SIZE, 3)}
  rows = metrics.read(straight)
  assert len(rows) == 2
  for row in rows:
    assert row["reward/failed"] == row["reward/compressibility/failed"] == 0
    assert row["reward/compressibility/std"] > 0 and row[f"reward/{BRIGHTENING}/std"] > 0
    for name in (HOST_FPS, DEVICE_FPS):  # watched
      assert row[f"reward/{name}/min"] == row[f"reward/{name}/max"] == FPS
    assert row["ratio/min"] == row["ratio/max"] == 1 and row["ratio/drift_max"] == 0
    assert row["grad_norm"] > 0
  assert rows[-1][f"evaluation/{HOST_FPS}"] == rows[-1][f"evaluation/{DEVICE_FPS}"] == FPS


def test_what_a_run_shows_is_clips(straight):
  """Of the evaluations, and the best and worst samples, which the page plays."""
  files = sorted((straight / "samples").rglob("*.webp"))
  assert len(files) >= 2 * 2 + 2 and not list((straight / "samples").rglob("*.png"))
  for file in files:
    frames, fps = clips.read(file)
    assert frames.shape == (FRAMES, SIZE, SIZE, 3) and fps == FPS
    assert frames.std() > 1
  page = (straight / "report.html").read_text()
  assert 'class="moving' in page and "data:image/webp" in page


def test_resumed_equals_straight_bit_for_bit(setting, straight, saved, tmp_path):
  assert train(setting, tmp_path / "run", iterations=1) == 0
  half = saved(tmp_path / "run")
  assert train(setting, tmp_path / "run") == 0
  whole = saved(straight)
  assert_trees_equal(saved(tmp_path / "run"), whole)
  assert relative_error(half["trainable"], whole["trainable"]) > 1e-6
  for ours, theirs in zip(computed(tmp_path / "run"), computed(straight), strict=True):
    # The first part has evaluated after its last iteration, too.
    assert theirs.items() <= ours.items()


def test_cached_embeddings_change_nothing(setting, straight, saved, tmp_path, capsys):
  """Each text's number of tokens, an int32 without axes, is among them."""
  workdir = tmp_path / "run"
  assert train(setting, workdir, data__cache_embeddings=True) == 0
  assert f"{len(TEXTS)} of {len(TEXTS)} texts encoded" in capsys.readouterr().out
  assert_trees_equal(saved(workdir), saved(straight))
  for ours, theirs in zip(computed(workdir), computed(straight), strict=True):
    # Evaluations encode in batches of another size.
    shown = {name for name in theirs if name.startswith("evaluation/")}
    np.testing.assert_allclose(*([row[name] for name in shown] for row in (ours, theirs)), 1e-5)
    assert all(ours[name] == theirs[name] for name in set(theirs) - shown)


def test_samples_are_files_that_play(straight, tmp_path):
  out = tmp_path / "out"
  prompts = [f"--prompt={text}" for text in ("a red boat", "house")]
  assert sample.main([f"--checkpoint={straight}", *prompts, f"--out={out}", "--samples=3"]) == 0
  rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
  assert [row["file"] for row in rows] == [f"0{p}_0{s}.webp" for p in (0, 1) for s in (0, 1, 2)]
  seen = []
  for row in rows:
    frames, fps = clips.read(out / row["file"])
    assert frames.shape == (FRAMES, SIZE, SIZE, 3) and fps == FPS
    seen.append(frames.astype(np.float32))
    with Image.open(out / row["file"]) as file:
      file.load()
      assert file.is_animated and file.info["duration"] == round(1000 / FPS)
  distances = [np.abs(a - b).mean() for i, a in enumerate(seen) for b in seen[:i]]
  assert min(distances) > 1
  assert (out / "grid.png").is_file()


def jpeg_kb(image: np.ndarray, quality: int) -> float:
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
  return len(buffer.getvalue()) / 1000


def test_an_evaluation_keeps_clips_and_scores(setting, straight, tmp_path):
  quality = config_of(setting).reward.compressibility.quality
  file = tmp_path / "texts.txt"
  file.write_text("a red cat\nhouse\n")
  out = tmp_path / "scores.json"
  assert evaluate.main([f"--checkpoint={straight}", f"--prompts={file}", f"--out={out}"]) == 0
  found = json.loads(out.read_text())
  assert set(found["results"]["texts"]) == {"compressibility", BRIGHTENING, HOST_FPS, DEVICE_FPS}
  for kind in ("base", "checkpoint"):
    rows = found["samples"]["texts"][kind]
    assert [row["prompt"] for row in rows] == ["a red cat", "house"]
    for row in rows:
      frames, fps = clips.read(tmp_path / row["file"])
      assert fps == row[HOST_FPS] == row[DEVICE_FPS] == FPS
      change = (frames[-1].mean() - frames[0].mean()) / 255
      assert row[BRIGHTENING] == pytest.approx(change, abs=2e-3)
      sizes = [jpeg_kb(frame, quality) for frame in frames]
      assert row["compressibility"] == pytest.approx(-np.mean(sizes), rel=1e-3)
  assert found["results"]["texts"][BRIGHTENING]["difference"] != 0


# A server


def test_a_server_gets_clips(setting, tmp_path):
  """The function behind the server gives what it gives in this process, but for 8 bits."""
  server = [str(ROOT / "benchmarks" / "reward_server.py"), BRIGHTENING, "--port=0"]
  changes = {
    "iterations": 1,
    "evaluation__every": 0,
    "reward__terms": (("remote", 1.0),),
    "reward__watch": BRIGHTENING,
    "reward__remote__format": "npz",
  }
  with process(*server, cwd=setting.root) as (url, _):
    assert train(setting, tmp_path / "run", **changes, reward__remote__url=url) == 0
  (row,) = metrics.read(tmp_path / "run")
  assert row["reward/failed"] == 0 and row["reward/std"] > 1e-2
  for name in ("mean", "min", "max", "std"):
    assert row[f"reward/{name}"] == pytest.approx(row[f"reward/{BRIGHTENING}/{name}"], abs=2e-3)


def test_a_server_gets_no_clips_as_png(setting, tmp_path, capsys):
  """That is said before anything is sent: there is no server here."""
  changes = {"reward__terms": (("remote", 1.0),), "reward__remote__format": "png"}
  assert train(setting, tmp_path / "run", **changes) == 2
  errors = capsys.readouterr().err.splitlines()
  assert [line for line in errors if line.startswith("error: ")] == [
    "error: config.reward.remote.format = 'png': sends images, and the model draws 9 frames; set it"
    " to npz"
  ]


# A selection


BEST = {"advantage__best_of": 2, "evaluation__every": 0, "iterations": 1}


@pytest.mark.slow
def test_the_best_and_worst_clips_are_trained_on(setting, tmp_path):
  assert train(setting, tmp_path / "run", **BEST) == 0
  (row,) = metrics.read(tmp_path / "run")
  assert row["grad_norm"] > 0 and row["ratio/min"] == row["ratio/max"] == 1


def test_no_device_fetches_a_clip_of_another_one(setting):
  """Where all of a group lie on one device, the program that selects and shuffles sends nothing
  that is as large as a clip's latents.
  """
  config = config_of(setting, **BEST)
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    pipeline = loading.build_pipeline(config)
    outline = loading.outline(config, pipeline, {}, mesh)
    state = loading.abstract_state(config, outline, mesh, len(TEXTS))
    places = jax.tree.map(lambda x: x.sharding, state)
    jitted = programs.build(config, pipeline, {}, mesh, places)
    listed = calls.of_run(config, outline, state, jitted, len(TEXTS), 0).listed
    (deal,) = [call for call in listed if call.name == "update deal"]
    text = deal.program.lower(*deal.arguments).compile().as_text()
  sizes = [int(np.prod(shape)) for shape in moves_between_devices(text)]
  assert not [size for size in sizes if size >= np.prod(pipeline.latent_shape)]


def test_clips_of_a_group_on_several_devices_are_refused(setting, tmp_path, capsys):
  changes = {"advantage__best_of": 2, "data__prompts_per_iteration": 4}
  assert train(setting, tmp_path / "run", **changes) == 2
  (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
  assert line.startswith(
    "error: config.data.prompts_per_iteration = 4: must be a multiple of data x fsdp = 8"
  )
  assert "use 8, or advantage.best_of = 0" in line


# LoRA


def test_adapters_are_trained_exported_and_loaded_again(setting, tmp_path):
  """tests/parity/test_lora_files.py loads such a file in diffusers."""
  workdir, out = tmp_path / "run", tmp_path / "lora"
  changes = LORA | {"iterations": 1, "evaluation__every": 0, "ema__decay": 0.0}
  assert train(setting, workdir, **changes) == 0
  (row,) = metrics.read(workdir)
  assert row["grad_norm"] > 0 and row["ratio/min"] == row["ratio/max"] == 1
  argv = ["export", f"--checkpoint={workdir}", f"--out={out}", "--part=lora"]
  assert convert.main(argv) == 0

  config = config_of(setting, **changes, lora__checkpoint=out)
  mesh = sharding.make_mesh(config.mesh)
  pipeline = loading.build_pipeline(config)
  places = loading.shardings_of(config, pipeline, mesh)["lora"]
  loaded = loading.load_adapters(config, pipeline, places)
  abstract = {"lora": components.placed(pipeline.adapters, places)}
  trained = sampling.restore_weights(chosen.find(str(workdir)), abstract, "")["lora"]
  assert relative_error(loaded, trained) < 1e-6
  layers = flatten_dict(trained, sep="/")
  # Attention of the double block, the single block and the refiner's, with two factors each.
  assert len(layers) == 2 * (8 + 3 + 4)
  assert all(np.abs(layer).max() > 0 for layer in layers.values())

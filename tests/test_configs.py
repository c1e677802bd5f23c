"""Every config and preset loads, is locked, and is valid.

Some tiny ones of Stable Diffusion and FLUX run from end to end.
"""

import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dancegrpo_jax import train
from dancegrpo_jax.assembly import reward_builders
from dancegrpo_jax.data.prompts import read_prompts
from dancegrpo_jax.devices import sharding
from dancegrpo_jax.models import clip, flux, t5
from dancegrpo_jax.models.lora import Lora, abstract
from dancegrpo_jax.settings import checks, config_file, geometry, stored_config

ROOT = Path(__file__).parent.parent
FILES = (ROOT / "configs").glob("*.py")
FAMILIES = ("emoji_clip", "emoji_flow", "emoji_video_clip", "sd_", "flux_", "hunyuan_")
RUNS = sorted(file.stem for file in FILES if file.stem.startswith(FAMILIES))


def presets(name: str) -> tuple[str, ...]:
  return config_file._import(str(ROOT / "configs" / f"{name}.py")).PRESETS


def load(name: str, preset: str = ""):
  return config_file.load(str(ROOT / "configs" / f"{name}.py") + (f":{preset}" if preset else ""))


CASES = [(name, preset) for name in RUNS for preset in presets(name)]


def test_all_are_there():
  wanted = {"sd_clip", "sd_hps", "sd_pick", "sd_hps_clip", "sd_aesthetic", "sd_compressibility"}
  assert wanted <= set(RUNS) and len(CASES) >= 4 * 6 + 3 + 2 + 3 * 4 + 4
  assert {"emoji_clip", "emoji_flow_clip", "emoji_video_clip"} <= set(RUNS)
  assert {"flux_hps", "flux_hps_8gpu", "flux_hps_lora", "flux_hps_clip", "flux_pick"} <= set(RUNS)
  assert {"hunyuan_hps", "hunyuan_videoalign"} <= set(RUNS)
  # Small configs run anywhere, and one of videos needs more than eight cards.
  for name in set(RUNS) - {"hunyuan_videoalign"}:
    assert name.startswith("emoji") or {"1gpu", "8gpu"} & set(presets(name)), name


@pytest.mark.parametrize("name, preset", CASES)
def test_loads_locks_and_validates(name, preset):
  config = load(name, preset)
  wanted = {"flux_hps_8gpu": "flux_hps_8gpu_ema"}.get(name, name)
  if preset and (name, preset) != ("flux_hps_8gpu", "8gpu"):
    wanted += f"_{preset}"
  assert config.is_locked and config.name == wanted
  assert stored_config.from_json(stored_config.to_json(config)) == config
  examples = len(read_prompts(str(ROOT / config.data.prompts)))
  checks.validate(config, num_devices=1, num_examples=examples)
  if preset != "tiny" and name[:3] != "emo":
    checks.validate(config, num_devices=8, num_examples=examples)
  if name in ("flux_hps", "flux_hps_clip", "flux_pick"):
    checks.validate(config, num_devices=16 if not preset else 8, num_examples=examples)


def test_two_runs_have_one_name_only_where_they_are_the_same():
  """The default workdir has the name of the run."""
  found = {}
  for name, preset in CASES:
    config = load(name, preset)
    assert found.setdefault(config.name, config) == config, (name, preset)


def test_the_recipe_is_the_published_one():
  """Section 2 of DanceGRPO's recipe table for SD v1.4.

  The paper's preset differs in two numbers only.
  """
  config = load("sd_hps")
  assert (config.sampler.steps, config.sampler.guidance_scale, config.sampler.noise_level) == (
    50,
    5.0,
    1.0,
  )
  assert config.data.prompts_per_iteration * config.rollout.samples_per_prompt == 32 * 16
  assert geometry.of(config).trained_steps == 49
  o = config.optimizer
  assert (o.updates_per_iteration, o.learning_rate, o.b1, o.b2, o.eps, o.weight_decay) == (
    2,
    1e-5,
    0.9,
    0.999,
    1e-8,
    1e-4,
  )
  assert (
    o.max_grad_norm,
    config.objective.clip_range,
    config.advantage.clamp,
    config.iterations,
  ) == (1.0, 1e-4, 5.0, 300)
  paper = stored_config.flatten(load("sd_hps", "paper"))
  differs = {key for key, value in stored_config.flatten(config).items() if paper[key] != value}
  assert differs == {"name", "optimizer.updates_per_iteration", "objective.timesteps"}
  assert (
    paper["objective.timestep_fraction"] == 0.6 and paper["optimizer.updates_per_iteration"] == 1
  )
  small = stored_config.flatten(load("sd_hps", "1gpu"))
  changed = {key for key, value in stored_config.flatten(config).items() if small[key] != value} - {
    "name"
  }
  # Fields that may change on resuming: they give the same result by another way.
  assert all(any(key.startswith(field) for field in stored_config.RESUMABLE) for key in changed)


def test_flux_recipes_are_the_published_ones():
  """Section 2 of DanceGRPO's recipe table for FLUX, with 16 GPUs, 8 GPUs, and LoRA."""
  wide, eight, adapters = (load(name) for name in ("flux_hps", "flux_hps_8gpu", "flux_hps_lora"))
  for config, trained, updates in ((wide, 9, 3), (eight, 9, 2), (adapters, 6, 2)):
    s, o = config.sampler, config.optimizer
    assert (s.kind, s.noise_level, s.shift, s.guidance_scale, s.embedded_guidance) == (
      "dance",
      0.3,
      3.0,
      1.0,
      3.5,
    )
    assert (
      config.data.prompts_per_iteration * config.rollout.samples_per_prompt == 16 * 12
      and config.model.size == (720, 720)
    )
    assert geometry.of(config).trained_steps == trained
    assert (o.updates_per_iteration, o.b1, o.b2, o.eps, o.weight_decay) == (
      updates,
      0.9,
      0.999,
      1e-8,
      1e-4,
    )
    assert (config.objective.clip_range, config.advantage.clamp, config.iterations) == (
      1e-4,
      5.0,
      300,
    )
  for name in ("flux_hps", "flux_hps_clip", "flux_pick", "flux_hps_8gpu", "flux_hps_lora"):
    preset = stored_config.flatten(load(name, "1gpu" if name == "flux_hps_lora" else "8gpu"))
    changed = {
      key for key, value in stored_config.flatten(load(name)).items() if preset[key] != value
    } - {"name"}
    assert all(
      any(key.startswith(field) for field in stored_config.RESUMABLE) for key in changed
    ), changed
  numbers = [
    (c.sampler.steps, c.optimizer.max_grad_norm, c.optimizer.learning_rate, c.ema.decay)
    for c in (wide, eight, adapters)
  ]
  assert numbers == [(16, 1.0, 1e-5, 0.0), (16, 0.01, 1e-5, 0.995), (12, 1.0, 3e-4, 0.0)]
  assert (adapters.lora.rank, adapters.lora.alpha, wide.lora.rank, eight.lora.rank) == (
    128,
    256.0,
    0,
    0,
  )


def published(name: str, module, **options):
  """The abstract parameters of a published network with stacked blocks."""
  values = json.loads((ROOT / "tests" / "fixtures" / "tensors" / f"{name}.json").read_text())
  network = getattr(module, "ClipText", module).from_json(values, **options)
  if module in (t5, clip):
    arguments = (jnp.zeros((1, 1), jnp.int32),)
  else:
    arguments = (
      jnp.zeros((1, 2, 2, 16)),
      jnp.zeros(1),
      jnp.zeros((1, 1, 4096)),
      jnp.zeros((1, 768)),
      jnp.zeros(1),
    )
  return jax.eval_shape(network.init, jax.random.key(0), *arguments)["params"]


def test_flux_fits_its_meshes():
  """Each of 8 devices holds an eighth of the parameters and at most 3 % of them more.

  This is checked on the published shapes of the denoiser and of T5.
  """
  stacked = {"scan_blocks": True}
  files = {
    "denoiser": ("flux-dev", flux, stacked),
    "text_encoder_2": ("flux-t5", t5, stacked),
    "text_encoder": ("flux-text", clip, {}),
  }
  trees = {
    key: published(name, module, **options) for key, (name, module, options) in files.items()
  }
  config = load("flux_hps")
  shardings = sharding.infer_shardings(trees, config.mesh.rules, sharding.make_mesh(config.mesh))
  for name, tree in trees.items():
    pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(shardings[name])))
    total = sum(x.size for x, _ in pairs)
    held = sum(math.prod(sharding.shard_shape(x.shape)) for x, sharding in pairs)
    print(f"{name}: {total / 1e9:.3f} B parameters, {held / 1e9:.3f} B on a device of 8")
    # CLIP's token table is not split.
    assert held < total * (1 / 8 + 0.03) or name == "text_encoder"
    assert all(
      x.shape[-2] % 16 == 0 or x.shape[-1] % 16 == 0
      for x, sharding in pairs
      if not sharding.is_fully_replicated
    )


def test_flux_s_adapters_are_those_of_the_header():
  lora = load("flux_hps_lora").lora
  tree = abstract(
    published("flux-dev", flux, scan_blocks=True), Lora(lora.rank, lora.alpha, lora.targets)
  )
  layers = [x.shape[0] for x in jax.tree.leaves(tree)]
  assert sum(layers) == 2 * 190 and sum(x.size for x in jax.tree.leaves(tree)) == 149_422_080
  double = tree["transformer_blocks"]["attn"]
  assert set(double) == {"to_q", "to_k", "to_v", "to_out_0"} and set(
    tree["single_transformer_blocks"]["attn"]
  ) < set(double)
  assert double["to_q"]["a"].shape == (19, 3072, 128)


@pytest.mark.parametrize(
  "name",
  ["emoji_flow_clip", "emoji_video_clip", "sd_compressibility", "flux_hps_8gpu", "flux_hps_lora"]
  + ["hunyuan_hps"],
)
def test_tiny_runs(name, tmp_path, monkeypatch, program_cache):
  monkeypatch.chdir(ROOT)
  config = load(name, "tiny")
  with config.unlocked():
    config.iterations = 2
    config.logging.update(compilation_cache=str(program_cache), tensorboard=False)
  train.run(config, tmp_path)
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert len(rows) == 2 and all(
    np.isfinite(row["reward/mean"]) and row["reward/failed"] == 0 for row in rows
  )
  assert all(row["optimizer/skipped_total"] == 0 for row in rows) and rows[0]["reward/std"] > 0


@pytest.mark.parametrize("name", RUNS)
def test_tiny_rewards_are_found(name, monkeypatch):
  """All rewards of the tiny presets are built from files in the repository."""
  monkeypatch.chdir(ROOT)
  config = load(name, "tiny")
  terms = [*(term for term, _ in config.reward.terms), *config.reward.watch]
  assert set(reward_builders.build_rewards(config)) == {term.split("/")[0] for term in terms}


@pytest.mark.parametrize("name, words", [("general", range(5, 41)), ("video", range(6, 46))])
def test_the_prompts_of_a_list(name, words):
  """400 and 100 different prompts; no subject of a held-out prompt occurs in the others."""
  folder = ROOT / "assets" / "prompts"
  prompts, held_out = (read_prompts(str(folder / f"{name}{end}.txt")) for end in ("", "_held_out"))
  assert (len(prompts), len(held_out)) == (400, 100)
  assert len({e.prompt for e in (*prompts, *held_out)}) == 500
  assert all(len(e.prompt.split()) in words for e in (*prompts, *held_out))
  lines = (folder / f"{name}_held_out.txt").read_text().splitlines()
  subjects = [
    subject
    for line in lines
    if line.startswith("# subjects: ")
    for subject in line[12:].split(", ")
  ]
  text = "\n".join(e.prompt for e in prompts).lower()
  for subject, example in zip(subjects, held_out, strict=True):
    assert re.search(rf"\b{subject}", example.prompt), (subject, example.prompt)
    assert not re.search(rf"\b{subject.removesuffix('y')}(y|ies|s|es)?\b", text), subject


# Words in -ing that name no motion, and words without it that do.
STILL = """
  being beginning building ceiling clearing during dumpling evening everything gleaming glistening
  glowing hatchling holding keeping lighting lightning looking lying morning nothing painting
  pausing railing resting ring setting sewing shining sitting sleeping smiling sparkling spring
  standing steaming stopping string touching waiting watching wearing wing
"""
MOTION = """
  banks billows bounds circles curls dolly drops ducks flows fold hovers kicks lands lay moves pan
  races rises roll sails serves shuffles slips spirals streaks swells tips tumbles turn turns
  unfolds whirl
"""


def names_a_motion(prompt: str) -> bool:
  words = set(re.findall("[a-z]+", prompt)) - set(STILL.split())
  return any(word.endswith("ing") for word in words) or not words.isdisjoint(MOTION.split())


def test_the_prompts_for_videos():
  """Each names a motion, as more than 200 of the 500 for images do not; the files share no line."""
  folder = ROOT / "assets" / "prompts"
  videos, images = (
    [e.prompt for end in ("", "_held_out") for e in read_prompts(str(folder / f"{name}{end}.txt"))]
    for name in ("video", "general")
  )
  assert [prompt for prompt in videos if not names_a_motion(prompt)] == []
  assert sum(not names_a_motion(prompt) for prompt in images) > 200
  assert not set(videos) & set(images)
  assert [p for p in videos if not re.fullmatch(r"[a-z][\x20-\x7e]*[a-z0-9]", p)] == []

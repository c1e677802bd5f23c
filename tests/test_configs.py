"""Every config and preset loads, is locked and validates; the tiny ones of Stable Diffusion run from end to end."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dancegrpo_jax import scoring, train
from dancegrpo_jax.data.prompts import read_prompts
from dancegrpo_jax.rl import timesteps
from dancegrpo_jax.runtime import config as configs
from dancegrpo_jax.runtime import validation

ROOT = Path(__file__).parent.parent
RUNS = sorted(file.stem for file in (ROOT / "configs").glob("*.py") if file.stem.startswith(("emoji_clip", "sd_")))


def presets(name: str) -> tuple[str, ...]:
  return configs._import(str(ROOT / "configs" / f"{name}.py")).PRESETS


def load(name: str, preset: str = ""):
  return configs.load(str(ROOT / "configs" / f"{name}.py") + (f":{preset}" if preset else ""))


CASES = [(name, preset) for name in RUNS for preset in presets(name)]


def test_the_six_are_there():
  wanted = {"sd_clip", "sd_hps", "sd_pick", "sd_hps_clip", "sd_aesthetic", "sd_compressibility"}
  assert wanted <= set(RUNS) and len(CASES) >= 4 * 6 + 3


@pytest.mark.parametrize("name, preset", CASES)
def test_loads_locks_and_validates(name, preset):
  config = load(name, preset)
  assert config.is_locked and config.name == name + (f"_{preset}" if preset else "")
  assert configs.from_json(configs.to_json(config)) == config
  examples = len(read_prompts(str(ROOT / config.data.prompts)))
  configs.validate(config, num_devices=1, num_examples=examples)
  if preset != "tiny" and name[:3] == "sd_":
    configs.validate(config, num_devices=8, num_examples=examples)


def test_the_recipe_is_the_published_one():
  """Section 2 of DanceGRPO's recipe table for SD v1.4; the paper's preset differs in two numbers alone."""
  config = load("sd_hps")
  assert (config.sampler.steps, config.sampler.guidance_scale, config.sampler.noise_level) == (50, 5.0, 1.0)
  assert config.data.prompts_per_iteration * config.rollout.samples_per_prompt == 32 * 16
  assert timesteps.count(config.objective.timesteps, config.objective.timestep_fraction, validation.policy_steps(config)) == 49
  o = config.optimizer
  assert (o.updates_per_iteration, o.learning_rate, o.b1, o.b2, o.eps, o.weight_decay) == (2, 1e-5, 0.9, 0.999, 1e-8, 1e-4)
  assert (o.max_grad_norm, config.objective.clip_range, config.advantage.clamp, config.iterations) == (1.0, 1e-4, 5.0, 300)
  paper = configs.flatten(load("sd_hps", "paper"))
  differs = {key for key, value in configs.flatten(config).items() if paper[key] != value}
  assert differs == {"name", "optimizer.updates_per_iteration", "objective.timesteps"}
  assert paper["objective.timestep_fraction"] == 0.6 and paper["optimizer.updates_per_iteration"] == 1
  small = configs.flatten(load("sd_hps", "1gpu"))
  changed = {key for key, value in configs.flatten(config).items() if small[key] != value} - {"name"}
  assert all(any(key.startswith(field) for field in configs.RESUMABLE) for key in changed)  # the same result by another way


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
  """A folder of compiled programs: the runs below differ in their rewards' alone."""
  fields = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = {field: getattr(jax.config, field) for field in fields}
  yield str(tmp_path_factory.mktemp("compiled"))
  for field, value in before.items():
    jax.config.update(field, value)
  compilation_cache.reset_cache()


@pytest.mark.parametrize("name", ["sd_clip", "sd_compressibility"])
def test_tiny_runs(name, tmp_path, monkeypatch, compiled):
  monkeypatch.chdir(ROOT)
  config = load(name, "tiny")
  with config.unlocked():
    config.logging.update(compilation_cache=compiled, tensorboard=False)
  train.run(config, tmp_path)
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert len(rows) == 2 and all(np.isfinite(row["reward/mean"]) and row["reward/failed"] == 0 for row in rows)
  assert all(row["optimizer/skipped_total"] == 0 for row in rows) and rows[0]["reward/std"] > 0


@pytest.mark.parametrize("name", RUNS)
def test_tiny_rewards_are_found(name, monkeypatch):
  """Every reward of a tiny preset is built from folders in the repository."""
  monkeypatch.chdir(ROOT)
  config = load(name, "tiny")
  assert set(scoring.build_rewards(config)) == {term for term, _ in config.reward.terms}


def test_the_prompt_lists():
  """400 and 100 prompts, none twice, and no subject of the held-out ones anywhere in the others."""
  folder = ROOT / "assets" / "prompts"
  general, held_out = (read_prompts(str(folder / f"general{end}.txt")) for end in ("", "_held_out"))
  assert (len(general), len(held_out)) == (400, 100)
  assert len({e.prompt for e in (*general, *held_out)}) == 500
  assert all(4 < len(e.prompt.split()) <= 40 for e in (*general, *held_out))
  lines = (folder / "general_held_out.txt").read_text().splitlines()
  subjects = [subject for line in lines if line.startswith("# subjects: ") for subject in line[12:].split(", ")]
  text = "\n".join(e.prompt for e in general).lower()
  for subject, example in zip(subjects, held_out, strict=True):
    assert re.search(rf"\b{subject}", example.prompt), (subject, example.prompt)
    assert not re.search(rf"\b{subject}(s|es)?\b", text), subject

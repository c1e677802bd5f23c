"""The command line, overrides, validation, and the comparison on resume.

Expected texts are what a user should read.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from dancegrpo_jax import installation, objects
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.rl import algorithms
from dancegrpo_jax.settings import checks, command_line, config_file, stored_config

COMMON = str(Path(__file__).parent.parent / "configs" / "common.py")


def common(**changes) -> ConfigDict:
  """The common config with fields changed: common(sampler__kind="flow")."""
  config = config_file.load(COMMON)
  with config.unlocked():
    for path, value in changes.items():
      *sections, leaf = path.split("__")
      section = config
      for name in sections:
        section = section[name]
      section[leaf] = value
  return config


def problems(num_devices=1, num_examples=None, **changes) -> list[str]:
  try:
    checks.validate(common(**changes), num_devices=num_devices, num_examples=num_examples)
  except ConfigError as error:
    return str(error).splitlines()
  return []


@pytest.fixture
def preset_file(tmp_path):
  file = tmp_path / "my_run.py"
  file.write_text(
    "from ml_collections import ConfigDict\n"
    "PRESETS = ('', 'tiny', 'broad')\n"
    "def get_config(preset=''):\n"
    "  return ConfigDict({'size': 1 if preset == 'tiny' else 10, 'inner': {'rate': 0.1}})\n"
  )
  return file


# Loading


def test_load_takes_a_preset(preset_file):
  assert config_file.load(str(preset_file)).size == 10
  assert config_file.load(f"{preset_file}:tiny").size == 1


def test_unknown_preset_lists_presets(preset_file):
  with pytest.raises(
    ConfigError, match="unknown preset; .*my_run.py has tiny, broad; did you mean 'tiny'"
  ):
    config_file.load(f"{preset_file}:tinny")


def test_missing_file_names_a_near_one(preset_file):
  with pytest.raises(ConfigError, match="no such file; did you mean 'my_run.py'"):
    config_file.load(str(preset_file.parent / "myrun.py"))


def test_broken_file_names_its_line(tmp_path):
  (tmp_path / "broken.py").write_text("x = 1\ny = x.nothing\n")
  with pytest.raises(ConfigError, match="line 2: AttributeError"):
    config_file.load(str(tmp_path / "broken.py"))
  (tmp_path / "syntax.py").write_text("x = (\n")
  with pytest.raises(ConfigError, match="line 1: SyntaxError"):
    config_file.load(str(tmp_path / "syntax.py"))


def test_a_config_file_can_import_its_neighbour(tmp_path):
  (tmp_path / "runs_of_mine").mkdir()
  (tmp_path / "runs_of_mine" / "base_of_mine.py").write_text(Path(COMMON).read_text())
  (tmp_path / "runs_of_mine" / "a.py").write_text(
    "from runs_of_mine import base_of_mine\ndef get_config():\n  return base_of_mine.get_config()\n"
  )
  assert config_file.load(str(tmp_path / "runs_of_mine" / "a.py")).seed == 0
  with pytest.raises(ConfigError, match="no presets"):
    config_file.load(str(tmp_path / "runs_of_mine" / "a.py:tiny"))


def test_a_name_alone(tmp_path, monkeypatch):
  """A bare name is a file of the working folder, or of its configs/, or of the package."""
  monkeypatch.chdir(tmp_path)
  for name in ("emoji_clip:tiny", "configs/emoji_clip:tiny", "emoji_clip.py:tiny"):
    assert config_file.load(name).name == "emoji_clip_tiny"
  (tmp_path / "configs").mkdir()
  text = "from configs import common\ndef get_config():\n  return common.get_config()\n"
  (tmp_path / "configs" / "emoji_clip.py").write_text(text)
  assert config_file.load("emoji_clip").name == "common"
  (tmp_path / "emoji_clip.py").write_text(text.replace("return ", "return 1, "))
  with pytest.raises(ConfigError, match="get_config returns a tuple; it must return"):
    config_file.load("emoji_clip")


def test_any_file_may_import_the_configs_of_the_package(tmp_path, monkeypatch):
  """In a process that starts elsewhere, with the package installed."""
  root = str(installation.ROOT)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr("sys.path", [p for p in sys.path if p not in ("", root)])
  for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
    monkeypatch.delitem(sys.modules, name)
  (tmp_path / "my_run.py").write_text(
    "from configs import emoji_clip\n"
    "def get_config(preset=''):\n"
    "  return emoji_clip.get_config('tiny')\n"
  )
  assert config_file.load("my_run").name == "emoji_clip_tiny"
  assert root not in sys.path


@pytest.mark.parametrize(
  "path, answer",
  [
    ("emoji_clipp", "no such file; did you mean 'emoji_clip'?"),
    ("emoji_clipp.py", "no such file; did you mean 'emoji_clip.py'?"),
    ("configs/emoji_clipp:tiny", "no such file; did you mean 'emoji_clip'?"),
    ("qqq", "no such file; configs/ has .*common, emoji_clip, .*, mine, .*sd_pick"),
    ("no/such.py", "no such file$"),
    ("run.json", "must be a Python file"),
  ],
)
def test_what_is_said_of_a_wrong_name(tmp_path, monkeypatch, path, answer):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "run.json").touch()
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "mine.py").touch()
  with pytest.raises(ConfigError, match=answer):
    config_file.load(path)


def test_a_broken_file_of_a_relative_path_names_its_line(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "broken.py").write_text("x = 1\ny = x.nothing\n")
  with pytest.raises(ConfigError, match="--config=broken.py: line 2: AttributeError"):
    config_file.load("broken.py")


def test_what_a_config_names_may_lie_beside_it(tmp_path, monkeypatch):
  """`module:object` is looked up in the config's folder and the one above.

  This works from any working folder. Modules that are importable anyway take precedence.
  """
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "a.py").write_text(Path(COMMON).read_text())
  (tmp_path / "mine" / "scores_of_mine.py").write_text("score = 1\n")
  monkeypatch.setattr("sys.path", ["elsewhere", str(tmp_path)])
  for _ in range(2):
    config_file.load(str(tmp_path / "mine" / "a.py"))
    assert sys.path == ["elsewhere", str(tmp_path), str(tmp_path / "mine")]
  for name in ("scores_of_mine:score", "mine.scores_of_mine:score"):
    assert objects.load("reward.terms", name) == 1
  config_file.load(COMMON)
  assert sys.path[:2] == ["elsewhere", str(tmp_path)] and str(tmp_path / "mine") not in sys.path


def test_a_loaded_config_is_locked():
  with pytest.raises((AttributeError, KeyError)):
    config_file.load(COMMON).sampler.kid = 1


# Overrides


@pytest.mark.parametrize(
  "override, expected",
  [
    ("iterations=7", 7),
    ("optimizer.learning_rate=3e-4", 3e-4),
    ("objective.clip_range=1", 1.0),
    ("model.remat=true", True),
    ("data.shuffle=False", False),
    ("sampler.kind=dance", "dance"),
    ("data.held_out=", ""),
    ("model.size=(64, 48)", (64, 48)),
    ("model.size=64,48", (64, 48)),
    (
      "reward.terms=[['clip', 0.5], ['compressibility', 1]]",
      (("clip", 0.5), ("compressibility", 1)),
    ),
    ("sampler.window.size=4", 4),
    ("mesh.data=-1", -1),
  ],
)
def test_overrides_take_the_present_type(override, expected):
  value = stored_config.flatten(config_file.load(COMMON, [override]))[override.partition("=")[0]]
  assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
  "override, text",
  [
    ("sampler.kid=ddim", "--config.sampler.kid: unknown key; did you mean sampler.kind?"),
    (
      "learning_rate=1",
      "--config.learning_rate: unknown key; did you mean optimizer.learning_rate?",
    ),
    ("lerning_rate=1", "--config.lerning_rate: unknown key; did you mean optimizer.learning_rate?"),
    ("iterations=7.5", "--config.iterations=7.5: not a value of type int"),
    ("model.remat=maybe", "--config.model.remat=maybe: not a value of type bool"),
    ("model.size=64", 'write it as --config.model.size="(32, 32)"'),
    ("sampler.window=3", "this is a section; set one of its fields: sampler.window.interval"),
    ("iterations", "no value; write --config.iterations=VALUE"),
  ],
)
def test_a_bad_override_is_one_clear_line(override, text):
  with pytest.raises(ConfigError) as caught:
    config_file.load(COMMON, [override])
  assert text in str(caught.value) and "\n" not in str(caught.value)


def test_all_bad_overrides_are_reported():
  with pytest.raises(ConfigError) as caught:
    config_file.load(COMMON, ["a.b=1", "iterations=x"])
  assert len(str(caught.value).splitlines()) == 2


# The command line


def add_flags(parser: argparse.ArgumentParser):
  parser.add_argument("--workdir", default="")
  parser.add_argument("--prompt", action="append", required=True)


def test_parse_argv_shares_config_and_keeps_own_flags():
  argv = [
    f"--config={COMMON}",
    "--config.iterations=3",
    "--config.mesh.data",
    "-1",
    "--prompt=a",
    "--prompt",
    "b",
  ]
  line = command_line.parse_argv(argv, "samples", add_flags)
  assert (line.config.iterations, line.config.mesh.data) == (3, -1)
  assert (line.flags.prompt, line.flags.workdir) == (["a", "b"], "")
  assert line.given == {"iterations", "mesh.data"}


@pytest.mark.parametrize(
  "argv, text",
  [
    (["--prompt=a"], "--config is missing"),
    ([f"--config={COMMON}"], "--prompt"),
    (
      [f"--config={COMMON}", "--prompt=a", "--wordkir=x"],
      "unknown argument '--wordkir=x'; did you mean '--workdir'?",
    ),
    ([f"--config={COMMON}", "--prompt=a", "--work=x"], "unknown argument '--work=x'"),
  ],
)
def test_a_bad_flag_is_one_clear_line(argv, text):
  with pytest.raises(ConfigError) as caught:
    command_line.parse_argv(argv, "samples", add_flags)
  assert text in str(caught.value)


def test_help_shows_flags_and_fields(capsys):
  with pytest.raises(SystemExit) as caught:
    command_line.parse_argv(
      [f"--config={COMMON}", "--config.iterations=3", "--help"], "Makes samples.", add_flags
    )
  text = capsys.readouterr().out
  assert caught.value.code == 0
  assert "Makes samples." in text and "--workdir" in text
  assert "--config.iterations=3" in text and '--config.model.size="(32, 32)"' in text


def test_a_mistake_exits_with_2_and_no_traceback(capsys):
  def command():
    raise ConfigError("first\nsecond")

  assert command_line.exit_on_mistake(command) == 2
  assert capsys.readouterr().err == "error: first\nerror: second\n"
  assert command_line.exit_on_mistake(lambda: None) == 0


# Validation


def test_the_common_config_is_sound():
  assert problems() == []
  assert problems(num_devices=8, num_examples=16) == []


@pytest.mark.parametrize(
  "changes, text",
  [
    (
      {"model__family": "stable_difusion"},
      "model.family = 'stable_difusion': unknown; .*did you mean 'stable_diffusion'",
    ),
    (
      {"sampler__kind": "dim"},
      "sampler.kind = 'dim': unknown; one of ddim, dance, flow, cps; did you mean 'ddim'",
    ),
    (
      {"sampler__kind": "flow"},
      "sampler.kind = 'flow': for rectified flow only; .* ddim, dance or cps",
    ),
    ({"sampler__noise_level": 0.0}, "sampler.noise_level = 0.0: must be above 0; .*deterministic"),
    ({"sampler__noise_level": 1.5}, "sampler.noise_level = 1.5: ddim takes at most 1"),
    ({"sampler__last_step": "od"}, "sampler.last_step = 'od': unknown; one of ode, x0hat, sde"),
    ({"sampler__steps": 1}, "sampler.steps = 1: no stochastic step is left"),
    ({"sampler__guidance_scale": 0.5}, "sampler.guidance_scale = 0.5: must be at least 1"),
    ({"sampler__window__mode": "slide"}, "sampler.window.mode = 'slide': unknown"),
    (
      {"sampler__window__size": 10},
      "sampler.window.size = 10: the schedule has 9 policy steps; use 0 .* to 9",
    ),
    (
      {"sampler__window__size": 4, "sampler__window__start": 6, "objective__timesteps": "all"},
      "window.start = 6: .*use 0 to 5",
    ),
    (
      {"reward__terms": (("clp", 1.0),)},
      "reward.terms = 'clp': unknown reward; .*module:object; did you mean 'clip'",
    ),
    ({"reward__terms": ()}, r"reward.terms = \(\): must hold \(term, weight\) pairs"),
    ({"reward__terms": (("clip", 1.0), ("clip", 2.0))}, "reward.terms = 'clip': named twice"),
    (
      {"reward__thresholds": (("hps", 0.28),)},
      "reward.thresholds = .*with a term of reward.terms: clip",
    ),
    (
      {"reward__combine": "sum"},
      "reward.combine = 'sum': unknown; one of advantages, rewards, gdpo",
    ),
    (
      {"rollout__samples_per_prompt": 1, "rollout__chunk": 16},
      "samples_per_prompt = 1: a group needs at least 2 samples",
    ),
    ({"advantage__best_of": 3}, "advantage.best_of = 3: must be even"),
    ({"advantage__best_of": 18}, "advantage.best_of = 18: .* use at most 16"),
    ({"advantage__history__size": 8}, "advantage.history.size = 8: never reaches min_count = 16"),
    (
      {"objective__kl__mode": "kl"},
      "objective.kl.mode = 'kl': unknown; one of exact, no_dt, mean_mse, velocity_mse",
    ),
    ({"objective__kl__mode": "no_dt"}, "objective.kl.mode = 'no_dt': for rectified flow only"),
    (
      {"objective__kl__mode": "velocity_mse"},
      "objective.kl.mode = 'velocity_mse': for rectified flow only",
    ),
    (
      {"objective__timesteps": "frist"},
      "objective.timesteps = 'frist': unknown; .*did you mean 'first'",
    ),
    ({"objective__timestep_fraction": 0.0}, r"timestep_fraction = 0.0: must lie in \(0, 1\]"),
    ({"objective__log_prob": "avg"}, "objective.log_prob = 'avg': unknown; one of mean, sum"),
    (
      {"objective__old_log_prob": "update"},
      "objective.old_log_prob = 'update': unknown; one of recompute, rollout",
    ),
    ({"objective__clip_range": 0.0}, "objective.clip_range = 0.0: must be above 0"),
    (
      {"objective__guard": True, "objective__old_log_prob": "rollout"},
      "objective.guard = True: needs .*recompute",
    ),
    (
      {"objective__kind": "dpo"},
      "objective.kind = 'dpo': unknown; one of grpo, dppo; did you mean 'dppo'",
    ),
    ({"objective__dppo__tau": 0.0}, "objective.dppo.tau = 0.0: must be above 0"),
    (
      {"objective__kind": "dppo", "objective__old_log_prob": "rollout"},
      "objective.kind = 'dppo': needs .*recompute",
    ),
    (
      {"objective__kind": "dppo", "objective__guard": True},
      "objective.guard = True: is a ratio of GRPO's; .*use False",
    ),
    ({"optimizer__microbatches_per_call": -1}, "microbatches_per_call = -1: must be at least 0"),
    ({"optimizer__b2": 1.0}, r"optimizer.b2 = 1.0: must lie in \[0, 1\)"),
    (
      {"lora__rank": 8, "lora__targets": ".*kernel"},
      "lora.alpha = 0.0: the adapters of rank 8 would do nothing",
    ),
    (
      {"lora__rank": 8, "lora__alpha": 8.0},
      "lora.targets = '': must match the kernels to adapt, as '.*attn",
    ),
    (
      {"lora__rank": 8, "lora__alpha": 8.0, "lora__targets": "("},
      r"lora.targets = '\(': not a regular expression",
    ),
    (
      {"lora__alpha": 8.0},
      "lora.alpha = 8.0: needs lora.rank above 0; with rank 0 every weight is trained",
    ),
    ({"lora__targets": ".*"}, "lora.targets = '.*': needs lora.rank above 0"),
    ({"lora__checkpoint": "x"}, "lora.checkpoint = 'x': needs lora.rank above 0"),
    ({"lora__rank": -1}, "lora.rank = -1: must be at least 0"),
    (
      {"mesh__data": 3},
      "mesh.data = 3: data=3 x fsdp=1 x tensor=1 does not use 1 devices; set mesh.data = 1 or -1",
    ),
    ({"mesh__rules": (("(", ()),)}, "mesh.rules = '\\(': not a regular expression"),
    (
      {"mesh__rules": ((".*", ("model",)),)},
      "mesh.rules = .*: unknown mesh axis 'model'; one of data, fsdp, tensor",
    ),
    (
      {"mesh__rules": ((".*", ("data", "tensor")),)},
      "mesh.rules = .*: data beside tensor: .*use fsdp",
    ),
    ({"model__size": (32,)}, r"model.size = \(32,\): must be \(height, width\)"),
    ({"logging__profile_steps": (5, 2)}, "logging.profile_steps = .*as \\(3, 4\\)"),
  ],
)
def test_one_wrong_value_is_one_line(changes, text):
  lines = problems(**changes)
  assert len(lines) == 1 and re.search(text, lines[0]), lines


@pytest.mark.parametrize(
  "changes, text",
  [
    # 256 samples have these divisors that are multiples of 8 lanes: 8, 16, 32, 64, 128, 256.
    (
      {"rollout__chunk": 100},
      "rollout.chunk = 100: must divide the 256 samples .*mesh.lanes = 8; use 16, 32, 64 or 128",
    ),
    ({"rollout__chunk": 4}, "rollout.chunk = 4: .* use 8, 16, 32 or 64"),
    ({"mesh__lanes": 7}, "mesh.lanes = 7"),
    # 16 x 16 samples x 5 of 9 steps = 1280 transitions
    (
      {"optimizer__microbatch": 200},
      "the 1280 trained transitions .256 samples x 5 steps. / 1 .*use 80, 128, 160 or 256",
    ),
    ({"optimizer__updates_per_iteration": 3}, "updates_per_iteration = 3: .*; use 1, 2, 4 or 5"),
    ({"advantage__best_of": 6, "optimizer__microbatch": 96}, ""),  # 16 x 6 x 5 = 480 = 5 x 96
  ],
)
def test_batches_that_do_not_divide_say_what_would(changes, text):
  lines = problems(**changes)
  assert (not lines and not text) or re.search(text, lines[0]), lines


def test_every_remedy_for_a_microbatch_works():
  line = problems(optimizer__microbatch=200)[0]
  values = line.rpartition("use ")[2].replace(" or ", ", ").split(", ")
  assert len(values) == 4
  for value in values:
    assert problems(optimizer__microbatch=int(value)) == []


def test_lanes_fit_the_devices():
  assert problems(num_devices=4, mesh__lanes=8) == []
  assert "must be a multiple of data x fsdp = 8" in problems(num_devices=8, mesh__lanes=4)[0]
  assert problems(num_devices=8, mesh__data=2, mesh__fsdp=4) == []


def test_prompts_must_suffice():
  assert "has 10 prompts; use at most 10" in problems(num_examples=10)[0]


def test_every_kind_of_algorithm_is_accepted():
  """The settings of the other algorithms may be present; they have no effect."""
  for kind in algorithms.KINDS:
    assert problems(objective__kind=kind) == []


def test_a_custom_reward_is_accepted():
  assert problems(reward__terms=(("json:loads", 1.0),)) == []  # any function will do
  (line,) = problems(reward__terms=(("my_package.rewards:score", 1.0),))
  assert "the module must be importable" in line


def test_all_problems_come_in_one_message():
  lines = problems(sampler__kind="dim", objective__clip_range=0.0, advantage__best_of=3)
  assert len(lines) == 3 and all(line.startswith("config.") for line in lines)


def test_a_missing_field_is_named():
  config = common()
  with config.unlocked():
    del config.sampler.kind
  with pytest.raises(
    ConfigError, match="config.sampler.kind: missing; start from configs/common.py"
  ):
    checks.validate(config, num_devices=1)


@pytest.mark.parametrize(
  "facts, said",
  [
    ({}, ""),  # numbers of devices and prompts are unknown, as in an export
    ({"platform": "gpu", "capability": (9, 0)}, ""),
    ({"platform": "gpu", "capability": (8, 0)}, ""),
    (
      {"platform": "gpu"},
      "needs a compute capability of 8.0; this GPU has none, as it is not NVIDIA's; use 'xla'",
    ),
    (
      {"platform": "gpu", "capability": (7, 5)},
      "needs a compute capability of 8.0; this GPU has 7.5",
    ),
    ({"platform": "cpu"}, "is for NVIDIA GPUs, and this run is on a CPU; use 'auto' or 'xla'"),
    ({"platform": "tpu"}, "is for NVIDIA GPUs, and this run is on a TPU; use 'auto' or 'xla'"),
  ],
)
def test_cudnn_needs_a_gpu_that_has_it(facts, said):
  try:
    checks.validate(common(model__attention="cudnn"), num_devices=1, **facts)
    assert not said
  except ConfigError as error:
    (line,) = str(error).splitlines()
    assert line.startswith(f"config.model.attention = 'cudnn': {said}") and said
  for kernel in ("auto", "xla"):
    checks.validate(common(model__attention=kernel), num_devices=1, **facts)


def test_splash_is_refused_on_a_gpu():
  """On a CPU it runs in Pallas's interpreter, which is for tests."""
  config = common(model__attention="splash")
  for platform in ("cpu", "tpu"):
    checks.validate(config, num_devices=1, platform=platform)
  with pytest.raises(
    ConfigError, match="config.model.attention = 'splash': is for TPUs.*a GPU; use 'auto'"
  ):
    checks.validate(config, num_devices=1, platform="gpu", capability=(9, 0))


# Storage


def test_json_round_trip_and_stable_text():
  config = common()
  text = stored_config.to_json(config)
  restored = stored_config.from_json(text)
  assert restored.to_dict() == config.to_dict()
  assert stored_config.to_json(restored) == text
  assert (
    stored_config.digest(restored)
    == stored_config.digest(config)
    != stored_config.digest(common(seed=1))
  )


def test_differences_on_resume():
  old = json.loads(stored_config.to_json(common()))
  assert stored_config.differences(old, common()) == ([], [])
  new = common(
    iterations=5,
    mesh__fsdp=2,
    rollout__chunk=64,
    optimizer__learning_rate=1e-3,
    model__size=(64, 64),
  )
  allowed, refused = stored_config.differences(old, new)
  assert {difference.field for difference in allowed} == {
    "iterations",
    "mesh.fsdp",
    "rollout.chunk",
  }
  assert {str(difference) for difference in refused} == {
    "config.optimizer.learning_rate: 1e-05 -> 0.001",
    "config.model.size: (32, 32) -> (64, 64)",
  }


def test_a_field_that_only_one_side_has_is_refused():
  old = json.loads(stored_config.to_json(common()))
  old["sampler"]["gone"] = 1
  assert [str(difference) for difference in stored_config.differences(old, common())[1]] == [
    "config.sampler.gone: 1 -> '(absent)'"
  ]

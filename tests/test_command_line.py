"""What the command line suggests, how rewards are named on it, what --help says of a field, and
that a command starts without noise.
"""

import json
import subprocess
import sys

import pytest
from ml_collections import ConfigDict
from tiny_checkpoint import ROOT

from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.report import metrics
from dancegrpo_jax.settings import command_line, config_file, field_comments, stored_config

COMMON = str(ROOT / "configs" / "common.py")
PRETRAIN = str(ROOT / "configs" / "emoji_pretrain.py")


def refusal(argv: list[str], config: str = COMMON) -> str:
  with pytest.raises(ConfigError) as caught:
    command_line.parse_argv(
      [f"--config={config}", *argv], "", lambda parser: parser.add_argument("--workdir")
    )
  return str(caught.value)


# Suggestions


@pytest.mark.parametrize(
  "key, field",
  [
    ("optimizer.lr", "optimizer.learning_rate"),
    ("lr", "optimizer.learning_rate"),
    ("train.lr", "optimizer.learning_rate"),
    ("batch_size", "data.prompts_per_iteration or optimizer.microbatch"),
    ("num_steps", "sampler.steps"),
    ("num-inference-steps", "sampler.steps"),
    ("rollout.group_size", "rollout.samples_per_prompt"),
    ("cfg", "sampler.guidance_scale"),
    ("sampler.guidance", "sampler.guidance_scale"),
    ("epochs", "iterations"),
    ("lora_rank", "lora.rank"),
    ("model.resolution", "model.size"),
    ("optimizer.weigth_decay", "optimizer.weight_decay"),
    ("sampler.noise_levl", "sampler.noise_level"),
    ("objective.learning_rate", "optimizer.learning_rate"),
  ],
)
def test_a_field_by_another_name(key, field):
  line = refusal([f"--config.{key}=1"])
  assert line == f"--config.{key}: unknown key; did you mean {field}?"


def test_a_field_like_no_other_gets_those_of_its_section():
  assert refusal(["--config.ema.foo=1"]) == "--config.ema.foo: unknown key; ema has decay"
  assert refusal(["--config.foo=1"]).endswith("unknown key; --help with --config lists every field")


def test_other_names_are_found_in_a_config_of_another_kind():
  line = refusal(["--config.vae.lr=1"], PRETRAIN)
  assert line == "--config.vae.lr: unknown key; did you mean vae.learning_rate?"


@pytest.mark.parametrize(
  "argv, end",
  [
    (["--lr=1e-4"], "did you mean --config.optimizer.learning_rate?"),
    (["--lr", "1e-4"], "did you mean --config.optimizer.learning_rate?"),
    (["--iterations=3"], "did you mean --config.iterations?"),
    (["--optimizer.lr=1"], "did you mean --config.optimizer.learning_rate?"),
    (["optimizer.lr=1"], "did you mean --config.optimizer.learning_rate?"),
    (["config.iterations=3"], "two dashes in front, --config.iterations=3"),
    (["-config.iterations=3"], "two dashes in front, --config.iterations=3"),
    (["\N{EM DASH}config.iterations=3"], "two dashes in front, --config.iterations=3"),
    (["-workdir=runs/x"], "two dashes, --workdir=runs/x"),
    (["--wordkir=runs/x"], "did you mean '--workdir'?"),
    (["configs/emoji_clip.py:tiny"], "given as --config=configs/emoji_clip.py:tiny"),
    (["--quick"], "--help lists the flags, and with --config the fields"),
  ],
)
def test_an_unknown_argument_is_one_line_with_what_was_meant(argv, end):
  line = refusal(argv)
  assert line.startswith(f"unknown argument {'='.join(argv)!r}; ") and line.endswith(end)
  assert "\n" not in line


def test_an_unknown_argument_without_a_config():
  with pytest.raises(ConfigError, match="^unknown argument '--lr=1'; --help lists the flags"):
    command_line.parse_argv(["--lr=1"], "")


# Rewards


@pytest.mark.parametrize(
  "text, pairs",
  [
    ("clip", (("clip", 1.0),)),
    ("hps:0.7,clip:1.4", (("hps", 0.7), ("clip", 1.4))),
    ("hps:0.7, clip", (("hps", 0.7), ("clip", 1.0))),
    ("my_rewards:redness", (("my_rewards:redness", 1.0),)),
    ("my_rewards:redness:0.5", (("my_rewards:redness", 0.5),)),
    ("a.b.c:KIND.part:-1e-2,aesthetic", (("a.b.c:KIND.part", -0.01), ("aesthetic", 1.0))),
    ("m:f/red:2,m:f/blue", (("m:f/red", 2.0), ("m:f/blue", 1.0))),
    ("(('hps', 0.7), ('m:f', 1))", (("hps", 0.7), ("m:f", 1))),
    ("('hps', 0.7), ('clip', 1.4)", (("hps", 0.7), ("clip", 1.4))),
  ],
)
def test_rewards_in_short(text, pairs):
  config = config_file.load(COMMON, [f"reward.terms={text}"])
  assert config.reward.terms == pairs


@pytest.mark.parametrize(
  "text, part",
  [
    ("hps:0.7;clip:1.4", "hps:0.7;clip:1.4"),
    ("hps:0,7", "7"),
    ("hps:", "hps:"),
    (":0.5", ":0.5"),
    ("m:f:g", "m:f:g"),
    ("hps:nan", "hps:nan"),
    ("hps:1e999", "hps:1e999"),
    ("clip,,hps", ""),
    ("hps 0.7", "hps 0.7"),
  ],
)
def test_a_reward_that_cannot_be_read_is_one_line(text, part):
  line = refusal([f"--config.reward.terms={text}"])
  assert line.startswith(f"--config.reward.terms={text}: {part!r} can't be read; write TERM")
  assert "hps:0.7,clip:1.4" in line and "my_module:function:0.5" in line and "\n" not in line


def test_a_tuple_that_cannot_be_read_shows_the_short_form():
  line = refusal(["--config.reward.terms=(('hps', 0.7"])
  assert "not a value of type tuple; write TERM or TERM:WEIGHT" in line


def test_thresholds_in_short_need_a_number():
  config = config_file.load(COMMON, ["reward.thresholds=hps:0.28,clip:0.39"])
  assert config.reward.thresholds == (("hps", 0.28), ("clip", 0.39))
  line = refusal(["--config.reward.thresholds=hps"])
  assert "'hps' can't be read; write TERM:NUMBER" in line


# Help


def help_text(config: str, capsys) -> str:
  with pytest.raises(SystemExit):
    command_line.parse_argv([f"--config={config}", "--config.seed=3", "--help"], "")
  return capsys.readouterr().out


@pytest.mark.parametrize("config", [COMMON, "flux_hps", PRETRAIN, "examples/own_reward/config.py"])
def test_help_lists_every_field_once(config, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  lines = help_text(config, capsys).splitlines()
  listed = [line.split("=")[0] for line in lines if line.startswith("  --config.")]
  fields = stored_config.flatten(config_file.load(config))
  assert sorted(listed) == sorted(f"  --config.{field}" for field in fields)
  assert "  --config.seed=3" in lines
  assert all(len(line) <= 100 for line in lines if not line.startswith("  --config."))


def test_help_has_the_comments_of_the_file(capsys):
  text = " ".join(help_text(COMMON, capsys).split())
  assert "--config.rollout.shared_noise=True Whether all samples of a prompt start" in text
  assert "[P]" not in text  # marks of sources that are named elsewhere
  assert "--config.variants=8 pictures of each (name, colour) pair" in " ".join(
    help_text(PRETRAIN, capsys).split()
  )


def test_fields_inside_a_section_that_is_set_from_outside():
  source = "config.reward.mine = ConfigDict({\n  # A file.\n  'file': 1, **more})\n"
  assert field_comments.meanings([source]) == {"reward.mine": "", "reward.mine.file": "A file."}


# Noise


def test_transformers_says_nothing_about_a_missing_pytorch():
  """In a process in which torch can't be found, as where requirements.txt alone is installed."""
  script = (
    "import importlib.util as u; real = u.find_spec\n"
    "u.find_spec = lambda name, *a: None if name == 'torch' else real(name, *a)\n"
    "import sys; sys.modules['torch'] = None\n"
    "from dancegrpo_jax.data.transformers_classes import tokenizer_class\n"
    "assert tokenizer_class('CLIPTokenizer').__name__ == 'CLIPTokenizer'\n"
    "import os; assert 'TRANSFORMERS_NO_ADVISORY_WARNINGS' not in os.environ\n"
  )
  script_of_others = "".join(script.splitlines(True)[:3]) + "import transformers\n"

  def noise(code: str) -> str:
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr

  assert "PyTorch was not found" in noise(script_of_others)  # what there is to silence
  assert noise(script) == ""


def test_a_missing_value_is_a_gap_in_tensorboard(tmp_path, caplog):
  config = ConfigDict({"name": "x", "logging": {"tensorboard": True, "wandb": False}})
  with metrics.Writer(tmp_path, config) as writer:
    for iteration, value in enumerate((0.5, float("nan"), 0.7)):
      writer.write(iteration, {"reward/mean": value})
  assert not caplog.records
  rows = [json.loads(line) for line in (tmp_path / metrics.FILE).read_text().splitlines()]
  assert [row["reward/mean"] for row in rows] == [0.5, None, 0.7]
  (events,) = (tmp_path / "tensorboard").glob("events*")
  assert events.read_bytes().count(b"reward/mean") == 2

"""The command line: each mistake is answered with a remedy and exit code 2.

Nothing is written.
"""

import os
import shutil
import subprocess
import sys

import pytest
from tiny_checkpoint import ROOT, overrides

from dancegrpo_jax import evaluate, main, sample
from dancegrpo_jax.convert import __main__ as convert
from dancegrpo_jax.plan import __main__ as plan
from dancegrpo_jax.pretrain import __main__ as pretrain

CONFIG = f"--config={ROOT / 'configs' / 'emoji_clip.py'}:tiny"


def arguments(folders, workdir, **changes) -> list[str]:
  return [
    CONFIG,
    *(f"--config.{word}" for word in overrides(folders, **changes)),
    f"--workdir={workdir}",
  ]


@pytest.fixture
def answer(tiny_models, tmp_path, capsys):
  """`(extra flags, **changes) -> lines of stderr` of a command that must fail and write nothing."""

  def run(*extra: str, **changes) -> list[str]:
    workdir = tmp_path / "workdir"
    assert main.main([*arguments(tiny_models, workdir, **changes), *extra]) == 2
    output = capsys.readouterr()
    assert not workdir.exists() and "Traceback" not in output.err + output.out
    lines = output.err.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines), output.err
    return lines

  return run


MISTAKES = {
  "unknown key": (
    ["--config.optimizer.learning_rat=1"],
    {},
    ["optimizer.learning_rat", "did you mean", "learning_rate"],
  ),
  "unknown flag": (["--work_dir=x"], {}, ["--work_dir", "did you mean", "--workdir"]),
  "wrong type": (["--config.sampler.steps=many"], {}, ["sampler.steps", "many", "int"]),
  "chunk": ([], {"rollout__chunk": 12}, ["rollout.chunk = 12", "16 samples", "use 8 or 16"]),
  "microbatch": (
    [],
    {"optimizer__microbatch": 32},
    ["optimizer.microbatch = 32", "48", "use 8, 16, 24 or 48"],
  ),
  "updates": (
    [],
    {"optimizer__updates_per_iteration": 5},
    ["optimizer.updates_per_iteration = 5", "48", "use 1, 2, 3 or 6"],
  ),
  "too many prompts": (
    [],
    {"data__prompts_per_iteration": 16},
    ["data.prompts_per_iteration = 16", "8 prompts"],
  ),
  "unknown reward": (
    [],
    {"reward__terms": (("clipp", 1.0),)},
    ["reward.terms = 'clipp'", "module:object", "mean 'clip'"],
  ),
  "no such module": (
    [],
    {"reward__terms": (("no_such_module:f", 1.0),)},
    ["no_such_module:f", "importable"],
  ),
  "no such function": ([], {"reward__terms": (("json:f", 1.0),)}, ["json:f", "module:object"]),
  "unknown sampler": (
    [],
    {"sampler__kind": "dimm"},
    ["sampler.kind = 'dimm'", "ddim, dance, flow, cps", "mean 'ddim'"],
  ),
  "no GPU": (
    [],
    {"model__attention": "cudnn"},
    ["config.model.attention = 'cudnn': is for NVIDIA GPUs", "on a CPU", "use 'auto' or 'xla'"],
  ),
  "no noise": (
    [],
    {"sampler__noise_level": 0.0},
    ["sampler.noise_level = 0.0", "above 0", "deterministic"],
  ),
  "no model": (
    [],
    {"model__checkpoint": "no/such-sd"},
    ["config.model.checkpoint = 'no/such-sd'", "no such folder", "hf download no/such-sd"],
  ),
  "no clip": (
    [],
    {"reward__clip__checkpoint": "no/such-clip"},
    ["reward.clip.checkpoint = 'no/such-clip'", "no such folder"],
  ),
  "no prompts file": ([], {"data__prompts": "no/such.txt"}, ["no/such.txt", "data.prompts"]),
  "lora targets": (
    [],
    {"lora__rank": 4, "lora__alpha": 4.0, "lora__targets": ".*to_x/kernel"},
    [
      "lora.targets = '.*to_x/kernel'",
      "matches no dense kernel",
      "it must match the whole path of one",
    ],
  ),
  "lora without alpha": (
    [],
    {"lora__rank": 4, "lora__targets": ".*to_q/kernel"},
    ["lora.alpha = 0.0", "use 1 to 2 times"],
  ),
  "lora without rank": ([], {"lora__alpha": 4.0}, ["lora.alpha = 4.0", "needs lora.rank above 0"]),
  "no lora file": (
    [],
    {
      "lora__rank": 4,
      "lora__alpha": 4.0,
      "lora__targets": ".*to_q/kernel",
      "lora__checkpoint": "no/such-lora",
    },
    ["lora.checkpoint = 'no/such-lora'", "no such folder", "pytorch_lora_weights.safetensors"],
  ),
  "workdir": (
    ["--workdir=/dev/null/run"],
    {},
    ["--workdir=/dev/null/run", "/dev/null is not a folder", "use another"],
  ),
  "size": ([], {"model__size": (32, 36)}, ["model.size = (32, 36)", "multiples of 8"]),
}


@pytest.mark.parametrize(
  "command, flags",
  [
    (sample.main, ["--checkpoint=base", "--prompt=x", "--out=/dev/null/x"]),
    (evaluate.main, ["--checkpoint=base", "--out=/dev/null/x.json"]),
    (pretrain.main, ["--out=/dev/null/x"]),
    (plan.main, ["--out=/dev/null/x.json"]),
    (lambda argv: convert.main(["import", *argv]), ["--out=/dev/null/x"]),
    (lambda argv: convert.main(["export", *argv]), ["--checkpoint=base", "--out=/dev/null/x"]),
  ],
)
def test_where_nothing_can_be_written_is_found_first(command, flags, capsys):
  """The command fails before it computes anything."""
  assert command([CONFIG, *flags]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f"error: {flags[-1]}: /dev/null is not a folder")


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_for_one_mistake(answer, name):
  flags, changes, words = MISTAKES[name]
  (line,) = answer(*flags, **changes)
  assert not [word for word in words if word not in line], line


def test_all_mistakes_at_once(answer):
  lines = answer(
    sampler__kind="dimm", rollout__samples_per_prompt=1, objective__clip_range=-1.0, mesh__lanes=0
  )
  for field in ("sampler.kind", "rollout.samples_per_prompt", "objective.clip_range", "mesh.lanes"):
    assert sum(line.startswith(f"error: config.{field} = ") for line in lines) == 1, lines


@pytest.mark.parametrize("text", ["", "\n# a comment\n  \n"])
def test_empty_prompts_file(answer, tmp_path, text):
  file = tmp_path / "empty.txt"
  file.write_text(text)
  (line,) = answer(data__prompts=file)
  assert "empty.txt has no prompts" in line


def broken(folders, tmp_path, file: str):
  """A copy of the model, and the path of one of its files, which the test damages."""
  shutil.copytree(folders.model, tmp_path / "model")
  return tmp_path / "model", tmp_path / "model" / file


def test_truncated_weights(answer, tiny_models, tmp_path):
  folder, file = broken(tiny_models, tmp_path, "unet/diffusion_pytorch_model.safetensors")
  file.write_bytes(file.read_bytes()[:-1000])
  (line,) = answer(model__checkpoint=folder)
  assert str(file) in line and "truncated" in line


def test_missing_weights(answer, tiny_models, tmp_path):
  folder, file = broken(tiny_models, tmp_path, "vae/diffusion_pytorch_model.safetensors")
  file.unlink()
  (line,) = answer(model__checkpoint=folder)
  assert str(folder) in line and "vae" in line and "safetensors" in line


@pytest.mark.parametrize(
  "file", ["unet/config.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"]
)
def test_missing_files(answer, tiny_models, tmp_path, file):
  folder, path = broken(tiny_models, tmp_path, file)
  path.unlink()
  (line,) = answer(model__checkpoint=folder)
  assert path.name in line and str(folder) in line


@pytest.mark.parametrize(
  "flag, words",
  [
    (
      f"--config={ROOT / 'configs' / 'emoji_clipp.py'}",
      ["emoji_clipp.py", "no such file", "emoji_clip.py"],
    ),
    (f"--config={ROOT / 'configs' / 'emoji_clip.py'}:tinny", ["tinny", "unknown preset", "tiny"]),
  ],
)
def test_config_file(capsys, tmp_path, flag, words):
  assert main.main([flag, f"--workdir={tmp_path / 'workdir'}"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert not [word for word in words if word not in line], line


@pytest.mark.parametrize(
  "changes, extra, word",
  [
    ({}, ["--config.optimizer.learning_rat=1"], "learning_rate"),
    ({"model__checkpoint": "no/such-sd"}, [], "no/such-sd"),
  ],
)
def test_as_a_process(tiny_models, tmp_path, changes, extra, word):
  """As in a shell: the exit code, and only the one line on stderr."""
  command = [
    sys.executable,
    "-m",
    "dancegrpo_jax.main",
    *arguments(tiny_models, tmp_path / "workdir", **changes),
    *extra,
  ]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
  )
  assert done.returncode == 2
  (line,) = [line for line in done.stderr.splitlines() if line]
  assert line.startswith("error: ") and word in line
  assert not (tmp_path / "workdir").exists() and not done.stdout


@pytest.mark.parametrize(
  "command, flags",
  [
    (sample.main, ["--checkpoint=no/such-run", "--prompt=x", "--out={0}/out"]),
    (evaluate.main, ["--checkpoint=no/such-run", "--out={0}/out.json"]),
    (plan.main, ["--out={0}/out.json"]),
  ],
)
def test_a_kernel_that_the_devices_lack_is_found_first(command, flags, tmp_path, capsys):
  """The command fails before it looks for a checkpoint."""
  chosen = [word.format(tmp_path) for word in flags]
  assert command([CONFIG, "--config.model.attention=cudnn", *chosen]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: config.model.attention = 'cudnn': is for NVIDIA GPUs")
  assert not list(tmp_path.iterdir())


def test_help(capsys):
  with pytest.raises(SystemExit) as stop:
    main.main([CONFIG, "--help"])
  assert stop.value.code == 0
  text = capsys.readouterr().out
  assert "--workdir" in text and "--config.sampler.noise_level=1.0" in text

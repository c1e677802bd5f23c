"""examples/own_family as its user runs it: a model family from outside the package trains, resumes,
samples, evaluates, plans, and goes out and in, with all weights and with adapters; and objects that
are no family or no reward are answered with a line.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from dancegrpo_jax import evaluate, main, sample
from dancegrpo_jax.assembly import encoding
from dancegrpo_jax.checkpoints import components, hub
from dancegrpo_jax.convert import __main__ as convert
from dancegrpo_jax.convert import folders
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.pipelines import families
from dancegrpo_jax.pipelines.layout import STEMS
from dancegrpo_jax.plan import __main__ as plan
from dancegrpo_jax.report import metrics

ROOT = Path(__file__).parent.parent
CONFIG = "--config=examples/own_family/config.py"
TINY = f"{CONFIG}:tiny"
LORA = (
  "--config.lora.rank=2",
  "--config.lora.alpha=3",
  r"--config.lora.targets=.*_mlp/fc(1|2)/kernel",
)
PROMPTS = ("--prompt=red disc", "--prompt=a blue square", "--prompt=something else")
TERM = "own_family.reward:share_of_named_colour"


@pytest.fixture(scope="module", autouse=True)
def in_the_project_folder():
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(ROOT)
    yield


def rows(workdir: Path) -> list[dict]:
  return list(metrics.read(workdir))


def pictures(out: Path, *flags: str) -> np.ndarray:
  """What `sample` draws, uint8 `[prompts, 2, 16, 16, 3]`."""
  assert sample.main([TINY, *PROMPTS, f"--out={out}", "--samples=2", "--seed=3", *flags]) == 0
  files = sorted(file for file in out.glob("*.png") if file.name != "grid.png")
  found = np.stack([np.asarray(Image.open(file)) for file in files])
  return found.reshape(len(PROMPTS), 2, 16, 16, 3)


class Run(NamedTuple):
  """A workdir, the flags of its config, and what `sample` draws with its weights."""

  workdir: Path
  flags: tuple[str, ...]
  drawn: np.ndarray


def trained(folder: Path, name: str, *flags: str) -> Run:
  """Two iterations at a high rate, and two more by the same command."""
  workdir = folder / name
  command = [TINY, f"--workdir={workdir}", "--config.optimizer.learning_rate=2e-3", *flags]
  for iterations in (2, 4):
    assert main.main([*command, f"--config.iterations={iterations}"]) == 0
  return Run(workdir, flags, pictures(folder / f"{name}_drawn", f"--checkpoint={workdir}", *flags))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
  return trained(tmp_path_factory.mktemp("whole"), "run")


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Run:
  return trained(tmp_path_factory.mktemp("lora"), "run", *LORA)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> np.ndarray:
  return pictures(tmp_path_factory.mktemp("base") / "drawn")


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_training_goes_on_and_changes_the_pictures(kind, base, request):
  run = request.getfixturevalue(kind)
  found = rows(run.workdir)
  assert [row["iteration"] for row in found] == [0, 1, 2, 3]
  assert all(row["grad_norm"] > 0 and row["reward/failed"] == 0 for row in found)
  assert found[-1]["evaluation/held_out"] > 0
  assert (run.workdir / "report.html").is_file()
  assert np.abs(run.drawn.astype(int) - base).max() > 20


def test_evaluation(whole, tmp_path):
  out = tmp_path / "evaluation.json"
  assert evaluate.main([TINY, f"--checkpoint={whole.workdir}", f"--out={out}"]) == 0
  text = out.read_text()
  assert TERM in text and "held_out" in text
  assert (tmp_path / "evaluation" / "prompts.png").is_file()


def test_an_exported_folder_is_a_base(whole, tmp_path):
  """It has the base's own layout, and is drawn from as the workdir is."""
  out = tmp_path / "out"
  assert convert.main(["export", TINY, f"--checkpoint={whole.workdir}", f"--out={out}"]) == 0
  layout = families.family_of("own_family.family:FAMILY").layout
  assert hub.missing(out, layout) == []
  original = Path("examples/own_family/checkpoint")
  assert files(out) == files(original) | {"README.md"}
  for name in ("model.json", "mixer/config.json", "words/words.safetensors"):
    assert (out / name).read_bytes() == (original / name).read_bytes()
  drawn = pictures(tmp_path / "drawn", f"--config.model.checkpoint={out}")
  np.testing.assert_array_equal(drawn, whole.drawn)


def files(folder: Path) -> set[str]:
  return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_an_imported_base_is_the_base(base, tmp_path):
  out = tmp_path / "imported"
  assert convert.main(["import", TINY, f"--out={out}"]) == 0
  assert (out / "words" / "vocabulary.json").is_file() and (out / "model.json").is_file()
  drawn = pictures(tmp_path / "drawn", f"--config.model.checkpoint={out}")
  np.testing.assert_array_equal(drawn, base)


def test_adapters_out_and_in(lora, tmp_path):
  """A LoRA file continues where the run was; merged into a folder they draw the same pictures."""
  given = [TINY, *lora.flags, f"--checkpoint={lora.workdir}"]
  assert convert.main(["export", *given, f"--out={tmp_path / 'adapters'}"]) == 0
  assert convert.main(["export", *given, f"--out={tmp_path / 'merged'}", "--part=pipeline"]) == 0
  tensors = load_file(tmp_path / "adapters" / "pytorch_lora_weights.safetensors")
  assert tensors["mixer.blocks.2.channels_mlp.0.lora_A.weight"].shape == (2, 48)
  assert len(tensors) == 2 * 3 * 4
  again = pictures(
    tmp_path / "again", *lora.flags, f"--config.lora.checkpoint={tmp_path / 'adapters'}"
  )
  merged = pictures(tmp_path / "drawn", f"--config.model.checkpoint={tmp_path / 'merged'}")
  for drawn in (again, merged):
    assert np.abs(drawn.astype(int) - lora.drawn).max() <= 1


def test_a_plan(capsys):
  assert plan.main([TINY, "--only=encode,update step"]) == 0
  told = capsys.readouterr().out
  assert "| encode " in told and "| update step " in told and "Not compiled: rollout" in told


def test_split_parameters_and_stored_embeddings_change_nothing(whole, tmp_path):
  """mesh.rules are about the family's own paths, and the cache knows its encoder."""
  workdir = tmp_path / "run"
  split = ("--config.mesh.fsdp=2", "--config.data.cache_embeddings=true", "--config.iterations=1")
  assert main.main([TINY, f"--workdir={workdir}", *split]) == 0
  assert (workdir / "embeddings").is_dir()
  first = rows(whole.workdir)[0]["reward/mean"]
  assert abs(rows(workdir)[0]["reward/mean"] - first) < 1e-3


def test_inspection(capsys):
  checkpoint = "examples/own_family/checkpoint"
  assert convert.main(["inspect", checkpoint, CONFIG]) == 0
  told = capsys.readouterr().out
  assert "blocks.1.patches_mlp.2.weight\t[16, 32]\tfloat32\tblocks_1/patches_mlp/fc2/kernel" in told
  assert "words.weight\t[11, 32]\tfloat32\tembedding" in told
  assert convert.main(["inspect", f"{checkpoint}/mixer", CONFIG]) == 0
  assert convert.main(["inspect", f"{checkpoint}/mixer"]) == 2
  assert "names the class 'Mixer'; known: UNet2DConditionModel" in capsys.readouterr().err


def test_the_checkpoint_can_be_made_again(tmp_path):
  """The command of the README, with few steps; and the run takes what it wrote."""
  command = [sys.executable, "-m", "examples.own_family.make_checkpoint"]
  subprocess.run([*command, f"--out={tmp_path / 'new'}", "--steps=3"], check=True)
  assert files(tmp_path / "new") == files(Path("examples/own_family/checkpoint"))
  drawn = pictures(tmp_path / "drawn", f"--config.model.checkpoint={tmp_path / 'new'}")
  assert drawn.std() > 0


def test_a_process_of_its_own(tmp_path, base):
  """Nothing that these tests import makes it work. One device draws what eight do."""
  flags = [TINY, *PROMPTS, f"--out={tmp_path / 'out'}", "--samples=2", "--seed=3"]
  subprocess.run([sys.executable, "-m", "dancegrpo_jax.sample", *flags], check=True)
  first = np.asarray(Image.open(tmp_path / "out" / "00_00.png")).astype(int)
  assert np.abs(first - base[0, 0]).max() <= 1


def test_the_reward_rises(tmp_path):
  """The recipe as it stands: by more than 3 standard errors from the first 5 iterations to the last
  5.
  """
  assert main.main([CONFIG, f"--workdir={tmp_path / 'run'}", "--config.evaluation.every=0"]) == 0
  means = np.array([row["reward/mean"] for row in rows(tmp_path / "run")])
  first, last = means[:5], means[-5:]
  error = np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / 2 * (2 / 5))
  print(f"{first.mean():.4f} -> {last.mean():.4f}, standard error {error:.4f}")
  assert last.mean() - first.mean() > 3 * error


# Mistakes

FAMILY, REWARD = "config.model.family = ", "config.reward.terms: "
MISTAKES = {
  "function": ("own_family.family:build", f"{FAMILY}.*: is a function; it must be a .*Family"),
  "class": ("own_family.model:Mixer", f"{FAMILY}.*: is a .*; it must be a .*Family"),
  "instance": ("own_family.table:MIXER", f"{FAMILY}.*: is a Table; it must be a .*Family"),
  "reward": ("examples.own_reward.reward:KIND", f"{FAMILY}.*: is a RewardKind; it must be"),
  "no module": ("own_famly.family:FAMILY", "config.model.family: .*No module named 'own_famly'"),
  "no object": ("own_family.family:FAMLY", "config.model.family: .*no attribute 'FAMLY'"),
  "no name": ("own_family.family", f"{FAMILY}.*: unknown; one of .*, or module:object"),
}
WRONG_REWARDS = {
  "class": ("own_family.model:Mixer", f"{REWARD}.* is a type; it must be a function"),
  "family": ("own_family.family:FAMILY", f"{REWARD}.* is a Family; it must be a function"),
  "no module": ("own_famly.reward:f", f"{REWARD}.*No module named 'own_famly'"),
  "no object": ("own_family.reward:f", f"{REWARD}.*no attribute 'f'"),
  "arguments": ("own_family.pictures:draw", r"must take \(pixels, prompts, metadata\)"),
  "no such term": (
    "examples.own_reward.reward:KIND/sharpness",
    "config.reward: .* is no score of 'examples.own_reward.reward:KIND', which gives",
  ),
  "no section": (
    "examples.own_reward.reward:FROM_SECTION",
    "its section config.reward.background is missing",
  ),
}


@pytest.fixture
def answer(monkeypatch, tmp_path, capsys):
  """`(command, flags) -> the one line` of a command that must fail before it reads any weights."""

  def read(*args):
    raise AssertionError("weights are read")

  def run(command, *flags: str) -> str:
    monkeypatch.setattr(components, "read_component", read)
    asked = {
      main: [f"--workdir={tmp_path / 'new'}"],
      sample: ["--prompt=x", f"--out={tmp_path / 'new'}"],
      evaluate: ["--checkpoint=base", f"--out={tmp_path / 'new.json'}"],
      plan: [],
    }
    assert command.main([TINY, *asked[command], *flags]) == 2
    told = capsys.readouterr()
    assert "Traceback" not in told.err + told.out and not list(tmp_path.iterdir())
    (line,) = told.err.splitlines()
    assert line.startswith("error: ")
    return line

  return run


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_no_family(name, answer):
  named, message = MISTAKES[name]
  line = answer(main, f"--config.model.family={named}")
  assert named in line
  match(message, line)


@pytest.mark.parametrize("name", WRONG_REWARDS)
def test_what_is_no_reward(name, answer):
  named, message = WRONG_REWARDS[name]
  line = answer(main, f'--config.reward.terms=(("{named}", 1.0),)')
  assert named in line
  match(message, line)


@pytest.mark.parametrize("command", [sample, evaluate, plan], ids=["sample", "evaluate", "plan"])
def test_every_command_answers_so(command, answer):
  match(
    "is a function; it must be", answer(command, "--config.model.family=own_family.family:build")
  )
  wrong = '--config.reward.terms=(("argparse:Namespace", 1.0),)'
  match("is a type; it must be", answer(command, wrong))


def match(pattern: str, line: str) -> None:
  assert re.search(pattern, line), line


def test_a_checkpoint_of_another_size(answer):
  line = answer(main, "--config.model.size=(32, 32)")
  match(r"model.size = \(32, 32\): this checkpoint draws 16 x 16 pixels", line)


def test_another_models_checkpoint(answer):
  line = answer(main, "--config.model.checkpoint=assets/emoji-sd")
  match(
    "the folder lacks model.json, mixer/config.json.*accepted is a folder with model.json", line
  )


# What the package promises to such a family


def test_any_pytree_of_rows_can_be_stored():
  class Pair(NamedTuple):
    text: int
    parts: tuple[int, int]

  assert encoding.named({"text": 1, "pooled": 2}) == {"embedding_text": 1, "embedding_pooled": 2}
  assert encoding.named(1) == {"embedding": 1}
  assert encoding.named(Pair(1, (2, 3))) == {
    "embedding_text": 1,
    "embedding_parts_0": 2,
    "embedding_parts_1": 3,
  }


def test_weight_files_have_the_stems_of_the_tables():
  """From the hub nothing else is fetched, and of a family without networks the usual ones."""
  family = families.family_of("own_family.family:FAMILY")
  fetched = hub.patterns(family.layout)
  assert {"mixer/mixer.safetensors", "mixer/mixer-*-of-*.safetensors", "model.json"} <= set(fetched)
  assert not any("diffusion_pytorch_model" in file for file in fetched)
  assert "model_index.json" not in fetched
  assert "model_index.json" in hub.patterns(families.family_of("flux").layout)
  assert family._replace(networks={}).layout.stems == STEMS


def test_two_networks_in_one_folder_are_not_written(whole, tmp_path, monkeypatch):
  """One file would be written over the other."""
  build = folders.loading.build_pipeline

  def shared(config):
    pipeline = build(config)
    words = pipeline.components["words"]._replace(folder="mixer")
    return pipeline._replace(components=pipeline.components | {"words": words})

  monkeypatch.setattr(folders.loading, "build_pipeline", shared)
  config = main.command_line.parse_argv([TINY], "").config
  for write in (
    lambda: folders.export(config, str(whole.workdir), tmp_path / "out", "pipeline", ""),
    lambda: folders.import_checkpoint(config, tmp_path / "out"),
  ):
    with pytest.raises(ConfigError, match="denoiser and words share the folder 'mixer'"):
      write()

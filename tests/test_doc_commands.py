"""Every command of README and docs/, in the order of the site, as a user would run it.

Those that need nothing but this machine run in a fresh copy of the project, cut to two iterations
by DANCEGRPO_ITERATIONS. Those that need the hub, a GPU, a TPU or a cluster are parsed, their config
is checked, and what they name in the project is there. `LEFT_OUT` has the others, with the reason.
A command that fits no rule is a failure, so that new pages are tested too.
"""

import importlib
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_checkpoint import ROOT

from dancegrpo_jax import installation
from dancegrpo_jax.data.prompts import read_prompts
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.settings import checks, command_line, config_file, stored_config

PACKAGE = "dancegrpo_jax."
CUT = "2"
SHELLS = "bash|sh|shell|console"

# Commands that are neither run nor parsed, by how they begin, and why.
LEFT_OUT = {
  "pip install": "it downloads; .ci/run does the same in a fresh environment. Its file is there.",
  "apt-get install": "it changes the machine",
  "hf ": "it needs the hub",
  "pytest": "it is what runs this test",
  "python -m dancegrpo_jax.data.hpdv2_prompts": "the hub; test_hpdv2_prompts.py has a file",
  "python -m dancegrpo_jax.pretrain": "the whole emoji font; test_pretrain.py brings a small one",
  "python benchmarks/gpu.py": "it measures a GPU; test_gpu_benchmark.py runs its parts on a CPU",
}
# Commands that run until they are stopped: they are started, and stopped at the end of their page.
SERVERS = ("python benchmarks/reward_server.py",)
# Modules that a page asks its reader to write: page -> name. It is the page's first Python block.
MODULES = {"docs/rewards.md": "my_module.py"}
# Words that stand for something of the reader's. The command is only parsed.
PLACEHOLDERS = ("FILE", "WORKDIR", "DIR", "FOLDER")


class Command(NamedTuple):
  """A command of a page.

  Attributes:
    page: relative to the project.
    text: one line, continued lines joined.
    exports: the lines of its block before it that set variables.
  """

  page: str
  text: str
  exports: str

  @property
  def words(self) -> list[str]:
    return shlex.split(self.text, comments=True)


def pages() -> list[str]:
  """README, the pages of the site in its order, those that the site lacks, and the examples."""

  def files(value) -> Iterator[str]:
    if isinstance(value, str):
      yield value
    for item in value.values() if isinstance(value, dict) else value * isinstance(value, list):
      yield from files(item)

  text = re.sub(r"!!python/\S+", "", (ROOT / "mkdocs.yml").read_text())
  listed = [f"docs/{file}" for file in files(yaml.safe_load(text)["nav"])]
  others = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "docs").glob("*.md"))
  examples = sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("examples/*/README.md"))
  listed = [page for page in listed if (ROOT / page).is_file()]  # not the one that a hook makes
  return list(dict.fromkeys(["README.md", *listed, *others, *examples]))


def commands(page: str) -> list[Command]:
  """The commands of a page in their order."""
  found = []
  pattern = rf"^ *```(?:{SHELLS})\n(.*?)^ *```"
  for block in re.findall(pattern, (ROOT / page).read_text(), re.M | re.S):
    exports = ""
    for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
      line = line.strip().removeprefix("$ ")
      if line.startswith("export "):
        exports += f"{line}\n"
      elif line and not line.startswith("#"):
        found.append(Command(page=page, text=line, exports=exports))
  return found


COMMANDS = [command for page in pages() for command in commands(page)]


# What is done with a command


def what_to_do(command: Command) -> str:
  """One of "run", "parse", "try" (a script of launch/, which prints what it would call), "serve"
  and "leave out".

  Raises:
    AssertionError: no rule says so.
  """
  words = command.words
  if "--help" in words:
    return "run"
  if command.text.startswith(SERVERS):
    return "serve"
  if command.text.startswith(tuple(LEFT_OUT)):
    return "leave out"
  if words[0].startswith("launch/"):
    return "try"
  if words[:2] == ["python", "-m"] and words[2].startswith("examples."):
    return "run"
  if words[0] == "dancegrpo" or words[:2] == ["python", "-m"] and words[2].startswith(PACKAGE):
    return "parse" if needs_more_than_a_cpu(command) else "run"
  raise AssertionError(f"{command.page}: {command.text}: add a rule, or a reason to LEFT_OUT")


def needs_more_than_a_cpu(command: Command) -> bool:
  """Whether a command of the package needs the hub, other devices, or something of the reader's."""
  if any(re.search(rf"[= ]{word}\b", command.text) for word in PLACEHOLDERS):
    return True
  if any(flag in command.text for flag in ("--topology=", "--coordinator=")):
    return True
  config = config_of(command)
  if config is None or "reward" not in config:  # `convert inspect`, and `pretrain`
    return False
  names = {term.split("/")[0] for term, _ in config.reward.terms}
  sections = [config.model, *(config.reward[name] for name in names if name in config.reward)]
  files = [section.get(key, "") for section in sections for key in ("checkpoint", "head")]
  return not all(installation.find(file.removeprefix("random:")).exists() for file in files if file)


def config_of(command: Command):
  """The config of a command of the package; None where it names none."""
  given = [word for word in command.words if word.startswith("--config")]
  return command_line.parse_argv(given, "").config if given else None


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
  monkeypatch.chdir(ROOT)
  monkeypatch.delenv("DANCEGRPO_ITERATIONS", raising=False)


def named(command: Command) -> str:
  return f"{command.page.removesuffix('.md')}: {command.text[:70]}"


@pytest.mark.parametrize("command", COMMANDS, ids=named)
def test_every_command_has_its_rule(command):
  what_to_do(command)
  if command.text.startswith("pip install -r "):
    assert (ROOT / command.words[3]).is_file()


def test_reasons_are_needed():
  """Nothing stays in the tables that no page has any more."""
  texts = [command.text for command in COMMANDS]
  for start in (*LEFT_OUT, *SERVERS):
    assert any(text.startswith(start) for text in texts), start
  assert len(COMMANDS) > 60 and {page for page in MODULES} <= set(pages())


@pytest.mark.parametrize("page", pages())
def test_a_block_of_commands_says_that_it_is_shell(page):
  """Otherwise it would not be looked at here."""
  blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```", (ROOT / page).read_text(), re.M | re.S)
  for language, block in blocks:
    if not re.fullmatch(SHELLS, language):
      assert not re.search(r"^ *(\$ |python |pip |dancegrpo |hf |launch/)", block, re.M), block


# Those that are parsed


PARSED = [c for c in COMMANDS if c.words[0] in ("python", "dancegrpo") and PACKAGE in c.text]


@pytest.mark.parametrize("command", [c for c in PARSED if "--config=" in c.text], ids=named)
def test_a_command_is_understood(command, monkeypatch):
  """Its flags, its fields and its config, with the number of devices that it is for, and the files
  of the project that it names.
  """
  words = command.words
  name, flags = words[2].removeprefix(PACKAGE), words[3:]
  if "--help" in flags:
    return
  is_folder = (ROOT / "dancegrpo_jax" / name).is_dir()
  module = importlib.import_module(f"{PACKAGE}{name}.__main__" if is_folder else PACKAGE + name)
  if name == "convert":
    monkeypatch.setattr(module, "_converted", lambda run: None)
    assert flags[0] == "inspect" or module.main(flags) == 0
  else:
    command_line.parse_argv(flags, "", module.add_flags)
  config = config_of(command)
  if "reward" not in config:
    return
  files = [config.data.prompts, config.data.held_out, config.evaluation.distractors]
  files = [file for file in files if file and not file.startswith("tfds:")]
  assert all(installation.find(file).is_file() for file in files)
  if what_to_do(command) == "parse":
    validate(config, command)


def validate(config, command: Command) -> None:
  """Checks a config for the devices that its preset or its topology names, else for some number."""
  prompts = config.data.prompts
  examples = None if prompts.startswith("tfds:") else len(read_prompts(prompts))
  problems = []
  for count in counts(command):
    try:
      checks.validate(config, num_devices=count, num_examples=examples)
      return
    except ConfigError as error:
      problems.append(f"{count} devices: {error}")
  raise AssertionError("\n".join(problems))


def counts(command: Command) -> list[int]:
  """The numbers of devices that a command may be for."""
  if found := re.search(r"--topology=\w+:([\dx]+)", command.text):
    return [math.prod(map(int, found[1].split("x")))]
  if found := re.search(r":(\d+)gpu\b", command.text):
    return [int(found[1])]
  return [1, 8, 16, 64]


@pytest.mark.parametrize(
  "command", [c for c in COMMANDS if c.words[0].startswith("launch/")], ids=named
)
def test_a_script_says_what_it_would_call(command):
  script, *rest = command.text.split(maxsplit=1)
  text = f"{command.exports}{script} --dry-run {' '.join(rest)}"
  done = subprocess.run(["bash", "-ec", text], capture_output=True, text=True, check=False)
  assert done.returncode == 0 and done.stdout.strip(), done.stderr
  config = re.search(r"CONFIG=(\S+)", command.exports)
  if config and rest[0].split()[0] == "run":
    assert config[1] in done.stdout
    fields = [word for word in command.words if word.startswith("--config.")]
    command_line.parse_argv([f"--config={config[1]}", *fields], "")


def test_the_pickles_of_the_paper_become_safetensors(tmp_path, monkeypatch):
  """The Python block of docs/paper.md, with files of the same form."""
  (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/paper.md").read_text(), re.S)
  share = tmp_path / "share"
  share.mkdir()
  monkeypatch.chdir(tmp_path)
  tensors = {"visual.proj": torch.arange(6.0).reshape(2, 3).T, "logit_scale": torch.tensor(4.6)}
  for file, content in (
    ("checkpoints/HPSv2/HPS_v2.1_compressed.pt", {"epoch": 1, "state_dict": tensors}),
    ("checkpoints/DFN5B-CLIP-ViT-H-14/open_clip_pytorch_model.bin", tensors),
  ):
    Path(file).parent.mkdir(parents=True)
    torch.save(content, file)
  Path("checkpoints/DFN5B-CLIP-ViT-H-14/open_clip_config.json").write_text("{}")
  exec(block.replace("/mnt/share", str(share)), {})
  written = {str(file.relative_to(share)) for file in share.rglob("*.*") if file.is_file()}
  names = re.findall(r"runs/(HPS\S+|DFN\S+) ", (ROOT / "docs/paper.md").read_text())
  assert any(name in written for name in names) and len(written) == 3
  for file in share.rglob("*.safetensors"):
    read = load_file(file)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors | read)


# Those that are run


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
  """What a fresh clone would have, with the changes of the working tree."""
  folder = tmp_path_factory.mktemp("clone") / "dancegrpo_jax"
  listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
  files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
  for file in filter(None, files.split("\0")):
    if (ROOT / file).is_file():
      (folder / file).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(ROOT / file, folder / file)
  return folder


@pytest.fixture(scope="module")
def environment(copy) -> dict[str, str]:
  """A user's, with a cache folder of its own. DANCEGRPO_ITERATIONS= in front of pytest runs
  everything uncut.
  """
  ours = ("XLA_FLAGS", "PYTHONPATH", "JAX_ENABLE_COMPILATION_CACHE", "PYTEST_CURRENT_TEST")
  kept = {name: value for name, value in os.environ.items() if name not in ours}
  kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"
  kept |= {"XDG_CACHE_HOME": str(copy.parent / "cache")}
  return {"DANCEGRPO_ITERATIONS": CUT} | kept


def run_page(
  page: str, copy: Path, environment: dict[str, str], only: str | None = None
) -> list[str]:
  """Runs the commands of a page one after the other, or the one with the text `only`.

  Returns:
    A text about each command that failed.
  """
  if page in MODULES:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)[:1]
    (copy / MODULES[page]).write_text(block)
  failed, servers = [], []
  try:
    for command in commands(page):
      if only not in (None, command.text):
        continue
      what = what_to_do(command)
      text = re.sub(r"^dancegrpo ", "python -m dancegrpo_jax ", command.text)
      start = time.monotonic()
      if what == "serve":
        servers.append(serve(text, copy, environment))
      elif what == "run":
        done = subprocess.run(
          ["bash", "-c", text],
          cwd=copy,
          env=environment,
          capture_output=True,
          text=True,
          check=False,
        )
        print(f"{time.monotonic() - start:6.1f} s  {page}: {text}")
        if done.returncode:
          failed.append(f"{page}: {text}\n{done.stdout[-500:]}{done.stderr[-2000:]}")
        elif os.environ.get("DANCEGRPO_ITERATIONS") == "":
          print(done.stdout[-400:])
  finally:
    for server in servers:
      server.send_signal(signal.SIGTERM)
      server.wait(timeout=30)
  return failed


def serve(text: str, copy: Path, environment: dict[str, str]) -> subprocess.Popen:
  """Starts a server, and waits until it says its address."""
  server = subprocess.Popen(
    shlex.split(text), cwd=copy, env=environment, stdout=subprocess.PIPE, text=True
  )
  assert server.stdout is not None
  assert "http" in server.stdout.readline()
  return server


def test_the_first_command_of_readme(copy, environment):
  """The others take minutes, and are among those of all pages."""
  first = next(command.text for command in commands("README.md") if what_to_do(command) == "run")
  assert "emoji_clip" in first
  assert run_page("README.md", copy, environment, only=first) == []
  (row, *rest) = (copy / "runs" / "emoji_clip" / "metrics.jsonl").read_text().splitlines()
  assert '"reward/mean"' in row and (len(rest) == 1 or environment["DANCEGRPO_ITERATIONS"] == "")


@pytest.mark.slow
def test_the_commands_of_all_pages(copy, environment):
  """They begin with those of README, and share a folder."""
  failed = [text for page in pages() for text in run_page(page, copy, environment)]
  assert not failed, "\n\n".join(failed)


def test_the_variable_that_cuts_is_refused_where_it_is_no_number(monkeypatch):
  for text in ("two", "0", "-1", "1.5"):
    monkeypatch.setenv("DANCEGRPO_ITERATIONS", text)
    with pytest.raises(ConfigError, match=f"DANCEGRPO_ITERATIONS={text}: must be a whole number"):
      command_line.parse_argv(["--config=configs/emoji_clip.py"], "")


@pytest.mark.parametrize(
  "config, changed",
  [
    ("configs/emoji_clip.py", {"iterations": 2}),
    (
      "configs/emoji_pretrain.py",
      {f"{name}.steps": 2 for name in ("vae", "clip", "denoiser", "flow")},
    ),
    ("configs/sd_hps.py:tiny", {}),
  ],
)
def test_the_variable_cuts_and_says_so(config, changed, monkeypatch, capsys):
  whole = stored_config.flatten(config_file.load(config))
  monkeypatch.setenv("DANCEGRPO_ITERATIONS", "2")
  cut = stored_config.flatten(command_line.parse_argv([f"--config={config}"], "").config)
  assert cut == whole | changed
  lines = capsys.readouterr().err.splitlines()
  assert lines == [
    f"note: DANCEGRPO_ITERATIONS=2: config.{field} is 2 in place of {whole[field]}"
    for field in whole
    if field in changed
  ]

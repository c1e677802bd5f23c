"""What isn't code agrees with what is: versions, requirements, images, the hosted CI, the hooks."""

import ast
import fnmatch
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from dancegrpo_jax import __version__

ROOT = Path(__file__).parent.parent

# What a package is imported as, where that isn't its name.
IMPORTED_AS = {"orbax_checkpoint": "orbax", "pillow": "PIL"}
# Asked for by name, and imported by others: requirements.txt says by whom.
FOR_OTHERS = {"importlib_resources"}
OPTIONAL = {
  "wandb",
  "torch",
  "imageio_ffmpeg",
  "gcsfs",
  "fsspec",  # which comes with gcsfs
}  # imported where a config asks for them, and a line says what to install


def requirements(name: str) -> list[str]:
  lines = (ROOT / name).read_text().splitlines()
  return [line for line in lines if line and not line.startswith(("#", "-r"))]


def imported(folder: str) -> set[str]:
  """Top-level modules that are neither the standard library's nor ours."""
  found = set()
  for file in (ROOT / folder).rglob("*.py"):
    for node in ast.walk(ast.parse(file.read_text())):
      if isinstance(node, ast.Import):
        found |= {alias.name.split(".")[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom) and not node.level:
        found.add(node.module.split(".")[0])
  return found - sys.stdlib_module_names - {"dancegrpo_jax", "configs"}


def test_requirements_are_what_is_imported():
  names = {
    re.split(r"[\[<>=]", line)[0].replace("-", "_") for line in requirements("requirements.txt")
  }
  asked = {IMPORTED_AS.get(name, name) for name in names}
  used = imported("dancegrpo_jax") | imported("configs")
  assert used - OPTIONAL - {"jaxlib"} == asked - FOR_OTHERS


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_requirement_has_a_bound(name):
  assert not [line for line in requirements(name) if not re.search(r"[<>=]=?\d", line)]


def test_one_version():
  assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
  newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
  assert newest == __version__
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert "version" in project["dynamic"]


def test_the_citation_has_what_the_format_wants():
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert {"cff-version", "message", "title", "authors"} <= citation.keys()
  (paper,) = citation["references"]
  assert paper["url"].endswith("2505.07818") and len(paper["authors"]) == 11


def instructions(file: Path) -> list[tuple[str, str]]:
  """(instruction, arguments) of a Dockerfile, continued lines joined."""
  lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
  joined = "\n".join(lines).replace("\\\n", " ").splitlines()
  return [tuple(line.split(maxsplit=1)) for line in joined if line.strip()]


def kept(path: str) -> bool:
  """Whether .dockerignore leaves a path of the root in what is sent."""
  verdict = True
  for line in (ROOT / ".dockerignore").read_text().splitlines():
    if line and not line.startswith("#") and fnmatch.fnmatch(path, line.removeprefix("!")):
      verdict = line.startswith("!")
  return verdict


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.gpu"])
def test_images(name):
  """Each copies what is there and sent, and ends as a user who isn't root, with the command."""
  steps = instructions(ROOT / "docker" / name)
  for kind, words in steps:
    if kind == "COPY" and words != ". .":
      assert all((ROOT / file).is_file() and kept(file) for file in words.split()[:-1])
  last = dict(steps)
  assert last["USER"] != "root" and last["ENTRYPOINT"] == '["dancegrpo"]'
  python = last["FROM"].split(":")[1].split("-")[0]
  classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
  assert f"Programming Language :: Python :: {python}" in classifiers


def test_what_is_sent_makes_a_wheel():
  sources = ("dancegrpo_jax", "configs", "assets", "pyproject.toml", "setup.py", "README.md")
  licences = ("LICENSE", "MANIFEST.in", *(path.name for path in ROOT.glob("requirements*.txt")))
  assert all(kept(path) for path in (*sources, *licences))
  assert not any(kept(path) for path in (".git", "runs", "tests", "out", "checkpoints"))


def test_the_hosted_ci_runs_the_projects_own():
  (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
  assert job["steps"][-1] == {"run": ".ci/run"}
  assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12"]


def test_hooks_download_nothing():
  (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
  assert repository["repo"] == "local"
  assert {hook["language"] for hook in repository["hooks"]} == {"system"}

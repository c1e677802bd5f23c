"""What a user gets who has no checkout: a wheel, built from the source distribution, in an
environment of its own, and the command in an empty folder.

The environment sees the packages of the one that runs the tests, so that nothing is downloaded.
"""

import email
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from dancegrpo_jax import __version__

ROOT = Path(__file__).parent.parent

LIMIT = 40 * 2**20  # bytes
EXTRAS = ("gpu", "tpu", "gcs", "dev")
ARGUMENTS = ("--config=emoji_clip:tiny", "--config.iterations=1", "--config.sampler.steps=3")


class Installed(NamedTuple):
  """The wheel's file, and the environment's python."""

  wheel: Path
  python: Path

  def run(self, folder: Path, *words: str) -> subprocess.CompletedProcess:
    """A command of the environment, in a folder."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
      [self.python.with_name(words[0]), *words[1:]],
      cwd=folder,
      env=environment,
      capture_output=True,
      text=True,
      check=False,
    )


def call(*words: str | Path, folder: Path) -> None:
  done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
  # A copy: building writes into the tree, and a later wheel would hold what lies there.
  tree = tmp_path_factory.mktemp("wheel") / "tree"
  tree.mkdir()
  for name in ("dancegrpo_jax", "configs", "assets"):
    shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
  files = ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md")
  for file in [*map(ROOT.joinpath, files), *ROOT.glob("requirements*.txt")]:
    shutil.copy(file, tree)
  folder = tree.parent
  pip = (sys.executable, "-m", "pip")
  code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
  call(sys.executable, "-c", code, folder=tree)
  (source,) = folder.glob("*.tar.gz")
  shutil.rmtree(tree)
  call(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", source, folder=folder)
  (wheel,) = folder.glob("*.whl")
  call(sys.executable, "-m", "venv", "--without-pip", "env", folder=folder)
  (packages,) = folder.glob("env/lib/python*/site-packages")
  present = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
  (packages / "present.pth").write_text("\n".join(present) + "\n")
  python = folder / "env" / "bin" / "python"
  install = ("install", "--no-deps", "--no-index", "--ignore-installed", wheel)
  call(*pip, "--python", python, *install, folder=folder)
  return Installed(wheel, python)


def test_what_the_wheel_holds(installed):
  with zipfile.ZipFile(installed.wheel) as wheel:
    names = set(wheel.namelist())
  tops = {name.split("/")[0] for name in names}
  assert tops == {"dancegrpo_jax", f"dancegrpo_jax-{__version__}.dist-info"}
  tree = [path for path in (ROOT / "dancegrpo_jax").rglob("*") if path.is_file()]
  modules = {str(path.relative_to(ROOT)) for path in tree if "__pycache__" not in path.parts}
  data = {
    f"dancegrpo_jax/_data/{path.relative_to(ROOT)}"
    for folder in ("configs", "assets")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and not {"__pycache__", "images"} & set(path.parts)
  }
  assert {name for name in names if name.startswith("dancegrpo_jax/")} == modules | data
  assert "dancegrpo_jax/py.typed" in modules and any("LICENSE" in name for name in names)
  assert installed.wheel.stat().st_size <= LIMIT


def test_its_dependencies_are_the_requirements(installed):
  with zipfile.ZipFile(installed.wheel) as wheel:
    (file,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    metadata = email.message_from_bytes(wheel.read(file))
  asked = metadata.get_all("Requires-Dist")
  for extra in ("", *EXTRAS):
    lines = (ROOT / f"requirements{extra and '-'}{extra}.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith(("#", "-r"))]
    part = [line for line in asked if ("extra ==" in line) == bool(extra)]
    part = [line for line in part if not extra or f'"{extra}"' in line]
    assert len(part) == len(wanted)
    for line, found in zip(wanted, part):
      assert found.startswith(line.split(">")[0].split("=")[0])
  assert metadata["Requires-Python"] == ">=3.11" and metadata["License-Expression"] == "Apache-2.0"


def test_trains_in_an_empty_folder(installed, tmp_path):
  done = installed.run(tmp_path, "dancegrpo", "train", *ARGUMENTS)
  assert done.returncode == 0, done.stdout + done.stderr
  assert done.stdout.splitlines()[-1].startswith("reward/mean: ")
  assert [path.name for path in tmp_path.iterdir()] == ["runs"]
  assert (tmp_path / "runs" / "emoji_clip_tiny" / "report.html").is_file()


def test_what_the_command_answers_there(installed, tmp_path):
  done = installed.run(tmp_path, "dancegrpo", "--version")
  assert done.stdout == f"dancegrpo {__version__}\n", done.stderr
  where = "import dancegrpo_jax; print(dancegrpo_jax.__file__)"
  assert (
    str(installed.python.parent.parent) in installed.run(tmp_path, "python", "-c", where).stdout
  )
  (tmp_path / "mine.py").write_text(
    "from configs import common\n"
    "def get_config(preset=''):\n"
    "  config = common.get_config()\n"
    "  config.name = 'mine'\n"
    "  return config\n"
  )
  done = installed.run(tmp_path, "dancegrpo", "train", "--config=mine.py", "--help")
  assert "--config.name=mine" in done.stdout, done.stderr
  done = installed.run(tmp_path, "dancegrpo", "train", "--config=configs/emoji_clipp.py")
  assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "'emoji_clip.py'" in done.stderr

"""What pyproject.toml can't say: requirements*.txt are the dependencies, and a wheel holds
`configs/` and `assets/`, which lie beside the package here, inside it, where
dancegrpo_jax/installation.py looks for them.
"""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = ("gpu", "tpu", "gcs", "dev")
DATA = {"dancegrpo_jax._data.configs": "configs", "dancegrpo_jax._data.assets": "assets"}


def requirements(name: str) -> list[str]:
  """The lines of a requirements file that are its own."""
  lines = (Path(__file__).parent / name).read_text().splitlines()
  return [line for line in lines if line and not line.startswith(("#", "-r "))]


setup(
  install_requires=requirements("requirements.txt"),
  extras_require={name: requirements(f"requirements-{name}.txt") for name in EXTRAS},
  packages=[*find_packages(include=["dancegrpo_jax*"]), *DATA],
  package_dir=DATA,
  package_data={
    "dancegrpo_jax": ["py.typed", "report/template.html"],
    "dancegrpo_jax._data.assets": ["**/*"],
  },
  exclude_package_data={"dancegrpo_jax._data.assets": ["images/*"]},  # the README's
)

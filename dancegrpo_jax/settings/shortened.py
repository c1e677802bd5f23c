"""Cuts a run short by an environment variable, so that every command of the documentation can be
tried as it stands there: DANCEGRPO_ITERATIONS=2.
"""

import os
from collections.abc import Mapping

from ml_collections import ConfigDict

from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.settings.stored_config import flatten

VARIABLE = "DANCEGRPO_ITERATIONS"


def shortened(
  config: ConfigDict, environment: Mapping[str, str] = os.environ
) -> tuple[ConfigDict, list[str]]:
  """The config with at most as many iterations as the variable says, and a line about each change.

  The config of `pretrain` has no iterations; there the optimizer steps of each stage are cut. A
  smaller number stays.

  Args:
    config: as it was loaded, with its overrides.
    environment: of the process.

  Raises:
    ConfigError: the variable is not a whole number above 0.
  """
  text = environment.get(VARIABLE, "")
  if not text:
    return config, []
  if not text.isdecimal() or int(text) < 1:
    raise ConfigError(
      f"{VARIABLE}={text}: must be a whole number above 0; unset it for a whole run"
    )
  most, fields = int(text), flatten(config)
  names = ["iterations"] if "iterations" in fields else _steps(fields)
  longer = [name for name in names if isinstance(fields[name], int) and fields[name] > most]
  with (config := config.copy_and_resolve_references()).unlocked():
    for name in longer:
      *sections, leaf = name.split(".")
      section = config
      for part in sections:
        section = section[part]
      section[leaf] = most
  lines = [
    f"{VARIABLE}={text}: config.{name} is {most} in place of {fields[name]}" for name in longer
  ]
  return config.lock(), lines


def _steps(fields: Mapping[str, object]) -> list[str]:
  """The optimizer steps of the stages of pretraining."""
  return [name for name in fields if name.endswith(".steps") and name.count(".") == 1]

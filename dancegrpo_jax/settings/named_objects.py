"""Where the modules lie that a config names as "module:object".

A run stores these folders with its checkpoints. A command that has only the workdir, and not the
config file, finds the modules there.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from dancegrpo_jax import objects
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.rewards import kinds


def names(config: ConfigDict) -> dict[str, str]:
  """What a config names as "module:object", with the field that names it."""
  found = {config.model.family: "model.family"}
  found |= {kinds.reward_of(term): "reward.watch" for term in config.reward.watch}
  found |= {kinds.reward_of(term): "reward.terms" for term, _ in config.reward.terms}
  return {name: field for name, field in found.items() if objects.is_named(name)}


def folders(config: ConfigDict) -> list[str]:
  """The folders that the modules were imported from, without those of installed packages.

  The modules must have been imported.
  """
  found = []
  for name in names(config):
    module = name.partition(":")[0]
    spec = getattr(sys.modules.get(module), "__spec__", None)
    if spec is None or not spec.has_location or spec.origin is None:
      continue
    file = Path(spec.origin).absolute()
    depth = module.count(".") + (file.name == "__init__.py")
    if "site-packages" not in file.parts:
      found.append(str(file.parents[depth]))
  return list(dict.fromkeys(found))


def require_found(config: ConfigDict, places: Sequence[str], owner: str) -> None:
  """Makes the modules importable: from everywhere else first, then from these folders.

  Args:
    config: of the run.
    places: what `folders` returned when the run was stored.
    owner: the workdir, for the message.

  Raises:
    ConfigError: a module is in none of these places; one line for each.
  """
  sys.path += [place for place in places if place not in sys.path and Path(place).is_dir()]
  lines = []
  for name, field in names(config).items():
    module = name.partition(":")[0].partition(".")[0]
    if importlib.util.find_spec(module) is None:
      before = f" or in {', '.join(places)}, where the run had it" if places else ""
      lines.append(
        f"{owner}: its config.{field} names {name!r}, and there is no module {module} here{before};"
        " set PYTHONPATH to its folder, or give the run's --config"
      )
  if lines:
    raise ConfigError("\n".join(lines))

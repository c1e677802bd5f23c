"""The networks that can be converted, by the names of their classes in PyTorch."""

from dancegrpo_jax.conversion.table import Table
from dancegrpo_jax.conversion.tables import clip
from dancegrpo_jax.errors import ConversionError
from dancegrpo_jax.pipelines.families import FAMILIES
from dancegrpo_jax.pipelines.layout import Network
from dancegrpo_jax.rewards.kinds import KINDS
from dancegrpo_jax.types import PyTree

NETWORKS: dict[str, Network] = {
  name: network
  for networks in (
    *(family.networks for family in FAMILIES.values()),
    *(kind.networks for kind in KINDS.values()),
  )
  for name, network in networks.items()
}
# Layouts whose config.json names no class have a table only.
TABLES: dict[str, Table] = {name: network.table for name, network in NETWORKS.items()}
TABLES |= {table.name: table for table in (clip.OPEN_CLIP, clip.AESTHETIC)}


def table_of(table: Table | str) -> Table:
  """The table itself, or the table of a network's class.

  Raises:
    ConversionError: the class is not known.
  """
  if isinstance(table, Table):
    return table
  if table not in TABLES:
    raise ConversionError(f"no table for {table!r}; known networks: {', '.join(TABLES)}")
  return TABLES[table]


def class_name(config: dict) -> str:
  """The network's class in a config.json: diffusers' `_class_name`, or the first of transformers'
  `architectures`; "" where the file names none.
  """
  return config.get("_class_name") or (config.get("architectures") or [""])[0]


def abstract_params(config: dict, networks: dict[str, Network] = NETWORKS) -> PyTree:
  """The parameters of the network that a config.json describes, as shapes and dtypes.

  Args:
    config: the parsed file.
    networks: by class.

  Raises:
    ConversionError: the class, or a value in the file, is not implemented.
  """
  name = class_name(config)
  if name not in networks:
    raise ConversionError(f"config.json names the class {name!r}; known: {', '.join(networks)}")
  try:
    return networks[name].abstract(config)
  except (ValueError, KeyError, TypeError) as error:
    raise ConversionError(
      f"{name}: config.json does not describe a network that is implemented: {error}"
    ) from error

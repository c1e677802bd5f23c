"""A weight file's tensors under the names of the network's own layout, whatever program wrote it.

conversion/names.py knows what wrappers put around a name, and a network's table knows the other
layouts of its files (`Table.dialects`).
"""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from dancegrpo_jax.conversion import names
from dancegrpo_jax.conversion.mapping import Mapping, match
from dancegrpo_jax.conversion.table import Spec, Table, expected_sources
from dancegrpo_jax.conversion.transfer import Slices, import_slice


@runtime_checkable
class Tensors(Protocol):
  """Tensors that are read by slices, as those of `safetensors_io.Reader`.

  Attributes:
    specs: shape and dtype of every tensor, by name.
  """

  specs: dict[str, Spec]

  def read(self, name: str, index: Slices) -> np.ndarray:
    """`tensor[index]`, a new array."""
    ...


class _Renamed:
  """Tensors under other names."""

  def __init__(self, tensors: Tensors, originals: dict[str, str]):
    """Args: the tensors, and their names by the new ones."""
    self._tensors, self._originals = tensors, originals
    self.specs = {name: tensors.specs[original] for name, original in originals.items()}

  def read(self, name: str, index: Slices) -> np.ndarray:
    """`tensor[index]`, a new array."""
    return self._tensors.read(self._originals[name], index)


class _Translated:
  """The tensors of a network's own layout, made of those of another one."""

  def __init__(self, tensors: Tensors, mapping: Mapping):
    """Args: the tensors of the file, and their mapping to those of the network's own layout."""
    self._tensors, self._mapping = tensors, mapping
    filled = {name: blocks for name, blocks in mapping.by_target.items() if blocks}
    self.specs = {
      name: mapping.targets[name]._replace(dtype=mapping.sources[blocks[0].source].dtype)
      for name, blocks in filled.items()
    }

  def read(self, name: str, index: Slices) -> np.ndarray:
    """`tensor[index]`, a new array."""
    whole = self._mapping.targets[name].shape
    index = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, whole))
    return import_slice(self._mapping, name, index, self._tensors.read, self.specs[name].dtype)


def bare(tensors: Tensors, table: Table) -> Tensors:
  """The tensors of one network without what wrappers put around their names.

  Raises:
    ConversionError: two of them have the same name then.
  """
  originals = names.bare(table, tensors.specs)
  if all(name == original for name, original in originals.items()):
    return tensors
  return _Renamed(tensors, originals)


class View(NamedTuple):
  """A network's tensors, and what does not fit already.

  Attributes:
    tensors: under the names of the network's own layout.
    problems: a line for each tensor of another layout that has no place.
    title: what the file's layout is called; "" for the network's own.
  """

  tensors: Tensors
  problems: list[str]
  title: str = ""


def of_network(tensors: Tensors, table: Table, params: dict[str, Spec]) -> View:
  """The tensors of one network in the network's own layout.

  Args:
    tensors: of a file, or of several.
    table: of the network.
    params: its parameters, by path.

  Raises:
    ConversionError: two tensors have the same name without wrappers.
  """
  plain = bare(tensors, table)
  dialect = names.dialect_of(table, plain.specs)
  if dialect is None:
    return View(tensors=plain, problems=[])
  own = expected_sources(table, params)
  mapping, problems = match(dialect.table(own), plain.specs, own)
  return View(tensors=_Translated(plain, mapping), problems=problems, title=dialect.title)

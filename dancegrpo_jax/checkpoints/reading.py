"""Opens the weight files of a network, and matches their tensors with the network's parameters,
whatever program wrote them.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from dancegrpo_jax.checkpoints import pickled, recognition, views, weight_files
from dancegrpo_jax.checkpoints.safetensors_io import Reader
from dancegrpo_jax.checkpoints.weight_files import HOW
from dancegrpo_jax.conversion.mapping import Mapping, match
from dancegrpo_jax.conversion.table import Spec, Table, problems_text
from dancegrpo_jax.errors import ConversionError, listed
from dancegrpo_jax.types import PyTree

AnyReader = Reader | pickled.Reader


def specs(params: PyTree) -> dict[str, Spec]:
  """The shapes and dtypes of a parameter tree, abstract or not, by path."""
  return {
    path: Spec(tuple(x.shape), np.dtype(x.dtype))
    for path, x in flatten_dict(params, sep="/").items()
  }


def open_reader(
  folder: str | Path,
  variant: str = "",
  allow_pickle: bool = False,
  stem: str = "",
  flag: str = "--config.model.allow_pickle=true",
) -> AnyReader:
  """A reader of a folder's weight files, to be used in a `with` block.

  Args:
    folder, variant, stem: as in `weight_files.find`.
    allow_pickle: whether pickled files may be read where there are no others.
    flag: the flag that allows it, for the message.

  Raises:
    ConversionError: there are no weights, or they can't be read; the message says what is accepted
      and how to get it.
  """
  found = files(folder, variant, stem)
  if not weight_files.is_pickled(found[0]):
    return Reader(found)
  if not allow_pickle:
    pickles = listed(file.name for file in found)
    raise ConversionError(
      f"{folder}: pickled weights only ({pickles}), not .safetensors; {HOW}, or read them through"
      f" torch's weights_only loader with {flag}"
    )
  return pickled.Reader(found)


def files(folder: str | Path, variant: str = "", stem: str = "") -> list[Path]:
  """The weight files of a network, see `weight_files.find`."""
  return weight_files.find(folder, variant, stem)


class Planned(NamedTuple):
  """A network's weights in files, before they are read.

  Attributes:
    tensors: under the names of the network's own layout.
    mapping: of these tensors and the parameters.
  """

  tensors: views.Tensors
  mapping: Mapping


def planned(folder: str | Path, table: Table, reader: AnyReader, params: PyTree) -> Planned:
  """Which tensors of a file become which parameters, whatever the layout of the file is.

  Args:
    folder: for the message.
    table: of the network.
    reader: of its files.
    params: tree with the parameters' shapes and dtypes.

  Raises:
    ConversionError: at most 12 lines: what does not fit, what the file looks like, and how to see
      everything.
  """
  try:
    view = views.of_network(reader, table, specs(params))
    mapping, problems = match(table, view.tensors.specs, specs(params))
    if view.problems or problems:
      lines = view.problems or problems
      raise ConversionError(
        problems_text(table, lines, before=_looks_like(reader, table.name), after=_see_all(folder))
      )
  except ConversionError as error:
    raise ConversionError(f"{folder}: {error}") from error
  return Planned(tensors=view.tensors, mapping=mapping)


def _looks_like(reader: AnyReader, network: str) -> str:
  """A line that says what a file is and what to do with it; "" where it isn't known, and where it
  is of the network that was looked for.
  """
  kind = recognition.other_kind(reader.specs, network)
  if kind is None:
    return ""
  return f"it looks like {kind.title}" + (f"; {kind.remedy}" if kind.remedy else "")


def _see_all(folder: str | Path) -> str:
  return f"to see all: python -m dancegrpo_jax.convert inspect {folder}"

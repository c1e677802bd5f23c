"""The names of a file's tensors without what wrappers put around them, and the layout that they are
in.

A file's tensors may be named as

    module.visual.proj                                   wrapped for several GPUs (DDP, open_clip)
    _orig_mod.conv_in.weight                             compiled by torch
    model.state_dict.conv_in.weight                      an attribute of a trainer
    model.diffusion_model.input_blocks.0.0.weight        one of several networks in a file
"""

from collections.abc import Iterable

from dancegrpo_jax.conversion.mapping import canonical_name
from dancegrpo_jax.conversion.table import Dialect, Table, matches
from dancegrpo_jax.errors import ConversionError

# Modules that torch and its companions put around others. Their names may stand anywhere.
_WRAPPERS = (
  "module",
  "_orig_mod",
  "_fsdp_wrapped_module",
  "_checkpoint_wrapped_module",
  "_forward_module",
)
# What trainers call the network that they train, and the places in which they save it.
_OUTER = (
  "model",
  "net",
  "network",
  "state_dict",
  "model_state_dict",
  "ema",
  "ema_model",
  "model_ema",
  "shadow_params",
  "averaged_model",
)


def bare(table: Table, names: Iterable[str]) -> dict[str, str]:
  """The names of one network's tensors without wrappers and prefixes, and the file's names of them.

  Where the tensors of the file begin with one of the table's prefixes, the others are left out,
  because they belong to other networks.

  Args:
    table: of the network.
    names: of all tensors of a file.

  Raises:
    ConversionError: two tensors of the file have the same name without wrappers.
  """
  own = {segment for row in table.rows for segment in row.source.split(".")}
  wrappers = [segment for segment in _WRAPPERS if segment not in own]
  result: dict[str, str] = {}
  for name in names:
    short = ".".join(segment for segment in name.split(".") if segment not in wrappers)
    other = result.setdefault(short, name)
    if other != name:
      raise ConversionError(
        f"tensors {other} and {name}: the same tensor {short} twice; save one of the networks alone"
      )
  chosen = _of_network(table, result)
  return result if chosen is None else chosen


def _of_network(table: Table, names: dict[str, str]) -> dict[str, str] | None:
  """The part of the names that has a prefix of the network, or of trainers, without it; None where
  no prefix is found.
  """
  own = {row.source.split(".")[0] for row in table.rows}
  outer = ""
  while True:
    for prefix in table.prefixes:
      chosen = {
        name.removeprefix(outer + prefix): original
        for name, original in names.items()
        if name.startswith(outer + prefix)
      }
      if chosen:
        return chosen
    inner = [name.removeprefix(outer) for name in names]
    first = {name.split(".")[0] for name in inner if not is_left_out(table, name)}
    segment = next(iter(first)) if len(first) == 1 else ""
    if segment not in _OUTER or segment in own:
      break
    outer += f"{segment}."
  if not outer:
    return None
  return {name.removeprefix(outer): original for name, original in names.items()}


def is_left_out(table: Table, name: str) -> bool:
  """Whether a tensor is no parameter of the network, by the table's `others`."""
  return any(matches(pattern, name) for pattern in table.others)


def dialect_of(table: Table, names: Iterable[str]) -> Dialect | None:
  """The other layout that tensors of these bare names are in; None where it is the table's own."""
  names = list(names)
  for dialect in table.dialects:
    if all(any(matches(mark, name) for name in names) for mark in dialect.marks):
      return dialect
  return None


def share(table: Table, names: Iterable[str]) -> float:
  """How many of some bare names are those of a network, from 0 to 1.

  Args:
    table: of the network.
    names: without wrappers, see `bare`.
  """
  spellings = [canonical_name(table, name) for name in names]
  patterns = [row.source for row in table.rows] + [buffer.source for buffer in table.buffers]
  known = sum(any(matches(pattern, name) for pattern in patterns) for name in spellings)
  return known / max(1, len(spellings))

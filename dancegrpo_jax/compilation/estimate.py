"""An estimate of the memory that a program takes on a device, from its trace: nothing is compiled.

The operations are taken one after another, as they were traced, and a result is in memory from
there to its last use. The compiler reorders, fuses and reuses, so that its own number is another
one. Of what the programs of emoji_clip compute it allots 0.9 to 1.8 times the estimate on a CPU,
and of flux_hps_lora 0.5 to 1.6 times by a plan for an H100.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import jax

from dancegrpo_jax.assembly import loading
from dancegrpo_jax.compilation import inventory
from dancegrpo_jax.compilation.calls import Call
from dancegrpo_jax.compilation.inventory import Inventory

FACTOR = 1.5  # by which the compiler is assumed to exceed the estimate of what is computed

# Operations that the compiler computes inside of what uses their results.
_FUSED = (
  *("broadcast_in_dim", "convert_element_type", "copy", "copy_p", "expand_dims", "iota"),
  *("reshape", "sharding_constraint", "slice", "squeeze", "stop_gradient", "transpose"),
)


def needed(taken: Inventory, call: Call, shards: int) -> float:
  """Bytes of a device's memory while a program runs: its arguments, what else stays there, and
  `FACTOR` times what it computes.

  Args:
    taken: all programs of the run.
    call: one of them. The caller has entered the mesh.
    shards: devices that split the samples.
  """
  arguments = sum(map(loading.device_bytes, jax.tree.leaves(call.arguments)))
  computed = FACTOR * temporaries(call, shards)
  return inventory.kept_bytes(taken, call) + arguments + computed


def temporaries(call: Call, shards: int) -> float:
  """Bytes on each device of all that a program computes, its results among them.

  Args:
    call: the program. The caller has entered the mesh.
    shards: devices that split the samples. What has the shape of an argument is split as that one,
      and everything else over all of them.
  """
  traced = call.program.trace(*call.arguments)
  leaves = [leaf for leaf in jax.tree.leaves(call.arguments) if leaf.sharding is not None]
  known = {leaf.shape: loading.device_bytes(leaf) / _size(leaf) for leaf in leaves}
  return _peak(traced.jaxpr.jaxpr, known, shards)


def allotted(memory: Any) -> int:
  """Bytes of a device's memory that a compiled program takes.

  Args:
    memory: the program's `memory_analysis()`.
  """
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  added = results + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
  return memory.argument_size_in_bytes + added


def operations(jaxpr: Any) -> int:
  """The number of operations in a jaxpr, those inside of loops once."""
  return sum(1 + sum(map(operations, _inner(eqn.params))) for eqn in jaxpr.eqns)


def kernels(jaxpr: Any) -> set[str]:
  """The attention kernels of models/attention.py in a jaxpr; xla's is no operation of its own."""
  names = {eqn.primitive.name for eqn in jaxpr.eqns}
  found = {"splash"} if "pallas_call" in names else set()
  if any("dot_product_attention" in name for name in names):
    found.add("cudnn")
  inner = [each for eqn in jaxpr.eqns for each in _inner(eqn.params)]
  return found.union(*map(kernels, inner))


def _peak(jaxpr: Any, known: dict[tuple[int, ...], float], shards: int) -> float:
  """Bytes of all that is computed in a jaxpr, when they are most."""
  last: dict[Any, int] = {}  # the operation that uses a variable last
  for number, variables in enumerate([*(eqn.invars for eqn in jaxpr.eqns), jaxpr.outvars]):
    last |= {var: number for var in variables if _is_variable(var)}
  alive: dict[Any, float] = {}  # bytes by variable
  peak = 0.0
  for number, eqn in enumerate(jaxpr.eqns):
    made = {var: _bytes(var, known, shards) for var in eqn.outvars if last.get(var, -1) > number}
    if eqn.primitive.name in _FUSED:
      made = dict.fromkeys(made, 0.0)
    used = {var for var in eqn.invars if _is_variable(var) and last[var] == number} & set(alive)
    inner = max((_peak(each, known, shards) for each in _inner(eqn.params)), default=0.0)
    before, new = sum(alive.values()), sum(made.values())
    freed = sum(alive.pop(var) for var in used)
    # An operation on single elements writes into an operand that nobody needs any more.
    kept = before - min(freed, new) if _is_elementwise(eqn) else before
    # What is inside makes the results.
    peak = max(peak, kept + max(inner, new))
    alive |= made
  return peak


def _is_variable(atom: Any) -> bool:
  """Whether it is no constant in the program's text."""
  return not hasattr(atom, "val")


def _is_elementwise(eqn: Any) -> bool:
  if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
    return False
  return len({var.aval.shape for var in (*eqn.invars, *eqn.outvars) if var.aval.shape}) == 1


def _bytes(var: Any, known: dict[tuple[int, ...], float], shards: int) -> float:
  aval = var.aval
  if not hasattr(aval, "dtype") or not hasattr(aval.dtype, "itemsize"):
    return 0.0
  size = prod(aval.shape) * aval.dtype.itemsize
  return size * known.get(aval.shape, 1 / shards)


def _size(leaf: Any) -> int:
  return max(1, prod(leaf.shape) * leaf.dtype.itemsize)


def _inner(params: dict[str, Any]) -> Sequence[Any]:
  """The jaxprs among an equation's parameters."""
  values: list[Any] = []
  for value in params.values():
    values += value if isinstance(value, (tuple, list)) else (value,)
  opened = [getattr(value, "jaxpr", value) for value in values]
  return [value for value in opened if hasattr(value, "eqns")]

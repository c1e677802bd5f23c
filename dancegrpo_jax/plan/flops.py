"""FLOPs of a traced program, from the shapes of its matrix products and convolutions.

XLA's own count takes the body of a loop once; here a scan counts as often as it runs. A product of
[n, k] and [k, m] is 2 n k m; everything else (norms, activations, the optimizer) is not counted, as
is usual where MFU is stated.
"""

from math import prod
from typing import Any, NamedTuple


class Flops(NamedTuple):
  """A count, and what it leaves out.

  Attributes:
    total: of all devices together.
    kernels: the part of it that is inside Pallas kernels.
    unknown: primitives that may hold products and could not be counted: loops of unknown length
      (counted once), foreign code.
  """

  total: float
  kernels: float = 0.0
  unknown: frozenset[str] = frozenset()

  def __add__(self, other: "Flops") -> "Flops":  # type: ignore[override]  # not a longer tuple
    return Flops(
      self.total + other.total, self.kernels + other.kernels, self.unknown | other.unknown
    )

  def times(self, count: float | int) -> "Flops":
    """The same, `count` times over."""
    return self._replace(total=self.total * count, kernels=self.kernels * count)


def count(jaxpr: Any, platform: str, turns: float | int | None = None) -> Flops:
  """FLOPs of a jaxpr (`jit(f).trace(...).jaxpr`).

  Args:
    jaxpr: closed or open.
    platform: whose branches of `jax.lax.platform_dependent` count: cpu, gpu or tpu.
    turns: of the outermost loops whose length is not in the program; without it their bodies count
      once, and the result says so.
  """
  names_of = {"gpu": {"gpu", "cuda", "rocm"}}.get(platform, {platform})
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  total, places = Flops(0.0), {}
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name == "platform_index":
      kinds = eqn.params["platforms"]
      mine = [i for i, names in enumerate(kinds) if names is None or names_of & set(names)]
      places[eqn.outvars[0]] = mine[0] if mine else None  # None: the largest counts
    elif name == "cond":
      index = places.get(eqn.invars[0]) if not hasattr(eqn.invars[0], "val") else None
      branches = [count(branch, platform, turns) for branch in eqn.params["branches"]]
      total += (
        branches[index] if index is not None else max(branches, key=lambda branch: branch.total)
      )
    else:
      total += _equation(eqn, platform, turns)
  return total


def _equation(eqn: Any, platform: str, turns: float | int | None) -> Flops:
  """One equation that is no branch."""
  name, params = eqn.primitive.name, eqn.params
  if name == "dot_general":
    return Flops(_dot(eqn))
  if name == "conv_general_dilated":
    return Flops(_convolution(eqn))
  if name == "scan":
    return count(params["jaxpr"], platform, turns).times(params["length"])
  if name == "while":
    body = count(params["body_jaxpr"], platform)
    if turns is not None:
      return body.times(turns)
    return body._replace(unknown=body.unknown | {"while"}) if body.total else body
  if name == "pallas_call":
    kernel = count(params["jaxpr"], platform).times(prod(params["grid_mapping"].grid))
    return kernel._replace(kernels=kernel.total)
  if name in ("ragged_dot", "ffi_call"):
    return Flops(0.0, unknown=frozenset({name}))
  inner = sum((count(sub, platform, turns) for sub in _jaxprs(params)), Flops(0.0))
  if name == "shard_map":  # the body is one device's part
    axes = (
      params.get("newly_manual_axes") or params.get("manual_axes") or params["mesh"].shape
    )  # by version
    return inner.times(prod(params["mesh"].shape[axis] for axis in axes))
  return inner


def _jaxprs(params: dict[str, Any]) -> list[Any]:
  """The jaxprs that an equation holds: of jit, checkpoint, custom derivatives ..."""
  values = [
    item
    for value in params.values()
    for item in (value if isinstance(value, (tuple, list)) else (value,))
  ]
  return [value for value in values if hasattr(getattr(value, "jaxpr", value), "eqns")]


def _dot(eqn: Any) -> float:
  (contracted, _), _ = eqn.params["dimension_numbers"]
  lhs = eqn.invars[0].aval.shape
  return 2.0 * prod(eqn.outvars[0].aval.shape) * prod(lhs[axis] for axis in contracted)


def _convolution(eqn: Any) -> float:
  """Zeros that a transposed convolution puts between its inputs are not counted."""
  rhs, params = eqn.invars[1].aval.shape, eqn.params
  features = rhs[params["dimension_numbers"].rhs_spec[0]]
  return 2.0 * prod(eqn.outvars[0].aval.shape) * prod(rhs) / features / prod(params["lhs_dilation"])

"""Counts the FLOPs of a traced program, from the shapes of its matrix products and convolutions.

XLA's own count has the body of a loop once. Here a scan counts as often as it runs. A product of
[n, k] and [k, m] is 2 n k m. Everything else (norms, activations, the optimizer) is not counted, as
is usual for MFU.
"""

from math import prod
from typing import Any, NamedTuple


class Flops(NamedTuple):
  """A count, and what it leaves out.

  Attributes:
    total: FLOPs of all devices together.
    kernels: the part of `total` that is inside of Pallas kernels.
    unknown: primitives that may have products and could not be counted: loops of unknown length,
      whose bodies count once, and calls of foreign code.
  """

  total: float
  kernels: float = 0.0
  unknown: frozenset[str] = frozenset()

  def __add__(self, other: "Flops") -> "Flops":  # type: ignore[override]  # not a longer tuple
    return Flops(
      self.total + other.total, self.kernels + other.kernels, self.unknown | other.unknown
    )

  def times(self, count: float | int) -> "Flops":
    """The FLOPs of `count` executions."""
    return self._replace(total=self.total * count, kernels=self.kernels * count)


def count(jaxpr: Any, platform: str, turns: float | int | None = None) -> Flops:
  """FLOPs of a jaxpr.

  Of a conditional's branches the one with the most FLOPs counts, or, if it chooses by the platform,
  the branch of `platform`.

  Args:
    jaxpr: `jit(f).trace(...).jaxpr`, closed or open.
    platform: cpu, gpu or tpu, for the branches of `jax.lax.platform_dependent`.
    turns: how often the outermost loops run whose length is not in the program. Without it their
      bodies count once, and the result has "while" among its unknown primitives.
  """
  aliases = {"gpu": {"gpu", "cuda", "rocm"}}.get(platform, {platform})
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  total = Flops(0.0)
  chosen: dict[Any, int] = {}  # the branch that a platform's index selects, by its variable
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name == "platform_index":
      for number, names in enumerate(eqn.params["platforms"]):
        if names is None or aliases & set(names):
          chosen.setdefault(eqn.outvars[0], number)
    elif name == "cond":
      selector = eqn.invars[0]
      is_literal = hasattr(selector, "val")  # a literal cannot be looked up: it has no hash
      index = None if is_literal else chosen.get(selector)
      branches = [count(branch, platform, turns) for branch in eqn.params["branches"]]
      if index is None:
        total += max(branches, key=lambda branch: branch.total)
      else:
        total += branches[index]
    else:
      total += _equation(eqn, platform, turns)
  return total


def _equation(eqn: Any, platform: str, turns: float | int | None) -> Flops:
  """FLOPs of one equation that is not a conditional."""
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
  if name == "shard_map":  # the body is what one device computes
    # Versions of JAX name these axes differently.
    axes = params.get("newly_manual_axes") or params.get("manual_axes") or params["mesh"].shape
    return inner.times(prod(params["mesh"].shape[axis] for axis in axes))
  return inner


def _jaxprs(params: dict[str, Any]) -> list[Any]:
  """The jaxprs among an equation's parameters, as of jit, checkpoint and custom derivatives."""
  values: list[Any] = []
  for value in params.values():
    values += value if isinstance(value, (tuple, list)) else (value,)
  return [value for value in values if hasattr(getattr(value, "jaxpr", value), "eqns")]


def _dot(eqn: Any) -> float:
  (contracted, _), _ = eqn.params["dimension_numbers"]
  lhs = eqn.invars[0].aval.shape
  return 2.0 * prod(eqn.outvars[0].aval.shape) * prod(lhs[axis] for axis in contracted)


def _convolution(eqn: Any) -> float:
  """FLOPs of a convolution, without the zeros that a transposed one puts between its inputs."""
  rhs, params = eqn.invars[1].aval.shape, eqn.params
  features = rhs[params["dimension_numbers"].rhs_spec[0]]
  return 2.0 * prod(eqn.outvars[0].aval.shape) * prod(rhs) / features / prod(params["lhs_dilation"])

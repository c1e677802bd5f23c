"""The rules that place parameters on the mesh, as far as they can be read without a network."""

import re
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from dancegrpo_jax.devices.sharding import AXES, REST
from dancegrpo_jax.settings.checks.values import problem


def rules(config: ConfigDict) -> Iterator[str]:
  """Whether each rule is a regular expression and a partition over known axes."""
  for name in ("rules", "reward_rules"):
    for rule in config.mesh[name]:
      yield from _rule(f"mesh.{name}", rule)


def _rule(field: str, rule: Any) -> Iterator[str]:
  is_pair = isinstance(rule, (tuple, list)) and len(rule) == 2 and isinstance(rule[0], str)
  if not is_pair or not isinstance(rule[1], (tuple, list)):
    remedy = 'must be (regex, partition spec), as (".*/kernel", (None, "fsdp"))'
    yield problem(field, rule, remedy)
    return
  pattern, spec = rule
  try:
    re.compile(pattern)
  except re.error as error:
    yield problem(field, pattern, f"not a regular expression: {error}")
  axes: list[Any] = []
  for entry in spec[1:] if spec and spec[0] == REST else spec:
    axes += entry if isinstance(entry, (tuple, list)) else (entry,)
  for axis in axes:
    if axis is not None and axis not in AXES:
      remedy = f"unknown mesh axis {axis!r}; one of {', '.join(AXES)}, or None"
      yield problem(field, rule, remedy)
  if "data" in axes and "tensor" in axes:
    compiler = "the compiler gets gradients of such kernels wrong"
    yield problem(field, rule, f"data beside tensor: {compiler}; use fsdp in place of data")

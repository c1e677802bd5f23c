"""What a compiled program's text says: its collectives, and the cycles that the TPU compiler
expects of each operation.

A loop's body stands in the text once; here it counts as often as it runs, which its condition says
(`i < constant`).
"""

import re
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

_WIDTH = {
  "pred": 1,
  "s8": 1,
  "u8": 1,
  "bf16": 2,
  "f16": 2,
  "s16": 2,
  "u16": 2,
  "f64": 8,
  "s64": 8,
  "u64": 8,
}  # others 4
# How often a collective moves the larger of what goes in and comes out, per device, on a ring; (n -
# 1) / n is left out.
_MOVED = {
  "all-gather": 1,
  "reduce-scatter": 1,
  "all-reduce": 2,
  "all-to-all": 1,
  "ragged-all-to-all": 1,
  "collective-permute": 1,
}
# one collective, which several fusions do a part of each while they compute
_PART = '"async_collective_fusion_config"'
# how libtpu names a fusion that does a reduce-scatter; inside stands an all-reduce
_SCATTER = "all-reduce-scatter"
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")


class Instruction(NamedTuple):
  """A line: its name, shapes of the result, opcode and the rest of the text."""

  name: str
  shape: str
  opcode: str
  rest: str


class Collective(NamedTuple):
  """A collective of a program.

  Attributes:
    opcode: all-gather, reduce-scatter, all-reduce ...
    shape: of the result, as text.
    bytes: the larger of what goes in and comes out on a device, of one execution.
    times: executions of one call of the program.
    source: the operation in the traced program that it comes from.
  """

  opcode: str
  shape: str
  bytes: int
  times: float
  source: str

  @property
  def moved(self) -> float:
    """Bytes that a device sends or receives in one call of the program."""
    return self.bytes * self.times * _MOVED[self.opcode]


class Summary(NamedTuple):
  """A compiled program.

  Attributes:
    collectives: all of them.
    cycles: the compiler's expectation for everything else, 0 where it states none.
    unknown: loops whose length the text doesn't tell; they count once.
    kernels: custom calls by the name of their target, with executions: they have no expectation.
  """

  collectives: list[Collective]
  cycles: float
  unknown: int
  kernels: dict[str, float]


def size(shape: str) -> int:
  """Bytes of a shape's text, a tuple's parts together."""
  return sum(
    _WIDTH.get(kind, 4) * prod(int(n) for n in dims.split(",") if n)
    for kind, dims in _SHAPE.findall(shape)
  )


def largest(shape: str) -> int:
  """Bytes of the largest part of a shape's text."""
  return max((size(f"{kind}[{dims}]") for kind, dims in _SHAPE.findall(shape)), default=0)


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Instructions by computation, and the entry's name."""
  found, entry, current = {}, "", None
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      current = found.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      current.append(Instruction(*match.groups()))
  return found, entry


def summary(text: str, turns: float | int | None = None) -> Summary:
  """Reads `compiled.as_text()`.

  Args:
    text: of a compiled program.
    turns: of the outermost loops whose length the text does not state; without it their bodies
      count once, and they are counted as unknown, as such loops inside them are.
  """
  code, entry = computations(text)
  collectives, parts, kernels, cycles, unknown = [], {}, {}, 0.0, 0
  for instruction, times, inside, known in _executions(code, entry, turns=turns):
    opcode = instruction.opcode.removesuffix("-start")
    unknown += not known
    if opcode in _MOVED:
      found = _collective(opcode, instruction, inside, times)
      channel = re.search(r"channel_id=(\d+)", instruction.rest)
      if _PART in instruction.rest and channel:  # of its parts the start is what runs least often
        parts[channel[1]] = min(parts.get(channel[1], found), found, key=lambda part: part.times)
      else:
        collectives.append(found)
    elif opcode == "custom-call":
      target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
      kernels[target[1] if target else "?"] = kernels.get(target[1] if target else "?", 0.0) + times
    expected = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
    cycles += times * int(expected[1]) if expected else 0.0
  return Summary([*collectives, *parts.values()], cycles, unknown, kernels)


def _collective(
  opcode: str, instruction: Instruction, inside: dict[str, str], times: float
) -> Collective:
  operands = [
    inside.get(name, "") for name in re.findall(r"%([\w.\-]+)", instruction.rest.split("), ")[0])
  ]
  source = re.search(r'op_name="([^"]*)"', instruction.rest)
  moved = max(_result_size(instruction), sum(map(size, operands)))
  return Collective(opcode, instruction.shape, moved, times, source[1] if source else "")


def _result_size(instruction: Instruction) -> int:
  """Bytes of a collective's result. A -start's shape holds what goes in as well: (in, out, ..) or
  ((in, ..), (out, ..)).
  """
  shape = re.sub(r"\{[^}]*\}", "", instruction.shape)  # layouts have parentheses too
  if not instruction.opcode.endswith("-start") or instruction.opcode == "all-reduce-start":
    return size(shape)
  return (
    max(map(size, re.findall(r"\(([^()]*)\)", shape))) if shape.startswith("((") else largest(shape)
  )


def _executions(
  code: dict[str, list[Instruction]],
  name: str,
  times: float = 1.0,
  turns: float | int | None = None,
) -> Iterator[tuple[Instruction, float, dict[str, str], bool]]:
  """Every instruction that runs, how often, the shapes beside it, and whether a loop's length is
  known; longest branches.
  """
  inside = {instruction.name: instruction.shape for instruction in code.get(name, ())}
  for instruction in code.get(name, ()):
    trips: float | None = 1.0
    within, opcode = turns, instruction.opcode
    if opcode == "while" and (trips := _trips(code, instruction)) is None:
      trips, within = turns, None
    yield instruction, times, inside, trips is not None
    if opcode in ("while", "call", "async-start"):
      for called in _CALLED.findall(instruction.rest):
        yield from _executions(code, called, times * (1.0 if trips is None else trips), within)
    elif opcode == "fusion":  # its cycles are stated at the fusion itself
      for called in _CALLED.findall(instruction.rest):
        parts = (
          part
          for part in _executions(code, called, times, turns)
          if part[0].opcode.removesuffix("-start") in _MOVED
        )
        yield from map(_scattered, parts) if called.startswith(_SCATTER) else parts
    elif opcode == "conditional":
      branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
      named = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.rest)
      named = re.findall(r"[\w.\-]+", branches[1]) if branches else named
      yield from max(
        (list(_executions(code, branch, times, turns)) for branch in named), key=_weight, default=[]
      )


def _scattered(part: tuple) -> tuple:
  """An all-reduce of which each device keeps its share alone."""
  instruction, *rest = part
  return (
    instruction._replace(opcode="reduce-scatter")
    if instruction.opcode == "all-reduce"
    else instruction,
    *rest,
  )


def _weight(executions: list) -> float:
  """The cycles of a branch, and its length where none are stated."""
  stated = [
    (times, re.search(r'"estimated_cycles":"(\d+)"', instruction.rest))
    for instruction, times, *_ in executions
  ]
  return sum(times * int(found[1]) for times, found in stated if found) + 1e-3 * len(executions)


def _trips(code: dict[str, list[Instruction]], loop: Instruction) -> float | None:
  """How often a loop runs: what the text states, or the constant that its counter, from 0, is
  compared with.
  """
  stated = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
  if stated:
    return float(stated[1])
  condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
  if condition is None:
    return None
  reached = [
    name
    for instruction in code.get(condition[1], ())
    for name in (_CALLED.findall(instruction.rest))
  ]
  lines = [line for name in (condition[1], *reached) for line in code.get(name, ())]
  numbers = [
    re.match(r"(\d+)\)", line.rest)
    for line in lines
    if line.opcode == "constant" and re.match(r"[su]32", line.shape)
  ]
  constants = [int(number[1]) for number in numbers if number]
  less = any(line.opcode == "compare" and "direction=LT" in line.rest for line in lines)
  return float(constants[0]) if less and len(constants) == 1 else None

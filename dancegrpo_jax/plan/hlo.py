"""Reads the text of a compiled program: its collectives, and the cycles that the TPU compiler
expects of each operation.

The text has the body of a loop once. Here it counts as often as it runs, which XLA states or the
loop's condition shows (`i < constant`).
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

# Bytes of an element, by the type's name; all others take 4.
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
}
# How often a collective moves the larger of its input and output through each device, on a ring of
# n devices. The factor (n - 1) / n is left out.
_MOVED = {
  "all-gather": 1,
  "reduce-scatter": 1,
  "all-reduce": 2,
  "all-to-all": 1,
  "ragged-all-to-all": 1,
  "collective-permute": 1,
}
# Marks a collective that several fusions each do a part of while they compute.
_PART = '"async_collective_fusion_config"'
# Begins libtpu's name of a fusion that does a reduce-scatter; its text has an all-reduce.
_SCATTER = "all-reduce-scatter"
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIP_COUNT = re.compile(r'known_trip_count":\{"n":"(\d+)"')


class Instruction(NamedTuple):
  """A line of the text: its name, the shape of its result, its opcode, and all that follows."""

  name: str
  shape: str
  opcode: str
  rest: str

  @property
  def cycles(self) -> int:
    """The cycles that the compiler expects of it, 0 where the line states none."""
    match = _CYCLES.search(self.rest)
    return int(match[1]) if match else 0

  @property
  def called(self) -> list[str]:
    """Names of the computations that it calls."""
    return _CALLED.findall(self.rest)


Code = dict[str, list[Instruction]]  # instructions by computation


class Execution(NamedTuple):
  """An instruction, as one call of the program executes it.

  Attributes:
    instruction: the instruction.
    times: how often it is executed.
    shapes: the shapes of all instructions beside it, by name; its operands are among them.
    has_length: False for a loop of which it is unknown how often its body runs.
  """

  instruction: Instruction
  times: float
  shapes: dict[str, str]
  has_length: bool = True

  @property
  def collective(self) -> str:
    """The opcode without "-start" if it is a collective, else ""."""
    opcode = self.instruction.opcode.removesuffix("-start")
    return opcode if opcode in _MOVED else ""


class Collective(NamedTuple):
  """A collective of a program.

  Attributes:
    opcode: all-gather, reduce-scatter, all-reduce ...
    shape: the shape of the result, as text.
    bytes: the larger of input and output on a device, in one execution.
    times: executions in one call of the program.
    source: the operation of the traced program that it comes from.
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
    collectives: all collectives.
    cycles: the cycles that the compiler expects of everything else, 0 where it states none.
    unknown: loops whose length the text does not show; their bodies count once.
    kernels: executions of custom calls, by the name of the target. No cycles are stated for them.
  """

  collectives: list[Collective]
  cycles: float
  unknown: int
  kernels: dict[str, float]


def size(shape: str) -> int:
  """Bytes of a shape, given as text; a tuple's parts are added."""
  return sum(
    _WIDTH.get(kind, 4) * prod(int(length) for length in lengths.split(",") if length)
    for kind, lengths in _SHAPE.findall(shape)
  )


def largest(shape: str) -> int:
  """Bytes of the largest part of a shape, given as text."""
  return max((size(f"{kind}[{dims}]") for kind, dims in _SHAPE.findall(shape)), default=0)


def computations(text: str) -> tuple[Code, str]:
  """The instructions of a program by computation, and the name of the entry computation."""
  code: Code = {}
  entry, current = "", None
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      current = code.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      current.append(Instruction(*match.groups()))
  return code, entry


def summary(text: str, turns: float | int | None = None) -> Summary:
  """Sums up a compiled program.

  Args:
    text: the compiled program, `compiled.as_text()`.
    turns: how often the outermost loops run whose length the text does not show. Without it their
      bodies count once and they count as unknown, as such loops inside of them always do.
  """
  code, entry = computations(text)
  collectives: list[Collective] = []
  parts: dict[str, Collective] = {}  # by channel
  kernels: dict[str, float] = defaultdict(float)
  cycles, unknown = 0.0, 0
  for execution in _executions(code, entry, 1.0, turns):
    instruction, times = execution.instruction, execution.times
    cycles += times * instruction.cycles
    if not execution.has_length:
      unknown += 1
    if execution.collective:
      collective = _collective(execution)
      channel = re.search(r"channel_id=(\d+)", instruction.rest)
      if _PART in instruction.rest and channel:
        # All parts together move the data once. The part that starts it runs least often.
        others = parts.get(channel[1], collective)
        parts[channel[1]] = min(others, collective, key=lambda part: part.times)
      else:
        collectives.append(collective)
    elif instruction.opcode == "custom-call":
      target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
      kernels[target[1] if target else "?"] += times
  return Summary([*collectives, *parts.values()], cycles, unknown, dict(kernels))


def _collective(execution: Execution) -> Collective:
  instruction = execution.instruction
  operands = re.findall(r"%([\w.\-]+)", instruction.rest.split("), ")[0])
  taken = sum(size(execution.shapes.get(name, "")) for name in operands)
  source = re.search(r'op_name="([^"]*)"', instruction.rest)
  return Collective(
    opcode=execution.collective,
    shape=instruction.shape,
    bytes=max(_result_size(instruction), taken),
    times=execution.times,
    source=source[1] if source else "",
  )


def _result_size(instruction: Instruction) -> int:
  """Bytes of a collective's result. The shape of a -start has its input too, as (in, out, ..) or
  ((in, ..), (out, ..)).
  """
  shape = re.sub(r"\{[^}]*\}", "", instruction.shape)  # without layouts, which have parentheses too
  if not instruction.opcode.endswith("-start") or instruction.opcode == "all-reduce-start":
    return size(shape)
  if shape.startswith("(("):
    return max(map(size, re.findall(r"\(([^()]*)\)", shape)))
  return largest(shape)


def _executions(
  code: Code, computation: str, times: float, turns: float | int | None
) -> Iterator[Execution]:
  """What a computation executes, with all that it calls.

  Args:
    code: of the program.
    computation: its name.
    times: how often it is executed.
    turns: as for `summary`.
  """
  instructions = code.get(computation, [])
  shapes = {instruction.name: instruction.shape for instruction in instructions}
  for instruction in instructions:
    execution, opcode = Execution(instruction, times, shapes), instruction.opcode
    if opcode == "while":
      trips, inner_turns = _trips(code, instruction), turns
      if trips is None:
        trips, inner_turns = turns, None
      yield execution._replace(has_length=trips is not None)
      for body in instruction.called:
        yield from _executions(code, body, times * (1.0 if trips is None else trips), inner_turns)
      continue
    yield execution
    if opcode in ("call", "async-start"):
      for called in instruction.called:
        yield from _executions(code, called, times, turns)
    elif opcode == "fusion":
      for called in instruction.called:
        yield from _collectives_of_a_fusion(code, called, times, turns)
    elif opcode == "conditional":
      branches = [list(_executions(code, name, times, turns)) for name in _branches(instruction)]
      yield from max(branches, key=_weight, default=[])


def _collectives_of_a_fusion(
  code: Code, computation: str, times: float, turns: float | int | None
) -> Iterator[Execution]:
  """The collectives inside of a fusion, whose stated cycles cover everything else in it."""
  for execution in _executions(code, computation, times, turns):
    instruction = execution.instruction
    if computation.startswith(_SCATTER) and instruction.opcode == "all-reduce":
      # Each device keeps its share alone.
      execution = execution._replace(instruction=instruction._replace(opcode="reduce-scatter"))
    if execution.collective:
      yield execution


def _branches(conditional: Instruction) -> list[str]:
  """Names of the computations among which a conditional chooses."""
  listed = re.search(r"branch_computations=\{([^}]*)\}", conditional.rest)
  if listed:
    return re.findall(r"[\w.\-]+", listed[1])
  return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", conditional.rest)


def _weight(branch: list[Execution]) -> float:
  """Orders branches by their cycles, and by their length where these are equal or not stated."""
  return sum(part.times * part.instruction.cycles for part in branch) + 1e-3 * len(branch)


def _trips(code: Code, loop: Instruction) -> float | None:
  """How often the body of a loop runs: as XLA states it, or as the condition `i < constant` shows
  it for a counter that starts at 0. None where neither does.
  """
  stated = _TRIP_COUNT.search(loop.rest)
  if stated:
    return float(stated[1])
  condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
  if condition is None:
    return None
  instructions = list(code.get(condition[1], []))
  for called in [name for instruction in instructions for name in instruction.called]:
    instructions += code.get(called, [])  # the comparison may be in a fusion
  compares = [i for i in instructions if i.opcode == "compare" and "direction=LT" in i.rest]
  limits = [
    number[1]
    for instruction in instructions
    if instruction.opcode == "constant" and re.match(r"[su]32", instruction.shape)
    if (number := re.match(r"(\d+)\)", instruction.rest))
  ]
  return float(limits[0]) if compares and len(limits) == 1 else None

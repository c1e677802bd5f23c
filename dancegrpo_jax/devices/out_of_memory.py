"""Turns running out of memory into one line: which program, how much it requested, what to change.

XLA's message differs between platforms. It comes while XLA compiles, when a program starts, or
later, where the host waits for a result. So that such a late error can be traced to its program
too, `Guarded` programs leave weak references to their results.

JAX is imported inside of functions: every command imports this module, and must answer a misspelt
flag at once.
"""

import contextlib
import os
import re
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dancegrpo_jax import errors

_SPLIT = "more devices along mesh.fsdp with mesh.rules that split"
_CHUNKED = ("a smaller rollout.chunk", _SPLIT)
# What to change, by the first word of the program that ran out of memory. Others use `_CHUNKED`.
REMEDIES = {
  "update": (
    "a smaller optimizer.microbatch",
    "model.remat = True",
    "a lora.rank above 0",
    _SPLIT,
  ),
  "sample": (
    "a smaller evaluation.prompts or, in sample and evaluate, rollout.chunk",
    "a smaller mesh.lanes",
    _SPLIT,
  ),
  "encode": (
    "data.cache_embeddings = True",
    "a smaller data.prompts_per_iteration",
    "mesh.rules that split the encoders over fsdp",
  ),
  "features": ("a smaller data.prompts_per_iteration", "mesh.reward_rules that split over fsdp"),
  "loading": (
    "a lora.rank above 0",
    "data.cache_embeddings = True",
    "model.frozen_dtype = bfloat16",
    _SPLIT,
  ),
  "": ("a smaller rollout.chunk or optimizer.microbatch", _SPLIT),  # the program is unknown
  "pretraining": ("a smaller batch of the stage",),
}
_IS_ABOUT_MEMORY = re.compile(
  r"RESOURCE_EXHAUSTED|out of memory|OUT_OF_MEMORY|bad_alloc", re.IGNORECASE
)
_AMOUNT = r"([\d.]+) ?([KMGT]?)(?:i?B\b|bytes)?"
_REQUESTED = (
  re.compile(rf"Used {_AMOUNT} of"),  # a TPU's compiler
  re.compile(rf"(?:allocate|allocating|reserve)(?: request for)? {_AMOUNT}"),
  re.compile(rf"requires?[^(\d]*\(?{_AMOUNT}"),
)
_AVAILABLE = (re.compile(rf"Used \S+ of {_AMOUNT} hbm"), re.compile(rf"There are {_AMOUNT} free"))
# A TPU's small, fast memories, in which kernels work.
_OTHER_MEMORY = re.compile(r"memory space (?!hbm)")
# CUDA itself and its libraries lack memory, which they take from what JAX leaves.
_OUTSIDE = "CUDA_ERROR_OUT_OF_MEMORY"
_SCALE = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Shortage(NamedTuple):
  """What an error message contains about memory. Amounts are bytes, None where there is none.

  Attributes:
    requested: the memory that a program needs, or the allocation that failed.
    available: the memory of a device, or the free part of it.
    message: the beginning of the message.
  """

  requested: float | None
  available: float | None
  message: str


class OutOfMemory(errors.ConfigError):
  """A device or the host has less memory than was requested. The message is for the user.

  Args:
    program: the program that ran out of memory, as "rollout" or "score hps"; "update" where one of
      its programs did that can't be told from the others; "" if unknown.
    shortage: what the original error contains.
    config: of the run, for `remedy`.
    left: what the run can resume from, "" if there is nothing to add.
  """

  def __init__(self, program: str, shortage: Shortage, config: Any = None, left: str = ""):
    self.program, self.shortage = program, shortage
    super().__init__(_line(program, shortage, config, left))


def shortage(error: BaseException) -> Shortage | None:
  """What an error contains about missing memory; None where it is about something else."""
  text = " ".join(str(error).split())
  is_of_xla = isinstance(error, RuntimeError) and _IS_ABOUT_MEMORY.search(text)
  if not is_of_xla and not isinstance(error, MemoryError):
    return None
  requested, available = _amount(_REQUESTED, text), _amount(_AVAILABLE, text)
  if _OTHER_MEMORY.search(text):
    requested = available = None
  return Shortage(requested=requested, available=available, message=text[:200])


def _amount(patterns: tuple[re.Pattern, ...], text: str) -> float | None:
  """Bytes: the first amount that one of the patterns matches."""
  for pattern in patterns:
    if match := pattern.search(text):
      return float(match[1].rstrip(".")) * _SCALE[match[2]]
  return None


def remedy(program: str, config: Any = None) -> str:
  """The remedy part of a message: what to change.

  Args:
    program: the program that ran out of memory.
    config: of the run. Its values are added to the fields, and a change that it already has is
      left out. None for a text without values.
  """
  # The programs of an evaluation inside of training have the shapes of "sample".
  kind = "sample" if program.startswith("show ") else program.split(" ")[0]
  choices = REMEDIES.get(kind, _CHUNKED)
  *others, last = [text for choice in choices if (text := _with_value(choice, config))]
  return f"{', '.join(others)}, or {last}" if others else last


def _with_value(choice: str, config: Any) -> str:
  """A choice with the present value of its field; "" where the config has made this choice."""
  field = re.search(r"([a-z]+)\.([a-z_]+)", choice)
  if not field or "mesh.rules" in choice or field[2] not in (config or {}).get(field[1], {}):
    return choice
  value = config[field[1]][field[2]]
  if choice.endswith(f" = {value}") or (choice.endswith("above 0") and value):
    return ""
  if "smaller" in choice:
    return choice.replace(field[0], f"{field[0]} (now {value})", 1)
  return choice


def _line(program: str, shortage: Shortage, config: Any, left: str) -> str:
  """The whole message."""
  facts = shortage.message
  if shortage.requested:
    if shortage.available is None:
      room = _total_memory()
    else:
      room = f", there is {_size(shortage.available)}"
    facts = f"it asked for {_size(shortage.requested)}{room}"
  change = remedy(program, config)
  if _OUTSIDE in shortage.message:
    change = f"XLA_CLIENT_MEM_FRACTION=0.85, which leaves CUDA and its libraries more, {change}"
  line = f"{program or 'the run'} ran out of memory: {facts}; use {change}"
  return f"{line}; {left}" if left else line


def _size(count: float) -> str:
  """Bytes as text."""
  for unit, scale in (("TiB", 2**40), ("GiB", 2**30)):
    if count >= scale:
      return f"{count / scale:.2f} {unit}"
  return f"{count / 2**20:.2f} MiB"


def _total_memory() -> str:
  """The memory of a device of this process, or of the machine for a CPU, as text; "" if unknown."""
  import jax

  from dancegrpo_jax.devices import chips

  device = jax.local_devices()[0]
  if device.platform == "cpu":
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return f", this machine has {_size(memory)} in all"
  memory = chips.chip_of(device).memory
  return f", a device has {_size(memory)} in all" if memory else ""


# Which program it was

# The latest calls of programs in this process, with some of the results of each.
_started: deque[tuple[str, list[weakref.ref]]] = deque(maxlen=256)


class Guarded:
  """A compiled program whose lack of memory raises `OutOfMemory` with its name, at once or later.

  Args:
    name: of the program.
    program: jitted or compiled. All attributes of this object are its attributes.
  """

  def __init__(self, name: str, program: Callable):
    self._name, self._program = name, program

  def __call__(self, *arguments: Any) -> Any:
    import jax

    with named(self._name):
      result = self._program(*arguments)
    # All results of a call fail together, so a few are enough. The last ones are taken, because the
    # first ones of an update, the state, are donated to the next call.
    leaves = [leaf for leaf in jax.tree.leaves(result)[-4:] if isinstance(leaf, jax.Array)]
    _started.append((self._name, [weakref.ref(leaf) for leaf in leaves]))
    return result

  def __getattr__(self, name: str) -> Any:
    return getattr(self._program, name)


def guarded(programs: Any, prefix: str = "") -> Any:
  """Makes each program `Guarded`.

  Args:
    programs: a NamedTuple of programs, and of dicts of programs.
    prefix: how the names begin.

  Returns:
    The same NamedTuple. A program has the name of its field, as "rollout"; one in a dict has the
    name of the field and its key, as "update step" or "score hps".
  """
  each: dict[str, Any] = {}
  for field, program in programs._asdict().items():
    if isinstance(program, dict):
      each[field] = {
        name: Guarded(f"{prefix}{field} {name}", value) for name, value in program.items()
      }
    else:
      each[field] = Guarded(f"{prefix}{field}", program)
  return programs._replace(**each)


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
  """Raises `OutOfMemory` for any error inside that is about memory.

  Args:
    name: of the program that fails. If an earlier program has failed, the error has its name.
  """
  try:
    yield
  except (RuntimeError, MemoryError) as error:
    later = shortage(error)
    if later is None:
      raise
    program, first = _failed()
    raise OutOfMemory(program or name, (first and shortage(first)) or later) from error


@contextlib.contextmanager
def explained(config: Any = None, left: Callable[[], str] = str) -> Iterator[None]:
  """Raises `OutOfMemory` for any error inside that is about memory, with all that a user needs.

  Args:
    config: of the run, for the present values of the fields to change.
    left: called for the end of the message: what the run can resume from.
  """
  try:
    with named(""):
      yield
  except OutOfMemory as error:
    raise OutOfMemory(error.program, error.shortage, config, left()) from error


def _failed() -> tuple[str, Exception | None]:
  """The earliest program whose results exist but are errors, and the error; ("", None) for none.

  The programs of an update consume each other's results, so it is unknown which of them it was.
  """
  for name, references in list(_started):
    for result in (reference() for reference in references):
      if result is None or result.is_deleted():
        continue
      try:
        result.block_until_ready()
      except RuntimeError as error:
        return "update" if name.startswith("update ") else name, error
  return "", None

"""Running out of memory, told in one line: which program did, what it wanted, and what to change.

XLA says it in a text of its own on each platform: while it compiles, when a program is started, or
later, where somebody waits for a result. So that such a late error has a name as well, `guarded`
programs leave weak references to what they return.
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
# What to change, by the first word of what ran out of memory; for others `_CHUNKED`.
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
  "": ("a smaller rollout.chunk or optimizer.microbatch", _SPLIT),  # nobody knows which
  "pretraining": ("a smaller batch of the stage",),
}
_SAYS_SO = re.compile(r"RESOURCE_EXHAUSTED|out of memory|OUT_OF_MEMORY|bad_alloc", re.IGNORECASE)
_AMOUNT = r"([\d.]+) ?([KMGT]?)(?:i?B\b|bytes)?"
_WANTED = (
  re.compile(rf"Used {_AMOUNT} of"),  # TPU, compiling
  re.compile(rf"(?:allocate|allocating|reserve)(?: request for)? {_AMOUNT}"),
  re.compile(rf"requires?[^(\d]*\(?{_AMOUNT}"),
)
_THERE = (re.compile(rf"Used \S+ of {_AMOUNT} hbm"), re.compile(rf"There are {_AMOUNT} free"))
_OTHER_MEMORY = re.compile(r"memory space (?!hbm)")  # of a TPU: small and fast, a kernel's
_OUTSIDE = "CUDA_ERROR_OUT_OF_MEMORY"  # of CUDA itself and its libraries, beside what JAX has taken
_SCALE = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Shortage(NamedTuple):
  """What an error says of memory, in bytes; None where it says nothing.

  Attributes:
    wanted: what was asked for: all of a program, or the piece for which there was no room.
    there: the memory of a device, or what of it was free.
    said: the error's first words.
  """

  wanted: float | None
  there: float | None
  said: str


class OutOfMemory(errors.ConfigError):
  """A device, or the host, has less memory than was asked for. The message is for the user.

  Attributes:
    program: what asked, as "rollout" or "score hps"; "update" where one of its programs did that
      can't be told from the others; "" where nothing can be known.
    shortage: what the error said.
  """

  def __init__(self, program: str, shortage: Shortage, config: Any = None, left: str = ""):
    self.program, self.shortage = program, shortage
    super().__init__(_line(program, shortage, config, left))


def shortage(error: BaseException) -> Shortage | None:
  """What an error says of missing memory; None where it is about something else."""
  text = " ".join(str(error).split())
  host = isinstance(error, MemoryError)
  if not host and not (isinstance(error, RuntimeError) and _SAYS_SO.search(text)):
    return None
  if _OTHER_MEMORY.search(text):
    return Shortage(None, None, text[:200])
  return Shortage(_amount(_WANTED, text), _amount(_THERE, text), text[:200])


def _amount(patterns: tuple[re.Pattern, ...], text: str) -> float | None:
  """The first amount that one of the patterns finds, in bytes."""
  for pattern in patterns:
    if found := pattern.search(text):
      return float(found[1].rstrip(".")) * _SCALE[found[2]]
  return None


def remedy(program: str, config: Any = None) -> str:
  """What to change, as text.

  Args:
    program: what ran out of memory.
    config: its values stand beside the fields, and what it has already is left out; None: neither.
  """
  kind = (
    "sample" if program.startswith("show ") else program.split(" ")[0]
  )  # an evaluation's shapes
  choices = REMEDIES.get(kind, _CHUNKED)
  said = [text for choice in choices if (text := _apt(choice, config))]
  return ", or ".join(filter(None, [", ".join(said[:-1]), said[-1]]))


def _apt(choice: str, config: Any) -> str:
  """A choice with its field's present value, "" where the config has it already."""
  field = re.search(r"([a-z]+)\.([a-z_]+)", choice)
  if not field or "mesh.rules" in choice or field[2] not in (config or {}).get(field[1], {}):
    return choice
  value = config[field[1]][field[2]]
  if choice.endswith(f" = {value}") or (choice.endswith("above 0") and value):
    return ""
  return choice.replace(field[0], f"{field[0]} (now {value})", 1) if "smaller" in choice else choice


def _line(program: str, found: Shortage, config: Any, left: str) -> str:
  """All that a user is told."""
  facts = found.said
  if found.wanted:
    there = _there() if found.there is None else f", there is {_size(found.there)}"
    facts = f"it asked for {_size(found.wanted)}{there}"
  change = remedy(program, config)
  if _OUTSIDE in found.said:
    change = f"XLA_CLIENT_MEM_FRACTION=0.85, which leaves CUDA and its libraries more, {change}"
  line = f"{program or 'the run'} ran out of memory: {facts}; use {change}"
  return f"{line}; {left}" if left else line


def _size(count: float) -> str:
  """Bytes as text."""
  for unit, scale in (("TiB", 2**40), ("GiB", 2**30)):
    if count >= scale:
      return f"{count / scale:.2f} {unit}"
  return f"{count / 2**20:.2f} MiB"


def _there() -> str:
  """What a device of this process has, or the machine for a CPU, in words; "" if it isn't known."""
  import jax

  from dancegrpo_jax.devices import chips

  device = jax.local_devices()[0]
  if device.platform == "cpu":
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return f", this machine has {_size(memory)} in all"
  memory = chips.chip_of(device).memory
  return f", a device has {_size(memory)} in all" if memory else ""


# Names

# What this process has given to its devices: programs, and some of the results of each.
_started: deque[tuple[str, list[weakref.ref]]] = deque(maxlen=256)


class Guarded:
  """A compiled program whose lack of memory is an `OutOfMemory` of its name, at once or later.

  Args:
    name: of the program.
    program: jitted or compiled; everything but a call goes to it.
  """

  def __init__(self, name: str, program: Callable):
    self._name, self._program = name, program

  def __call__(self, *arguments: Any) -> Any:
    import jax

    with named(self._name):
      result = self._program(*arguments)
    # The results of a call fail together, so a few will do: the last ones, since the next call
    # of an update takes its first ones, the state.
    leaves = [leaf for leaf in jax.tree.leaves(result)[-4:] if isinstance(leaf, jax.Array)]
    _started.append((self._name, [weakref.ref(leaf) for leaf in leaves]))
    return result

  def __getattr__(self, name: str) -> Any:
    return getattr(self._program, name)


def guarded(programs: Any, prefix: str = "") -> Any:
  """`Programs`, each `Guarded` by a prefix and its field's name, as "rollout"; rewards' and those of
  the update as "score hps" and "update step".
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
  """Lack of memory inside is an `OutOfMemory` of this name, or of a program that failed before."""
  try:
    yield
  except (RuntimeError, MemoryError) as error:
    found = shortage(error)
    if found is None:
      raise
    program, first = _failed()
    raise OutOfMemory(program or name, (first and shortage(first)) or found) from error


@contextlib.contextmanager
def explained(config: Any = None, left: Callable[[], str] = str) -> Iterator[None]:
  """Lack of memory inside is an `OutOfMemory`, with its program's name where that can be found.

  Args:
    config: of the run, for the values of the fields to change.
    left: what there is to go on from, asked when it is needed.
  """
  try:
    with named(""):
      yield
  except OutOfMemory as error:
    raise OutOfMemory(error.program, error.shortage, config, left()) from error


def _failed() -> tuple[str, Exception | None]:
  """The first program whose results are there and can't be had, and why; ("", None) for none.

  The programs of an update consume each other's results, so which of them it was can't be told.
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

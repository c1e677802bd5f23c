"""What follows from the rows of a plan: whether the run fits, how long it may take, and the text
that the command prints.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dancegrpo_jax.devices import out_of_memory
from dancegrpo_jax.errors import ConfigError

GIB = 2**30


class Row(NamedTuple):
  """The numbers of a program. Bytes and seconds are those of one call on one device, and None where
  they are not known.

  Attributes:
    name: the program.
    times: its calls in the run.
    peak: bytes, with all that stays in memory while it runs.
    flops: FLOPs of all devices together. Each product counts once, however often it is recomputed.
    arguments: bytes.
    temporaries: bytes.
    uncounted: operations that `flops` leaves out.
    collective: bytes sent or received.
    compile_seconds: how long the compilation took on this machine.
    compute_seconds: estimated time of the computation.
    network_seconds: estimated time of the communication.
    mfu: the share of the peak that these times imply.
    problem: the compiler's message where the program does not fit.
  """

  name: str
  times: float | int
  peak: float
  flops: float
  arguments: float | None = None
  temporaries: float | None = None
  uncounted: tuple[str, ...] = ()
  collective: float | None = None
  compile_seconds: float = 0.0
  compute_seconds: float | None = None
  network_seconds: float | None = None
  mfu: float | None = None
  problem: str = ""

  @property
  def seconds(self) -> float | None:
    """Estimated time of one call, as if communication never overlapped with computation."""
    if self.compute_seconds is None or self.network_seconds is None:
      return None
    return self.compute_seconds + self.network_seconds


def read_out(file: Path) -> dict:
  """Reads an --out file.

  Raises:
    ConfigError: it does not hold a plan.
  """
  try:
    old = json.loads(file.read_text())
    if "rows" in old and "programs" in old:
      return old
  except (OSError, ValueError, TypeError):
    pass
  raise ConfigError(f"--out={file}: holds no plan; remove it, or use another file")


def merged(old: dict, new: dict) -> dict:
  """`new` with the rows of `old` that it lacks.

  Raises:
    ConfigError: the plans are not of the same config, topology and compiler.
  """
  identity = ("digest", "topology", "versions", "effort", "programs")
  different = [key for key in identity if old.get(key) != new[key]]
  if different:
    raise ConfigError(
      f"--out holds another plan ({', '.join(different)} differ): remove it, or use another file"
    )
  rows = {row["name"]: row for row in [*old["rows"], *new["rows"]]}
  return new | {"rows": [rows[name] for name in new["programs"] if name in rows]}


def concluded(result: dict) -> dict:
  """A plan with what follows from its rows: whether the run fits, and, once every program has a
  row, how long it takes.
  """
  rows = rows_of(result)
  left_out = [name for name in result["programs"] if name not in [row.name for row in rows]]
  lines = problems(rows, result["memory"])
  times = {"iteration_seconds": iteration_seconds(rows, result["iterations"]), "hours": hours(rows)}
  if left_out:
    times = dict.fromkeys(times)
  return result | {"left_out": left_out, "problems": lines, "fits": not lines} | times


def rows_of(result: dict) -> list[Row]:
  """The rows of a plan."""
  return [Row(**row) for row in result["rows"]]


def problems(rows: list[Row], memory: float) -> list[str]:
  """A message for each program that does not fit.

  Args:
    rows: of the programs.
    memory: bytes of a device, 0 where it is not known. Then only the compiler can tell.
  """
  lines = []
  for row in rows:
    if row.problem or (memory and row.peak > memory):
      reason = f" ({row.problem})" if row.problem else ""
      room = f" of {memory / GIB:.2f}" if memory else ""
      needs = f"{row.name} needs {row.peak / GIB:.2f}{room} GiB{reason}"
      lines.append(f"{needs}; use {out_of_memory.remedy(row.name)}")
  return lines


def hours(rows: list[Row]) -> float | None:
  """Estimated hours of the run; None where the time of a program is not known."""
  total = _total_seconds(rows)
  return None if total is None else total / 3600


def iteration_seconds(rows: list[Row], iterations: int) -> float | None:
  """Estimated seconds of an iteration; None where the time of a program is not known."""
  total = _total_seconds(_of_every_iteration(rows, iterations))
  return None if total is None else total / iterations


def longest_call(rows: list[Row], iterations: int) -> Row | None:
  """The program of an iteration that has the longest call; None where no time is known."""
  timed = [row for row in _of_every_iteration(rows, iterations) if row.seconds is not None]
  return max(timed, key=lambda row: row.seconds or 0.0, default=None)


def _of_every_iteration(rows: list[Row], iterations: int) -> list[Row]:
  """The programs that each iteration calls."""
  return [row for row in rows if row.times >= iterations]


def _total_seconds(rows: list[Row]) -> float | None:
  """Estimated seconds of all calls in the run; None where the time of a program is not known."""
  seconds = [row.seconds * row.times for row in rows if row.seconds is not None]
  return sum(seconds, 0.0) if len(seconds) == len(rows) else None


def _number(value: float | int | None, form: str, scale: float | int = 1.0) -> str:
  return "-" if value is None else format(value / scale, form)


def _cells(row: Row, memory: float) -> dict[str, str]:
  """The text of each column."""
  mark = "*" if row.uncounted else ""
  return {
    "program": row.name,
    "calls": f"{row.times:g}",
    "arguments GiB": _number(row.arguments, ".2f", GIB),
    "temporaries GiB": _number(row.temporaries, ".2f", GIB),
    "peak GiB": _number(row.peak, ".2f", GIB),
    "of HBM": f"{row.peak / memory:.0%}" if memory else "-",
    "TFLOP": _number(row.flops, ".4g", 1e12) + mark,
    "collectives GiB": _number(row.collective, ".3f", GIB),
    "compile s": _number(row.compile_seconds, ".1f"),
    "compute s": _number(row.compute_seconds, ".3g"),
    "network s": _number(row.network_seconds, ".3g"),
    "MFU": _number(row.mfu, ".0%"),
  }


def markdown(rows: list[Row], memory: float) -> str:
  """The rows as a Markdown table, without the columns in which nothing is known.

  Args:
    rows: of the programs, at least one.
    memory: bytes of a device, 0 where it is not known.
  """
  cells = [_cells(row, memory) for row in rows]
  columns = [[head, *(row[head] for row in cells)] for head in cells[0]]
  first, *others = [column for column in columns if set(column[1:]) != {"-"}]
  aligned = [_aligned(first, str.ljust, "-"), *(_aligned(each, str.rjust, ":") for each in others)]
  return "\n".join(f"| {' | '.join(line)} |" for line in zip(*aligned))


def _aligned(column: list[str], align: Callable[[str, int], str], end: str) -> list[str]:
  """A column's cells in equal width, with Markdown's rule below the head."""
  width = max(map(len, column))
  head, *cells = [align(cell, width) for cell in column]
  return [head, "-" * (width - 1) + end, *cells]


def report(result: dict) -> str:
  """The text that the command prints, of what `concluded` returns."""
  rows, memory = rows_of(result), result["memory"]
  mesh = " x ".join(f"{axis}={size}" for axis, size in result["mesh"].items())
  kept = ", ".join(f"{name} {size / GIB:.2f}" for name, size in result["kept"].items())
  lines = [
    f"{result['config']} on {result['devices']} x {result['device']} ({mesh})",
    "",
    markdown(rows, memory),
    "",
    f"Kept on a device over an iteration, GiB: {kept}.",
    f"An iteration: {result['geometry']}.",
  ]
  if uncounted := sorted({name for row in rows for name in row.uncounted}):
    lines.append(f"* without what can't be counted: {', '.join(uncounted)}.")
  lines += _times(result, rows)
  if result["left_out"]:
    lines.append(f"Not compiled: {', '.join(result['left_out'])}.")
  if result["problems"]:
    lines += result["problems"]
  elif not memory:
    lines.append("Whether it fits: unknown, because this device's memory is not known.")
  else:
    lines.append("What was compiled fits." if result["left_out"] else "It fits.")
  return "\n".join(lines)


def _times(result: dict, rows: list[Row]) -> list[str]:
  """The lines about time."""
  lines = []
  if result["hours"] is not None:
    total, chip_hours = result["hours"], result["hours"] * result["devices"]
    run = f"{result['iterations']} iterations of {result['images']} samples"
    lines.append(
      f"Estimate, not measured: {result['iteration_seconds']:.0f} s an iteration, {total:.1f} hours"
      f" for {run}, {chip_hours:.0f} chip-hours: the cycles that the compiler expects of each"
      " operation, attention kernels at half of the peak, and the collectives' bytes over the"
      " chip's links as if nothing were computed meanwhile; without loading, compiling and host"
      " work."
    )
  longest = longest_call(rows, result["iterations"])
  if longest is not None:
    seconds = longest.seconds or 0.0
    time = format(seconds, ".0f" if seconds >= 10 else ".2g")
    lines.append(
      f"Longest call of an iteration: {longest.name}, {time} s; SIGTERM waits that long."
    )
  if result["effort"]:
    lines.append(
      f"Compiled with an effort of {result['effort']:g}: a run, compiled with 0, may take other"
      " memory, and its times are not known."
    )
  return lines

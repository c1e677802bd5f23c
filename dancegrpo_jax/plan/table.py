"""What a plan's rows say together: whether a run fits, how long it may take, and the table of them.
See `dancegrpo_jax.plan`.
"""

import json
from pathlib import Path
from typing import NamedTuple

from dancegrpo_jax.devices import out_of_memory
from dancegrpo_jax.errors import ConfigError


class Row(NamedTuple):
  """A program's numbers; bytes and seconds are a device's, of one call. None where they aren't
  known.

  Attributes:
    name, times: the program and its calls in the run.
    arguments, temporaries: bytes.
    peak: bytes, with all that stays in memory while it runs.
    flops: of all devices together, each product once however often it is recomputed.
    uncounted: what the count leaves out.
    collective: bytes sent or received.
    compile_seconds: of this machine.
    compute_seconds, network_seconds: estimates.
    mfu: what they imply, as a share of the peak.
    problem: what the compiler says where it can't fit the program.
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
    """Of a call, as if nothing were sent while something is computed."""
    if self.compute_seconds is None or self.network_seconds is None:
      return None
    return self.compute_seconds + self.network_seconds


def read_out(file: Path) -> dict:
  """What --out holds. ConfigError where it isn't of this command."""
  try:
    old = json.loads(file.read_text())
    if "rows" in old and "programs" in old:
      return old
  except (OSError, ValueError, TypeError):
    pass
  raise ConfigError(f"--out={file}: holds no plan; remove it, or use another file")


def merged(old: dict, new: dict) -> dict:
  """`new` with the rows of `old` that it lacks. ConfigError where they aren't of one config,
  topology and compiler.
  """
  other = [
    key
    for key in ("digest", "topology", "versions", "effort", "programs")
    if old.get(key) != new[key]
  ]
  if other:
    raise ConfigError(
      f"--out holds another plan ({', '.join(other)} differ): remove it, or use another file"
    )
  rows = {row["name"]: row for row in [*old["rows"], *new["rows"]]}
  return new | {"rows": [rows[name] for name in new["programs"] if name in rows]}


def concluded(result: dict) -> dict:
  """What follows from the rows: whether it fits, and how long a run takes where every program is
  there.
  """
  rows = [Row(**row) for row in result["rows"]]
  left_out = [name for name in result["programs"] if name not in [row.name for row in rows]]
  lines = problems(rows, result["memory"])
  times = {"iteration_seconds": iteration_seconds(rows, result["iterations"]), "hours": hours(rows)}
  return (
    result
    | {"left_out": left_out, "problems": lines, "fits": not lines}
    | (times if not left_out else dict.fromkeys(times))
  )


def problems(rows: list[Row], memory: float) -> list[str]:
  """A line for each program that does not fit; [] where all do or nothing is known of the
  memory.
  """
  lines = []
  for row in rows:
    if row.problem or (memory and row.peak > memory):
      said = f" ({row.problem})" if row.problem else ""
      remedy = out_of_memory.remedy(row.name)
      lines.append(
        f"{row.name} needs {row.peak / 2**30:.2f} of {memory / 2**30:.2f} GiB{said}; use {remedy}"
      )
  return lines


def hours(rows: list[Row]) -> float | None:
  """Of the run, by the estimates; None where one is missing."""
  total = _total(rows, 1)
  return None if total is None else total / 3600


def iteration_seconds(rows: list[Row], iterations: int) -> float | None:
  """Of an iteration without what isn't done in each of them."""
  return _total([row for row in rows if row.times >= iterations], iterations)


def _total(rows: list[Row], share: int) -> float | None:
  """Seconds of all calls over `share`; None where a program's aren't known."""
  known = [row.seconds * row.times / share for row in rows if row.seconds is not None]
  return sum(known, 0.0) if len(known) == len(rows) else None


def _number(value: float | int | None, form: str, scale: float | int = 1.0) -> str:
  return "-" if value is None else format(value / scale, form)


def table(result: dict) -> str:
  """The rows as a Markdown table for people, without columns in which nothing is known."""
  head = (
    "program",
    "calls",
    "arguments GiB",
    "temporaries GiB",
    "peak GiB",
    "of HBM",
    "TFLOP",
    "collectives GiB",
    "compile s",
    "compute s",
    "network s",
    "MFU",
  )
  lines = []
  for row in result["rows"]:
    share = f"{row['peak'] / result['memory']:.0%}" if result["memory"] else "-"
    lines.append(
      (
        row["name"],
        f"{row['times']:g}",
        _number(row["arguments"], ".2f", 2**30),
        _number(row["temporaries"], ".2f", 2**30),
        _number(row["peak"], ".2f", 2**30),
        share,
        _number(row["flops"], ".4g", 1e12) + "*" * bool(row["uncounted"]),
        _number(row["collective"], ".3f", 2**30),
        _number(row["compile_seconds"], ".1f"),
        _number(row["compute_seconds"], ".3g"),
        _number(row["network_seconds"], ".3g"),
        _number(row["mfu"], ".0%"),
      )
    )
  columns = [column for column in zip(head, *lines) if not lines or set(column[1:]) != {"-"}]
  head, *lines = zip(*columns)
  widths = [max(map(len, column)) for column in columns]
  rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]

  def line(cells) -> str:
    return (
      "| "
      + " | ".join(
        c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))
      )
      + " |"
    )

  return "\n".join([line(head), line(rule), *map(line, lines)])


def report(result: dict) -> str:
  """All that the command says."""
  mesh = " x ".join(f"{axis}={size}" for axis, size in result["mesh"].items())
  kept = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in result["kept"].items())
  lines = [
    f"{result['config']} on {result['devices']} x {result['device']} ({mesh})",
    "",
    table(result),
    "",
    f"Kept on a device over an iteration, GiB: {kept}.",
    f"An iteration: {result['geometry']}.",
  ]
  if any(row["uncounted"] for row in result["rows"]):
    left_out = sorted({what for row in result["rows"] for what in row["uncounted"]})
    lines.append(f"* without what can't be counted: {', '.join(left_out)}.")
  if result["hours"] is not None:
    total, chip_hours = result["hours"], result["hours"] * result["devices"]
    lines.append(
      f"Estimate, not measured: {result['iteration_seconds']:.0f} s an iteration, {total:.1f}"
      f" hours for {result['iterations']}"
      f" iterations of {result['images']} images, {chip_hours:.0f} chip-hours: the cycles that"
      " the compiler expects of each"
      " operation, attention kernels at half of the peak, and the collectives' bytes over the"
      " chip's links as if nothing were"
      " computed meanwhile; without loading, compiling and host work."
    )
  if result["effort"]:
    lines.append(
      f"Compiled with an effort of {result['effort']:g}: a run's memory, with 0, may differ;"
      " times are not known."
    )
  if result["left_out"]:
    lines.append(f"Not compiled: {', '.join(result['left_out'])}.")
  if not result["memory"]:
    lines.append("Whether it fits: unknown, since nothing is known of this device's memory.")
  fits = "What was compiled fits." if result["left_out"] else "It fits."
  lines += result["problems"] or [fits] * bool(result["memory"])
  return "\n".join(lines)

"""Runs the parts one after the other, each in a process with a time limit.

Collects the lines that the processes write.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from gpu_parts import measure
from gpu_parts.registry import LEAST, Part

TINY_PATIENCE = 4  # compiling takes longer on a CPU
WORKER = Path(__file__).with_name("worker.py")
ROOT = WORKER.parents[2]


def empty(part: Part, why: str) -> dict:
  """The result of a part before anything is measured."""
  rows = {name: {"cells": {}, "note": "", "problem": why} for name in part.rows}
  return {
    "title": part.title,
    "columns": list(part.columns),
    "seconds": 0.0,
    "problem": why,
    "rows": rows,
  }


def add(result: dict, line: dict) -> None:
  """Adds a line from a worker to the result of its part."""
  if "row" in line:
    row = result["rows"].setdefault(line["row"], {"cells": {}, "note": "", "problem": ""})
    row["cells"] |= line["cells"]
    row["note"] = line.get("note") or row["note"]
    row["problem"] = line.get("problem", "" if row["cells"] else row["problem"])
  elif "device" in line:
    result["device"] = line["device"]
  elif "problem" in line:
    result["problem"] = line["problem"]


def finish(result: dict, why: str) -> None:
  """Notes for each row that is still empty why it is."""
  result["problem"] = why
  for row in result["rows"].values():
    if not row["cells"] and row["problem"] in ("", "not reached"):
      row["problem"] = why or "the part ended without it"


def run_part(
  part: Part, seconds: float, cache: Path, tiny: bool, say: Callable[[str], None]
) -> dict:
  """Runs one part and returns its result.

  After `seconds` it is killed together with the processes that it started; the result then has what
  was measured until then.
  """
  result, start = empty(part, "not reached"), time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    rows, log = Path(folder) / "rows.jsonl", Path(folder) / "log.txt"
    rows.touch()
    command = [sys.executable, str(WORKER), part.module, part.argument, str(rows), str(cache)]
    own = {"PYTHONUNBUFFERED": "1"} | dict(part.environment)
    # One GPU, unless the environment chooses others.
    environment = {"CUDA_VISIBLE_DEVICES": "0"} | os.environ | own
    with log.open("w") as output:
      # In a session of its own, so that the processes it starts are killed with it.
      process = subprocess.Popen(
        command + ["--tiny"] * tiny,
        cwd=ROOT,
        stdout=output,
        stderr=output,
        env=environment,
        start_new_session=True,
      )
      try:
        late = _follow(process, rows, start + seconds, result, say)
      finally:
        _kill(process)
    why = f"over its budget of {seconds:.0f} s" if late else ""
    if not late and process.returncode:
      told = result["problem"] if result["problem"] != "not reached" else ""
      why = told or f"its process ended with code {process.returncode}"
    finish(result, why)
    if why:
      say(f"{part.name}: {why}\n{_tail(log)}")
  return result | {"seconds": time.monotonic() - start}


def _follow(
  process: subprocess.Popen, rows: Path, deadline: float, result: dict, say: Callable[[str], None]
) -> bool:
  """Reads a worker's lines until it ends. Returns True if the deadline came first."""
  with rows.open() as file:
    partial = ""
    while True:
      ended = process.poll() is not None
      while text := file.readline():
        partial += text
        if partial.endswith("\n"):
          _told(json.loads(partial), result, say)
          partial = ""
      if ended or time.monotonic() > deadline:
        return not ended
      time.sleep(0.1)


def _told(line: dict, result: dict, say: Callable[[str], None]) -> None:
  add(result, line)
  if "row" in line:
    words = [f"{column} {measure.shown(value)}" for column, value in line["cells"].items()]
    words += [line["note"]] if line.get("note") else []
    words += [f"not measured: {line['problem']}"] if line.get("problem") else []
    say(f"  {line['row']}: {'; '.join(words)}")


def _kill(process: subprocess.Popen) -> None:
  """Ends a worker and all processes that it started."""
  with contextlib.suppress(ProcessLookupError, PermissionError):  # it has left nothing behind
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def _tail(log: Path, lines: int = 12) -> str:
  """The end of a worker's output."""
  return "\n".join(
    f"    {line[:200]}" for line in log.read_text(errors="replace").splitlines()[-lines:]
  )


def run(
  parts: tuple[Part, ...],
  total: float,
  cache: Path,
  tiny: bool,
  say: Callable[[str], None],
  keep: Callable[[str, dict], None],
) -> None:
  """Runs all parts until the time is up, and calls `keep(name, result)` after each part.

  Each part has its time limit, and more where the total time is longer than all limits together.
  """
  deadline = time.monotonic() + total
  patience = max(TINY_PATIENCE if tiny else 1.0, total / sum(part.seconds for part in parts))
  for part in parts:
    left = deadline - time.monotonic()
    if left < min(LEAST, part.seconds):
      say(f"{part.name}: not begun, {max(left, 0):.0f} of {total:.0f} s are left")
      keep(part.name, empty(part, f"no time was left of {total:.0f} s"))
      continue
    seconds = min(part.seconds * patience, left)
    say(f"{part.name}: {part.title}, at most {seconds:.0f} s")
    result = run_part(part, seconds, cache, tiny, say)
    say(f"{part.name}: {result['seconds']:.0f} s")
    keep(part.name, result)

"""Runs `main` as a user would and watches it from outside.

Rows of metrics.jsonl are read as they are written, with the time since the start.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Failed(Exception):
  """The command ended before its rows were written. The message is the last line of its output."""


def rows(
  command: list[str],
  workdir: Path,
  count: int,
  environment: dict[str, str] | None = None,
  whole: bool = False,
):
  """Starts a command and yields (seconds since then, row) for each of the first `count` rows.

  Args:
    command: arguments for Python; --workdir is added.
    workdir: a folder that does not exist yet.
    count: number of rows, after which the command is ended.
    environment: variables that are added to those of this process.
    whole: lets the command end by itself after the last row.

  Raises:
    Failed: it ended before.
  """
  workdir.mkdir(parents=True)
  log, file, seen = workdir / "log.txt", workdir / "metrics.jsonl", 0
  with log.open("w") as output:
    start = time.perf_counter()
    process = subprocess.Popen(
      [sys.executable, *command, f"--workdir={workdir}"],
      cwd=ROOT,
      stdout=output,
      stderr=output,
      env=os.environ | (environment or {}),
    )
    try:
      while seen < count:
        ended = process.poll() is not None
        lines = file.read_text().split("\n")[:-1] if file.exists() else []  # whole ones
        for line in lines[seen:count]:
          yield time.perf_counter() - start, json.loads(line)
        if ended and len(lines) < count:
          raise Failed(last_line(log))
        seen = min(len(lines), count)
        time.sleep(0.02)
      if whole and process.wait():
        raise Failed(last_line(log))
    finally:
      process.kill()
      process.wait()


def last_line(log: Path) -> str:
  """The last line of a command's output."""
  lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
  return lines[-1][:200] if lines else "it said nothing"

"""status.json of a workdir: how the run was started, and how it has ended.

  {"state": "running", "began": time, "command": text, "directory": path, "workdir": path,
   "config_file": name, "changed": {field: [value of the config file, value of the run]}, ...}

`end` adds "ended", "reason" and "traceback". A process that is killed can't say so, and leaves
"running".
"""

import datetime
import os
import shlex
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from dancegrpo_jax import buckets, strict_json
from dancegrpo_jax.errors import ConfigError
from dancegrpo_jax.report import files
from dancegrpo_jax.settings import command_line, config_file, stored_config

FILE = "status.json"
RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"
_MOST_LINES = 40  # of a traceback


def read(workdir: Path) -> dict[str, Any]:
  """The content of status.json, {} where there is none."""
  return files.read_json(workdir / FILE)


def now() -> str:
  """The time, as 2026-11-27 19:46:02 UTC."""
  return datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z").strip()


def begin(workdir: Path, config: ConfigDict) -> None:
  """Writes that this process has begun to train. Only process 0 writes.

  Args:
    workdir: of the run.
    config: of the run.
  """
  if jax.process_index() != 0:
    return
  name = command_line.config_flag(sys.argv)
  values = {
    "state": RUNNING,
    "began": now(),
    "process": _process(),
    # A run that Python code starts has no command line of its own.
    "command": f"{command_line.program()} {shlex.join(sys.argv[1:])}" if name else "",
    "directory": os.getcwd(),
    "workdir": buckets.behind(workdir.resolve()),
    "config_file": name,
    "changed": _changed(name, config),
  }
  _write(workdir, values)


def end(workdir: Path, state: str, reason: str = "", trace: str = "") -> bool:
  """Writes how the run of this process has ended; nothing where that is written already, or where
  this process has not begun one.

  Args:
    workdir: of the run.
    state: FINISHED, STOPPED or FAILED.
    reason: for the user.
    trace: of an error that is not the user's.

  Returns:
    Whether it was written.
  """
  values = read(workdir)
  if values.get("state") != RUNNING or values.get("process") != _process():
    return False
  last = "\n".join(trace.splitlines()[-_MOST_LINES:])
  _write(workdir, values | {"state": state, "ended": now(), "reason": reason, "traceback": last})
  return True


def end_with_error(workdir: Path, error: BaseException, left: str) -> bool:
  """Writes that an error has ended the run, as `end`.

  Args:
    workdir: of the run.
    error: what was raised. A ConfigError explains itself; of others the traceback is kept too.
    left: from which checkpoint the run can go on.

  Returns:
    Whether it was written.
  """
  if isinstance(error, KeyboardInterrupt):
    return end(workdir, STOPPED, f"stopped by Ctrl-C; {left}")
  if isinstance(error, ConfigError):
    return end(workdir, FAILED, str(error))
  name = "".join(traceback.format_exception_only(error)).strip()
  return end(workdir, FAILED, f"{name}\n{left}", "".join(traceback.format_exception(error)))


def _write(workdir: Path, values: dict[str, Any]) -> None:
  files.write_text(workdir / FILE, strict_json.dumps(values, indent=2))


def _process() -> str:
  return f"{os.getpid()} on {socket.gethostname()}"


def _changed(name: str, config: ConfigDict) -> dict[str, list[Any]]:
  """The fields in which a run's config differs from its file's: [value of the file, of the run]."""
  try:
    before = stored_config.flatten(config_file.load(name)) if name else {}
  except ConfigError:  # the file has changed since it was read
    return {}
  after = stored_config.flatten(config)
  return {
    field: [before[field], value]
    for field, value in after.items()
    if field in before and before[field] != value
  }

"""The process of one part. It writes a JSON line for each measured number.

The command is `python worker.py MODULE ARGUMENT ROWS CACHE [--tiny]`.
"""

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT / "benchmarks")
sys.path.insert(1, str(ROOT))

from gpu_parts import measure  # noqa: E402


class Say:
  """Sends each measurement to the parent at once.

  A part that is killed therefore keeps its results.
  """

  def __init__(self, file: Path):
    self._file = file.open("a")

  def _line(self, **values) -> None:
    print(json.dumps(values), file=self._file, flush=True)

  def row(self, name: str, note: str = "", **cells: dict) -> None:
    """Sends cells of a row by column name, with "_" for a space.

    They are added to the cells sent before, or replace them.
    """
    self._line(
      row=name, cells={column.replace("_", " "): cell for column, cell in cells.items()}, note=note
    )

  def cells(self, name: str, cells: dict[str, dict], note: str = "") -> None:
    """As `row`, for columns whose names are not Python names."""
    self._line(row=name, cells=cells, note=note)

  def failed(self, name: str, why: str) -> None:
    """Sends a row that has no number, and the reason."""
    self._line(row=name, cells={}, problem=why)

  def device(self, name: str) -> None:
    """Sends the name of the device."""
    self._line(device=name)

  def problem(self, why: str) -> None:
    """Sends the reason why the rows that are still empty stay empty."""
    self._line(problem=why)


class Context(NamedTuple):
  """The arguments of a part.

  Attributes:
    say: sends the measurements.
    argument: see `registry.Part`.
    tiny: whether sizes are tiny, so that any device will do.
    cache: folder of compiled programs, shared by all parts.
    folder: a folder for this part alone, which the parent removes.
  """

  say: Say
  argument: str
  tiny: bool
  cache: Path
  folder: Path


def main(module: str, argument: str, rows: str, cache: str, tiny: bool) -> int:
  """Runs the part. Returns 1 where it failed."""
  say = Say(Path(rows))
  try:
    run = importlib.import_module(module).run
    run(Context(say, argument, tiny, Path(cache), Path(rows).parent))
  except Exception as error:  # the other parts go on, and this part's rows name the error
    traceback.print_exc()
    say.problem(measure.reason(error))
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:5], tiny="--tiny" in sys.argv[5:]))

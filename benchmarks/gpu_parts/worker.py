"""The process of one part: `python worker.py MODULE ARGUMENT ROWS CACHE [--tiny]`; writes a JSON
line for each number."""

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
  """Tells the parent what is measured, as soon as it is: a part that is killed keeps what it
  had."""

  def __init__(self, file: Path):
    self._file = file.open("a")

  def _line(self, **values) -> None:
    print(json.dumps(values), file=self._file, flush=True)

  def row(self, name: str, note: str = "", **cells: dict) -> None:
    """Cells of a row by column, with "_" for a space; they add to what was told of it before, or
    replace it."""
    self._line(
      row=name, cells={column.replace("_", " "): cell for column, cell in cells.items()}, note=note
    )

  def cells(self, name: str, cells: dict[str, dict], note: str = "") -> None:
    """As `row`, for columns whose names are no Python names."""
    self._line(row=name, cells=cells, note=note)

  def failed(self, name: str, why: str) -> None:
    """A row that has no number, and why."""
    self._line(row=name, cells={}, problem=why)

  def device(self, name: str) -> None:
    """What it was measured on."""
    self._line(device=name)

  def problem(self, why: str) -> None:
    """Why the rows that are still empty stay so."""
    self._line(problem=why)


class Context(NamedTuple):
  """What a part is given.

  Attributes:
    say: where its numbers go.
    argument: see `registry.Part`.
    tiny: tiny sizes, on whatever device is there.
    cache: folder of compiled programs, the same for all parts.
    folder: a part's own, removed by the parent.
  """

  say: Say
  argument: str
  tiny: bool
  cache: Path
  folder: Path


def main(module: str, argument: str, rows: str, cache: str, tiny: bool) -> int:
  """Runs the part; 1 where it failed."""
  say = Say(Path(rows))
  try:
    run = importlib.import_module(module).run
    run(Context(say, argument, tiny, Path(cache), Path(rows).parent))
  except Exception as error:  # whatever it is, the other parts go on and this one's row says it
    traceback.print_exc()
    say.problem(measure.reason(error))
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:5], tiny="--tiny" in sys.argv[5:]))

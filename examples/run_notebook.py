"""Runs emoji.ipynb and writes it with its outputs, without what differs from machine to machine.

python examples/run_notebook.py      # minutes; the run itself is left in examples/runs/notebook
"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

FILE = Path(__file__).with_name("emoji.ipynb")
METADATA = {
  "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
  "language_info": {"name": "python"},
}


def run(book: nbformat.NotebookNode, folder: Path, **options) -> nbformat.NotebookNode:
  """The notebook with the outputs of every cell.

  Args:
    book: changed in place.
    folder: in which it runs.
    options: of the kernel, as `env`.
  """
  client = NotebookClient(
    book,
    timeout=None,
    kernel_name="python3",
    resources={"metadata": {"path": str(folder)}},
    record_timing=False,
    coalesce_streams=True,
  )
  client.execute(**options)
  book.metadata = nbformat.from_dict(METADATA)
  return book


if __name__ == "__main__":
  nbformat.write(run(nbformat.read(FILE, as_version=4), FILE.parent), FILE)

"""examples/emoji.ipynb: it runs from its first cell to its last, and what is committed of it is fit
to be read.
"""

import base64
import copy
import io
import os
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from examples import run_notebook

ROOT = Path(__file__).parent.parent
FILE = ROOT / "examples" / "emoji.ipynb"


@pytest.fixture(scope="module")
def book():
  return nbformat.read(FILE, as_version=4)


def outputs(book) -> list:
  """(cell number, output) of everything that the cells have given."""
  return [(n, found) for n, cell in enumerate(book.cells) for found in cell.get("outputs", [])]


def pictures(book) -> list[np.ndarray]:
  found = [output.get("data", {}).get("image/png") for _, output in outputs(book)]
  return [np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in found if png]


def test_it_runs(book, tmp_path):
  """Cut down: a minute and a half of one core. It runs outside of examples/, so that no run is left
  there.
  """
  environment = {**os.environ, "DANCEGRPO_QUICK": "1", "PYTHONPATH": str(ROOT)}
  done = run_notebook.run(copy.deepcopy(book), tmp_path, env=environment)
  assert len(pictures(done)) == len(pictures(book))
  assert (tmp_path / "runs" / "notebook" / "report.html").is_file()
  said = "".join(output.get("text", "") for _, output in outputs(done))
  assert re.search(r"^ratio/drift_max +0\.0+$", said, re.M)
  assert "iteration 2/2" in said and re.search(r"^gain [+-]0\.\d+", said, re.M)


def test_what_is_committed_is_a_whole_run_in_order(book):
  code = [cell for cell in book.cells if cell.cell_type == "code"]
  assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
  assert not any(output.output_type == "error" for _, output in outputs(book))
  said = "".join(output.get("text", "") for _, output in outputs(book))
  (iterations,) = set(re.findall(r"^iteration \d+/(\d+)", said, re.M))
  assert int(iterations) >= 10  # not cut down
  gain, error = re.search(r"^gain ([+-][\d.]+) \+- ([\d.]+)$", said, re.M).groups()
  assert float(gain) > 3 * float(error)


def test_its_pictures_show_something(book):
  found = pictures(book)
  assert len(found) == 5
  for pixels in found:
    assert pixels[..., :3].std() > 20 and min(pixels.shape[:2]) > 100


def test_it_is_small_and_names_no_machine(book):
  assert FILE.stat().st_size < 1.5e6
  texts = [
    f"{output.get('text', '')}{output.get('data', {}).get('text/plain', '')}"
    for _, output in outputs(book)
  ]
  for text in [*texts, *(cell.source for cell in book.cells)]:
    assert not re.search(
      r"(?<![\w.)/])/(home|root|tmp|usr|opt|work|Users|var|mnt)\b|[A-Z]:\\", text
    )
    assert os.uname().nodename not in text and "Warning" not in text
  assert set(book.metadata) == {"kernelspec", "language_info"}
  assert all(not cell.metadata for cell in book.cells)


def test_its_links_lead_somewhere(book):
  links = [
    link
    for cell in book.cells
    if cell.cell_type == "markdown"
    for link in re.findall(r"\]\(([^)#\s]+)", cell.source)
  ]
  assert len(links) >= 8
  assert all((FILE.parent / link).exists() for link in links)

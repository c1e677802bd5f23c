"""RESULTS.md: each script of benchmarks/ replaces its section and no other byte."""

import contextlib
import sys

import pytest
from tiny_checkpoint import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import flow_dppo as flow_dppo_script  # noqa: E402
import gpu as gpu_script  # noqa: E402
import plans as plans_script  # noqa: E402
import results  # noqa: E402
import scaling  # noqa: E402

ABOVE = "# Results\r\n\nBy hand, with  two spaces \n\n"
BETWEEN = "\n\nA note in the middle: <!-- begin: nothing\n"
OTHER = "<!-- begin: other (elsewhere.py) -->\nits *own*\n<!-- end: other -->"
BELOW = "\nThe end, without a line feed: é"


def around(name: str, body: str) -> str:
  mark = f"<!-- begin: {name} (a/path of old.py) -->"
  return f"{ABOVE}{mark}\n{body}\n<!-- end: {name} -->{BETWEEN}{OTHER}{BELOW}"


def test_a_section_is_replaced_and_nothing_else():
  assert results.replace_section(around("plans", "old\n\nlines"), "plans", "new\n") == around(
    "plans", "new"
  )
  assert results.replace_section(around("plans", ""), "plans", "new") == around("plans", "new")


def test_writing_twice_changes_nothing():
  once = results.replace_section(around("plans", "old"), "plans", "\n## New\n\ntext\n\n")
  assert results.replace_section(once, "plans", "\n## New\n\ntext\n\n") == once


@pytest.mark.parametrize("text, gap", [("", ""), ("text\n", "\n"), ("text", "\n\n")])
def test_a_missing_section_is_appended(text, gap):
  added = "<!-- begin: gpu (benchmarks/gpu.py) -->\nnew\n<!-- end: gpu -->\n"
  assert results.replace_section(text, "gpu", "new") == text + gap + added


def test_names_are_whole_words():
  """Nor is a name read as a regular expression."""
  text = "<!-- begin: gpu_2 (x) -->\nkept\n<!-- end: gpu_2 -->\n"
  assert results.replace_section(text, "gpu", "new").startswith(text)
  assert results.replace_section(text, "gp.*", "new").startswith(text)


BEGIN, END = "<!-- begin: plans (benchmarks/plans.py) -->\n", "<!-- end: plans -->\n"


@pytest.mark.parametrize(
  "text",
  [BEGIN, END, END + BEGIN, BEGIN + BEGIN + END, BEGIN + END + END, BEGIN + OTHER + "\n" + END],
)
def test_markers_that_make_no_sense_are_one_line(text, tmp_path):
  file = tmp_path / "RESULTS.md"
  file.write_text(text)
  with pytest.raises(results.ResultsError) as caught:
    results.write_section("plans", "new", file)
  assert "section plans: " in str(caught.value) and "\n" not in str(caught.value)
  assert file.read_text() == text and list(tmp_path.iterdir()) == [file]


def test_nothing_is_half_written(tmp_path, monkeypatch):
  file = tmp_path / "RESULTS.md"
  file.write_text(around("plans", "old"))

  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr(results.os, "replace", fail)
  with pytest.raises(OSError, match="disk full"):
    results.write_section("plans", "new", file)
  assert file.read_bytes().decode() == around("plans", "old") and list(tmp_path.iterdir()) == [file]


def test_a_file_is_made(tmp_path):
  results.write_section("plans", "new", tmp_path / "new.md")
  assert (tmp_path / "new.md").read_text() == f"{BEGIN}new\n{END}"


@contextlib.contextmanager
def results_in(file):
  """Lets a script write its section into another file."""
  write_section = results.write_section
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(results, "write_section", lambda name, body: write_section(name, body, file))
    yield


def write_plans(file):
  """Does what benchmarks/plans.py --write does, with another file."""
  with results_in(file):
    assert plans_script.main(["--write"]) == 0


def write_flow_dppo(file):
  """Does what benchmarks/flow_dppo.py table does, with another file."""
  with results_in(file):
    flow_dppo_script.main(["table"])


def write_gpu(file):
  """Does what benchmarks/gpu.py --write does without a JSON file, with another file."""
  out = file.with_name("none.json")
  assert gpu_script.main(["--write", f"--results={file}", f"--out={out}"]) == 0


WRITERS = {"plans": write_plans, "gpu": write_gpu, "flow_dppo": write_flow_dppo}


@pytest.mark.parametrize("name", WRITERS)
def test_every_scripts_writer_keeps_foreign_text(name, tmp_path):
  file = tmp_path / "RESULTS.md"
  file.write_bytes(around(name, "old").encode())
  WRITERS[name](file)
  text = file.read_bytes().decode()
  before, after = around(name, "old").split("\nold\n")
  assert (
    text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after) + 100
  )
  WRITERS[name](file)
  assert file.read_bytes().decode() == text


def test_the_page_holds_what_a_gpu_said(tmp_path):
  """The section on one GPU follows from the committed results of its parts."""
  file = tmp_path / "new.md"
  assert gpu_script.main(["--write", f"--results={file}"]) == 0
  text = file.read_text()
  assert text in results.FILE.read_text() and "NVIDIA H200" in text


@pytest.mark.parametrize("name", ["plans", "flow_dppo"])
def test_the_page_holds_what_the_scripts_would_write(name, tmp_path):
  """These sections follow from the committed runs, in RESULTS.md as in a new file."""
  WRITERS[name](tmp_path / "new.md")
  assert (tmp_path / "new.md").read_text() in results.FILE.read_text()


def test_the_rows_of_an_update_as_one():
  """By hand, from 3 iterations with 4 calls of one program and 2 of another. The MFU refers to
  all of their time.
  """
  row = {"compute_seconds": 2.0, "network_seconds": 1.0, "flops": 10.0, "collective": 5.0}
  row |= {"peak": 7.0, "arguments": 6.0, "compile_seconds": 4.0, "mfu": 0.5, "times": 12}
  step = row | {"flops": 0.0, "compute_seconds": 1.0, "peak": 8.0, "mfu": 0.0, "times": 6}
  assert scaling.whole({"iterations": 3, "rows": [row, step]}) == {
    "peak": 8.0,
    "arguments": 6.0,
    "flops": 40.0,
    "collective": 4 * 5.0 + 2 * 5.0,
    "compute_seconds": 4 * 2.0 + 2 * 1.0,
    "network_seconds": 4 * 1.0 + 2 * 1.0,
    "compile_seconds": 8.0,
    "mfu": 0.5 * 12 / 16,
  }

"""RESULTS.md in sections: each script replaces its section and leaves every other byte as it is.

A section lies between two lines of its own, and what is between them is the script's:

    <!-- begin: plans (benchmarks/plans.py) -->
    <!-- end: plans -->
"""

import os
import re
import tempfile
from pathlib import Path

FILE = Path(__file__).with_name("RESULTS.md")


class ResultsError(Exception):
  """The markers in the file are inconsistent. The message is one line that names the marker."""


def _begins(text: str, name: str) -> list[re.Match]:
  return list(
    re.finditer(rf"^<!-- begin: {re.escape(name)}(?: \([^\n]*\))? -->\r?$", text, re.MULTILINE)
  )


def _ends(text: str, name: str) -> list[re.Match]:
  return list(re.finditer(rf"^<!-- end: {re.escape(name)} -->\r?$", text, re.MULTILINE))


def replace_section(text: str, name: str, body: str) -> str:
  """The text with another body in a section; a section that isn't there is appended.

  Args:
    text: of the file.
    name: of the section, which is that of its script, without .py.
    body: Markdown, without the two markers.

  Raises:
    ResultsError: a marker without its other one, twice the same one, or another section's between
      them.
  """
  begins, ends = _begins(text, name), _ends(text, name)
  inside = f"\n{body.strip()}\n"
  if not begins and not ends:
    gap = "" if not text else "\n" if text.endswith("\n") else "\n\n"
    return f"{text}{gap}<!-- begin: {name} (benchmarks/{name}.py) -->{inside}<!-- end: {name} -->\n"
  if len(begins) != 1 or len(ends) != 1 or begins[0].end() > ends[0].start():
    found = f"{len(begins)} begin and {len(ends)} end"
    raise ResultsError(
      f"section {name}: needs one begin and one end behind it, found {found}; mend the markers by"
      " hand"
    )
  start, stop = begins[0].end(), ends[0].start()
  if other := re.search(r"^<!-- (?:begin|end): [^\n]*-->", text[start:stop], re.MULTILINE):
    raise ResultsError(f"section {name}: {other[0]} stands inside it; mend the markers by hand")
  return text[:start] + inside + text[stop:]


def write_section(name: str, body: str, file: Path = FILE) -> None:
  """Writes a section into the file, which is replaced as a whole or not at all.

  Raises a ResultsError as `replace_section` does.
  """
  text = file.read_bytes().decode() if file.exists() else ""  # bytes: line ends stay as they are
  new = replace_section(text, name, body).encode()
  handle, partial = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
  try:
    with os.fdopen(handle, "wb") as opened:
      opened.write(new)
    # mkstemp makes files that their owner alone can read.
    os.chmod(partial, file.stat().st_mode & 0o777 if file.exists() else 0o644)
    os.replace(partial, file)
  except BaseException:
    Path(partial).unlink(missing_ok=True)
    raise

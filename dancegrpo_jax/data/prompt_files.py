"""What stands in a prompts file: a line, an entry or a row for each prompt, and what was left out.

Python's csv and json read the files. `prompts.read` makes Examples of the rows.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from dancegrpo_jax import buckets, installation

# The names that the column or the key of the prompts may have, in any case.
NAMES = ("prompt", "prompts", "caption", "captions", "text", "texts")
NEGATIVE, METADATA = "negative_prompt", "metadata"

# What all lines of a .txt file may look like, and what the user should then know.
LOOKS: tuple[tuple[Callable[[str], bool], str], ...] = (
  (
    lambda line: len(line) > 1 and line[0] == line[-1] == '"',
    "all stand in quotation marks, which are part of the prompts",
  ),
  (
    lambda line: line[0] == "{" and line[-1] == "}",
    "all look like JSON, which only a .jsonl file is read as",
  ),
  (lambda line: "\t" in line, "all hold a tab, and only a .tsv file is read by its columns"),
)


class Row(NamedTuple):
  """One prompt as it stands in a file.

  Attributes:
    where: the file and the place in it, with which messages begin.
    fields: the values by column or key. One of the names is in `NAMES`, in any case.
  """

  where: str
  fields: dict[str, Any]


class Content(NamedTuple):
  """What stands in a source of prompts.

  Attributes:
    rows: in the order of the source.
    left_out: how many there were of each thing that is no prompt, as {"empty line": 2}; an s makes
      the plural.
    notes: what else the user should know.
  """

  rows: list[Row]
  left_out: dict[str, int]
  notes: tuple[str, ...] = ()


def read(path: str) -> Content:
  """Reads a file by its extension, which may be in any case.

  Args:
    path: a file in UTF-8, with or without a byte-order mark. Lines end as on any system.

  Raises:
    ValueError: the file can't be used; one line that names it, the place, and what to do.
  """
  buckets.require_path("prompts file", path, remote=True)
  file = installation.find(path)
  reader = READERS.get(file.suffix.lower())
  if reader is None and file.is_file():
    kind = f"of the kind {file.suffix}" if file.suffix else "a file without an extension"
    raise ValueError(
      f"prompts file {path} is {kind}, which can't be read; use .txt with one prompt a line, or"
      " .json, .jsonl, .csv or .tsv with a key or column named prompt"
    )
  content = (reader or read_lines)(path, _read_text(path))
  if not content.rows:
    remedy = "write a list of them" if reader is read_json else "write one a line"
    if content.left_out.get("comment line"):
      remedy += ' (lines at the top that begin with "# " are comments)'
    raise ValueError(f"prompts file {path} has no prompts: {remedy}")
  return content


def _read_text(path: str) -> str:
  """The text of a file with its line ends as they are."""
  try:
    # "-sig" skips the byte-order mark that editors on Windows write.
    return installation.find(path).read_bytes().decode("utf-8-sig")
  except (FileNotFoundError, NotADirectoryError) as error:
    raise ValueError(
      f"prompts file not found: {path} (from {os.getcwd()}); set data.prompts to an existing file"
    ) from error
  except IsADirectoryError as error:
    raise ValueError(
      f"prompts file {path} is a folder; set data.prompts to a file in it, as {path}/prompts.txt"
    ) from error
  except PermissionError as error:
    raise ValueError(
      f"prompts file {path} can't be read: no permission; chmod it or name another"
    ) from error
  except UnicodeDecodeError as error:
    raise ValueError(
      f"prompts file {path} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv -t UTF-8"
    ) from error


def _lines(text: str) -> list[str]:
  """The lines of a text without their ends. A line separator (U+2028) inside of one ends none."""
  return [line.rstrip("\n") for line in io.StringIO(text, newline=None)]


def read_lines(path: str, text: str) -> Content:
  """A .txt file: every line is a prompt, without the spaces around it.

  Comments are possible at the top only: the lines above the first prompt that begin with "# ", or
  are "#" alone. Anywhere else a line that begins with # is a prompt.

  Args:
    path: the file, for messages.
    text: its content.
  """
  lines = [line.strip() for line in _lines(text)]
  first = next((i for i, line in enumerate(lines) if line and not _is_comment(line)), len(lines))
  rows = [
    Row(f"prompts file {path}, line {i + 1}", {"prompt": line})
    for i, line in enumerate(lines)
    if i >= first and line
  ]
  prompts = lines[first:]
  marked = sum(line.startswith("#") for line in prompts)
  looks = [note for looks_so, note in LOOKS if rows and all(map(looks_so, filter(None, prompts)))]
  notes = [f"{marked} with # at the beginning"] if marked else []
  left_out = {"empty line": lines.count(""), "comment line": sum(map(bool, lines[:first]))}
  return Content(rows, left_out, tuple(notes + looks))


def _is_comment(line: str) -> bool:
  return line == "#" or line.startswith("# ")


def read_json(path: str, text: str) -> Content:
  """A .json file: a list of strings or of objects.

  Args:
    path: the file, for messages.
    text: its content.

  Raises:
    ValueError: it is no list, or no JSON.
  """
  try:
    entries = json.loads(text) if text.strip() else []
  except json.JSONDecodeError as error:
    remedy = "correct it, or use a .txt file"
    if error.msg == "Extra data":
      remedy = "correct it, or name it .jsonl if each line is an entry"
    raise ValueError(
      f"prompts file {path} is not valid JSON: {error.msg} at line {error.lineno},"
      f" column {error.colno}; {remedy}"
    ) from error
  if not isinstance(entries, list):
    raise ValueError(
      f"prompts file {path} holds a {type(entries).__name__}; it must be a list of strings or of"
      " objects"
    )
  rows = [_json_row(f"prompts file {path}, entry {i}", entry) for i, entry in enumerate(entries)]
  return Content(rows, {})


def read_json_lines(path: str, text: str) -> Content:
  """A .jsonl file: a string or an object on each line.

  Args:
    path: the file, for messages.
    text: its content.

  Raises:
    ValueError: a line is neither.
  """
  lines, rows = _lines(text), []
  for number, line in enumerate(lines, start=1):
    where = f"prompts file {path}, line {number}"
    try:
      rows += [_json_row(where, json.loads(line))] if line.strip() else []
    except json.JSONDecodeError as error:
      raise ValueError(
        f"{where} is not valid JSON: {error.msg} at column {error.colno}; each line must be a"
        " string or an object; a list over several lines is a .json file"
      ) from error
  return Content(rows, {"empty line": len(lines) - len(rows)})


def _json_row(where: str, entry: Any) -> Row:
  """An entry of a .json list or a line of a .jsonl file."""
  if isinstance(entry, str):
    return Row(where, {"prompt": entry})
  if not isinstance(entry, dict):
    raise ValueError(
      f"{where} is a {type(entry).__name__}; it must be a string or an object with a prompt"
    )
  return Row(where, entry)


def read_table(delimiter: str, path: str, text: str) -> Content:
  """A .csv or .tsv file: the names of the columns, then a row for each prompt.

  A cell with the delimiter, a quotation mark or the end of a line in it stands in quotation marks,
  as spreadsheets and Python's csv write it.

  Args:
    delimiter: what stands between two cells.
    path: the file, for messages.
    text: its content.

  Raises:
    ValueError: a column of prompts is not there or not the only one, or a row doesn't fit.
  """
  numbered = _cells(delimiter, path, text)
  header = [name.strip() for name in next(numbered, (0, []))[1]]
  named = [name for name in header if name]
  if header:
    prompt_name(f"prompts file {path}", header)
  if twice := [name for name in named if named.count(name) > 1]:
    raise ValueError(f"prompts file {path} has two columns {twice[0]!r}; rename one of them")
  rows, empty, short = [], 0, 0
  for number, cells in numbered:
    where = f"prompts file {path}, line {number}"
    if not any(map(str.strip, cells)):
      empty += 1
      continue
    if any(cells[len(header) :]):
      raise ValueError(
        f"{where} has {len(cells)} cells, but there are {len(header)} columns; put a cell with"
        f" {delimiter!r} in it into quotation marks"
      )
    short += len(cells) < len(header)
    fields = {name: cell for name, cell in zip(header, cells) if name}
    # A cell can't be absent, so an empty one stands for the negative prompt of the config.
    rows.append(Row(where, {k: v for k, v in fields.items() if v.strip() or plain(k) != NEGATIVE}))
  notes = (f"{short} with fewer cells than columns",) if short else ()
  left_out = {"empty line": empty, "unnamed column": len(header) - len(named)}
  return Content(rows, left_out, notes)


def _cells(delimiter: str, path: str, text: str) -> Iterator[tuple[int, list[str]]]:
  """The rows of a table, each with the number of the line that it begins on. ValueError: the
  quotation marks don't match.
  """
  reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
  number = 1
  try:
    for cells in reader:
      yield number, cells
      number = reader.line_num + 1
  except csv.Error as error:
    raise ValueError(
      f"prompts file {path}, the row that begins on line {number} can't be read: {error}; a cell"
      ' that begins with a quotation mark must end with one, and those inside are doubled: ""'
    ) from error


def plain(name: str) -> str:
  """The name of a column or key, in the form in which names are compared."""
  return name.strip().casefold().replace(" ", "_")


def prompt_name(where: str, names: list[str]) -> str:
  """The one of these columns or keys that holds the prompt.

  Args:
    where: the file and the place in it, with which the message begins.
    names: of the columns or keys.

  Raises:
    ValueError: none of them can be it, or several.
  """
  found = [name for name in names if plain(name) in NAMES]
  if len(found) == 1:
    return found[0]
  listed = ", ".join(map(repr, names[:12])) + (", ..." if len(names) > 12 else "")
  if found:
    both = " and ".join(map(repr, found))
    raise ValueError(f"{where}: {both} can each be the prompt (of {listed}); rename all but one")
  raise ValueError(
    f"{where} has no column or key of prompts, only {listed or 'nothing'}; call one of them"
    " prompt, caption or text"
  )


READERS: dict[str, Callable[[str, str], Content]] = {
  ".txt": read_lines,
  ".json": read_json,
  ".jsonl": read_json_lines,
  ".csv": partial(read_table, ","),
  ".tsv": partial(read_table, "\t"),
}

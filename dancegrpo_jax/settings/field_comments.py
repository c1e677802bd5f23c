"""What the comments of a config file say about its fields, for --help and docs/configuration.md.

A comment belongs to the field or section that follows it on the next line, or that stands before it
on the same line.
"""

import ast
import io
import re
import textwrap
import tokenize
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_MARKS = re.compile(r" \[[A-Z]\]")  # which stand for sources that the file's docstring names


class Entry(NamedTuple):
  """A field or a section of the config.

  Attributes:
    path: its dotted name.
    is_section: whether it holds other entries.
    comment: the text above it and behind it, "" where there is none.
  """

  path: str
  is_section: bool
  comment: str


def entries(source: str) -> list[Entry]:
  """The fields and sections of a config file in the order of the file, each section before its
  fields.
  """
  comments = _comments(source)
  found: list[Entry] = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
      _collect(_path(node.targets[0]), node, node.value, comments, found)
  return found


def meanings(sources: Sequence[str]) -> dict[str, str]:
  """Field or section -> its comment, "" where it has none.

  Args:
    sources: texts of config files. The first that knows a field counts.
  """
  known: dict[str, str] = {}
  for source in sources:
    for entry in entries(source):
      known.setdefault(entry.path, entry.comment)
  return known


def listing(fields: Mapping[str, str], known: Mapping[str, str], width: int = 100) -> list[str]:
  """Lines for a terminal: each field as an argument, and its meaning below it.

  Args:
    fields: full name -> the value as one types it.
    known: of `meanings`. Fields are listed in its order, and then those that it lacks.
    width: the length of a line at most, where a value isn't longer.
  """
  lines = []
  order = {path: i for i, path in enumerate(known)}
  for field in sorted(fields, key=lambda field: order.get(field, len(order))):
    lines.append(f"  --config.{field}={fields[field]}")
    text = _MARKS.sub("", known.get(field, ""))
    indent = " " * 6
    lines += textwrap.wrap(
      text,
      width,
      initial_indent=indent,
      subsequent_indent=indent,
      break_long_words=False,
      break_on_hyphens=False,
    )
  return lines


def _path(target: ast.expr) -> str:
  """ "reward.mine" of `config.reward.mine`."""
  names = []
  while isinstance(target, ast.Attribute):
    names.insert(0, target.attr)
    target = target.value
  return ".".join(names)


def _collect(
  path: str,
  start: ast.stmt | ast.expr,
  value: ast.expr,
  comments: dict[int, tuple[bool, str]],
  found: list[Entry],
) -> None:
  """Adds an entry and what is inside it; `start` is the node at which its first line begins."""
  section = _dict_of(value)
  last = section.lineno if section else value.end_lineno or value.lineno
  found.append(Entry(path, section is not None, _comment(start.lineno, last, comments)))
  for key, inner in zip(section.keys, section.values) if section else ():
    if isinstance(key, ast.Constant):
      _collect(f"{path}.{key.value!s}", key, inner, comments, found)


def _dict_of(value: ast.expr) -> ast.Dict | None:
  """The dict of `ConfigDict({...})`, or None for anything else."""
  if not isinstance(value, ast.Call) or getattr(value.func, "id", "") != "ConfigDict":
    return None
  written = value.args[0] if value.args else None
  return written if isinstance(written, ast.Dict) else None


def _comments(source: str) -> dict[int, tuple[bool, str]]:
  """Line -> (whether the comment is alone on it, its text)."""
  lines = source.splitlines()
  found = {}
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      row, column = token.start
      found[row] = (not lines[row - 1][:column].strip(), token.string.lstrip("#").strip())
  return found


def _comment(first: int, last: int, comments: dict[int, tuple[bool, str]]) -> str:
  """The comment lines directly above line `first`, and those on the lines from there to `last`."""
  above = []
  row = first - 1
  while row in comments and comments[row][0]:
    above.insert(0, comments[row][1])
    row -= 1
  return " ".join(above + [comments[row][1] for row in range(first, last + 1) if row in comments])

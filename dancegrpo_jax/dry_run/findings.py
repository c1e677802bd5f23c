"""What a dry run has found: one row a check. A check that fails doesn't end the others."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from dancegrpo_jax.errors import ConfigError, ConversionError

OK, NOTE, PROBLEM = "ok", "note", "NO"
T = TypeVar("T")


class NotedError(ConfigError):
  """A mistake that has a row already."""


class Finding(NamedTuple):
  """A row of the table.

  Attributes:
    check: what was looked at.
    mark: `OK`, `NOTE` (to know, and no obstacle) or `PROBLEM`.
    text: what was found, in one line.
  """

  check: str
  mark: str
  text: str


def attempt(found: list[Finding], check: str, act: Callable[[], T]) -> T | None:
  """Does a part of what the run does. Its mistakes become rows, one for each line.

  Returns:
    Its result; None after a mistake.
  """
  try:
    return act()
  except (ConfigError, ConversionError) as error:
    if isinstance(error, NotedError) or isinstance(error.__cause__, NotedError):
      return None
    known = {row.text for row in found}
    lines = [line for line in str(error).splitlines() if line not in known]
    found += [Finding(check, PROBLEM, line) for line in lines]
    return None


def table(found: Sequence[Finding]) -> str:
  """The rows in columns. A check is named in its first row only."""
  width = max(len(row.check) for row in found)
  lines, before = [], ""
  for row in found:
    name = "" if row.check == before else row.check
    lines.append(f"{name:<{width}}  {row.mark:<4}  {row.text}")
    before = row.check
  return "\n".join(lines)


def verdict(found: Sequence[Finding]) -> str:
  """ "ready", or "not ready: ..." with the checks that failed and how to go on."""
  failed = list(dict.fromkeys(row.check for row in found if row.mark == PROBLEM))
  if not failed:
    return "ready"
  count = sum(row.mark == PROBLEM for row in found)
  lines = "line" if count == 1 else "lines"
  return f"not ready: {', '.join(failed)}; do what the {count} {lines} with NO in front say"

"""How times are measured, and how numbers become cells of a table: medians with their spread."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any


def timed(
  call: Callable[[], Any],
  wait: Callable[[Any], Any],
  count: int = 5,
  seconds: float = 12.0,
  least: int = 2,
) -> list[float]:
  """Times in seconds of several calls of a function that has been called once before.

  Args:
    call: the function.
    wait: blocks until a call's result is computed.
    count: the largest number of calls.
    seconds: time after which no further call is made.
    least: the smallest number of calls.
  """
  times, start = [], time.perf_counter()
  while len(times) < least or (len(times) < count and time.perf_counter() - start < seconds):
    before = time.perf_counter()
    wait(call())
    times.append(time.perf_counter() - before)
  return times


def spread(values: list[float], unit: str) -> dict:
  """A cell: the median, with the smallest and the largest of several measurements."""
  cell = {"value": median(values), "unit": unit, "low": min(values), "high": max(values)}
  return cell | {"runs": len(values)}


def number(value: float, unit: str = "") -> dict:
  """A cell with one number."""
  return {"value": float(value), "unit": unit}


def text(words: str) -> dict:
  """A cell with words."""
  return {"text": words}


def gib(size: float) -> dict:
  """A cell with a number of bytes."""
  return number(size / 2**30, "GiB")


def percent(value: float) -> dict:
  """A cell with a percentage."""
  return number(100 * value, "%")


def shown(value: dict) -> str:
  """The text of a cell."""
  if "text" in value:
    return value["text"]
  unit = f" {value['unit']}" if value["unit"] else ""
  words = f"{value['value']:.4g}{unit}"
  if "low" in value:
    runs = f"{value['runs']} run{'s' * (value['runs'] > 1)}"
    words += f" ({value['low']:.4g} to {value['high']:.4g}, {runs})"
  return words


def reason(error: BaseException) -> str:
  """An exception as a short part of one line."""
  said = " ".join(str(error).split())
  return f"{type(error).__name__}: {said}"[:200].rstrip(" :")

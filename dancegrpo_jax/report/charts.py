"""Draws charts as HTML with SVG curves. Colours and fonts come from the page's CSS, so that charts
follow its light or dark theme. Ticks are HTML, so that their text has the same size at every width
of the page, and the column of the y axis is as wide as its longest number.

Matplotlib's SVG backend was tried in place of this. It took two seconds a page instead of a
fiftieth of a second, has fixed colours, and shows no values under the pointer.
"""

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

_SIDE = 1000  # of the square that the SVG stretches over the chart
_MAX_POINTS = 60  # points of a line that show their value under the pointer
_MAX_DOTS = 40  # of a line; with more of them the line is drawn alone
_MOST = 200  # points of a line; a longer one is drawn as means of its neighbours
_OUTLIERS = 0.02  # share of the values at either end that may lie outside of a chart
_MAX_BARS = 24  # of a histogram
_FAR = 2.5  # how much longer an axis must be for the outliers' sake, so that they are left outside

Values = Sequence[float | int]  # NaN is a gap


class Series(NamedTuple):
  """One line. `color` is the number of a CSS class, c1, c2, ...; with `dots` its points are drawn
  too. `x` are ascending.
  """

  label: str
  x: Values
  values: Values
  color: int = 1
  dots: bool = False


class Band(NamedTuple):
  """A filled area between two curves."""

  label: str
  x: Values
  low: Values
  high: Values
  color: int = 1


class Axis(NamedTuple):
  """An axis: its ends, its ticks, and what stands at them."""

  low: float | int
  high: float | int
  ticks: Values
  texts: Sequence[str]

  def place(self, value: float | int) -> float:
    """The place of a value between 0 and 1."""
    return (value - self.low) / (self.high - self.low)


def chart(
  title: str,
  unit: str,
  lines: Sequence[Series],
  bands: Sequence[Band] = (),
  x_label: str = "iterations",
  from_zero: bool = False,
) -> str:
  """A figure with title, unit, legend, axes and curves, as HTML; "" where no value is finite.

  The y axis fits the bulk of the values: single ones that lie far away are outside of the chart,
  and the legend says how many.

  Args:
    title: of the figure.
    unit: of the y axis, with an explanation where that helps.
    lines: the curves.
    bands: areas below the curves.
    x_label: of the x axis.
    from_zero: whether the y axis begins at 0.
  """
  places = [position for line in lines for position in line.x]
  lines = [_shorter(line) for line in lines]
  bands = [_shorter_band(band) for band in bands]
  curves = [line.values for line in lines]
  curves += [limit for band in bands for limit in (band.low, band.high)]
  finite = [value for curve in curves for value in curve if math.isfinite(value)]
  if not finite:
    return ""
  low, high = _bulk(finite)
  y = _axis(min(0.0, low) if from_zero else low, high)
  first, last = min(places), max(max(places), min(places) + 1)
  marks = [tick for tick in ticks(first, last) if tick == int(tick) and first <= tick <= last]
  x = Axis(first, last, marks, [f"{int(tick)}" for tick in marks])
  outside = sum(not y.low <= v <= y.high for line in lines for v in line.values if math.isfinite(v))
  parts = [_area(band, x, y) for band in bands]
  parts += [part for line in lines for part in _line(line, x, y)]
  legend = [(f"c{line.color}", line.label) for line in lines]
  legend += [(f"area c{band.color}", band.label) for band in bands]
  notes = [f"{_count(outside, 'far value')} outside of the chart"] if outside else []
  return frame(
    title=title,
    unit=unit,
    x=x,
    y=y,
    x_label=x_label,
    content="".join(parts),
    legend=legend if len(legend) > 1 else [],
    notes=notes,
    description="; ".join(_described(line) for line in lines),
  )


def histogram(title: str, unit: str, groups: Sequence[tuple[str, Values]], x_label: str) -> str:
  """The distributions of several groups of values in one chart; "" where no value is finite.

  Args:
    title: of the figure.
    unit: an explanation.
    groups: a label and values for each. The first has colour c2 and is drawn as an outline, and the
      others are filled.
    x_label: of the values.
  """
  groups = [(label, [v for v in values if math.isfinite(v)]) for label, values in groups]
  groups = [(label, values) for label, values in groups if values]
  if not groups:
    return ""
  x = _axis(*_padded(*_ends([value for _, values in groups for value in values])), count=6)
  fewest = min(len(values) for _, values in groups)
  bins = min(_MAX_BARS, max(_MAX_BARS // 3, round(2 * math.sqrt(fewest))))
  counts = [np.histogram(values, bins, (x.low, x.high))[0] for _, values in groups]
  shares = [count / count.sum() for count in counts]
  y = _axis(0.0, float(max(map(max, shares))), percent=True)
  edges = np.linspace(x.low, x.high, bins + 1)
  parts, legend = [], []
  for number, ((label, values), share) in enumerate(zip(groups, shares)):
    css = "outline c2" if number == 0 and len(groups) > 1 else f"bars c{max(1, number)}"
    used = np.flatnonzero(share)
    first, last = used[0], used[-1] + 1
    steps = [(edges[i + side], share[i]) for i in range(first, last) for side in (0, 1)]
    points = [(edges[first], 0.0), *steps, (edges[last], 0.0)]
    parts.insert(0, f'<path class="{css}" d="{_path(points, x, y)}"/>')
    legend.append((css.replace("bars", "area"), f"{label} ({_count(len(values), 'sample')})"))
  described = "; ".join(
    f"{label}: mean {number_text(sum(values) / len(values))}" for label, values in groups
  )
  return frame(title, unit, x, y, x_label, "".join(parts), legend, [], described)


def frame(
  title: str,
  unit: str,
  x: Axis,
  y: Axis,
  x_label: str,
  content: str,
  legend: Sequence[tuple[str, str]],
  notes: Sequence[str],
  description: str,
) -> str:
  """The figure around curves.

  Args:
    title, unit, x_label: see `chart`.
    x, y: the axes.
    content: SVG in a square with sides of 1000.
    legend: pairs of CSS classes and labels.
    notes: more words for the legend, about values outside of the chart.
    description: what a screen reader says.
  """
  name = escape(title)
  keys = [f'<span class="key"><i class="{css}"></i>{escape(text)}</span>' for css, text in legend]
  keys += [f'<span class="key">{escape(note)}</span>' for note in notes]
  row = f'<span class="legend">{"".join(keys)}</span>' if keys else ""
  unit = f' <span class="unit">{escape(unit)}</span>' if unit else ""
  caption = f"<figcaption><b>{name}</b>{unit}{row}</figcaption>"
  across = [round(_SIDE * (1 - y.place(tick)), 1) for tick in y.ticks]
  grid = "".join(f'<path class="grid" d="M0 {place:g}H{_SIDE}"/>' for place in across)
  y_ticks = "".join(
    f'<span style="top:{place / 10:.2f}%">{text}</span>' for place, text in zip(across, y.texts)
  )
  x_ticks = "".join(
    f'<span style="left:{100 * x.place(tick):.2f}%">{text}</span>'
    for tick, text in zip(x.ticks, x.texts)
  )
  widest, cut = max(y.texts, key=len), ' class="cut"' if notes else ""
  label = escape(f"{title}. {description}", quote=True)
  return (
    f'<figure class="chart">{caption}<div class="plot" role="img" aria-label="{label}">'
    f'<div class="y" aria-hidden="true"><i>{widest}</i>{y_ticks}</div>'
    f'<svg{cut} viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none">{grid}{content}</svg>'
    f'<div class="x" aria-hidden="true">{x_ticks}</div>'
    f'<div class="label" aria-hidden="true">{escape(x_label)}</div></div></figure>'
  )


def ticks(low: float | int, high: float | int, count: int = 5) -> list[float]:
  """Multiples of a round step (1, 2 or 5 times a power of ten) that enclose [low, high].

  The first and the last are the ends of the axis. There are about `count` steps.
  """
  raw = (high - low) / count
  magnitude = 10.0 ** math.floor(math.log10(raw))
  step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw * 0.999)
  first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
  digits = max(0, 1 - math.floor(math.log10(step)))
  return [round(index * step, digits) for index in range(first, last + 1)]


def number_text(value: float | int, step: float | int = 0) -> str:
  """A number as text.

  Args:
    value: the number.
    step: the step between ticks, which gives the digits; 0 for four significant ones.
  """
  if not math.isfinite(value):
    return "–"
  if value == 0:
    return "0"
  if abs(value) < 1e-3 or abs(value) >= 1e5:
    return (f"{value:.2g}" if step else f"{value:.3g}").replace("e-0", "e-").replace("e+0", "e")
  if step:
    return f"{value:.{min(8, max(0, -math.floor(math.log10(step) + 1e-9)))}f}"
  return f"{value:.4g}" if abs(value) < 0.1 or abs(value) >= 10 else f"{value:.4f}"


def binned(x: Values, *columns: Values, most: int = _MOST) -> tuple[Values, ...]:
  """Columns of at most `most` rows: means over equally many neighbours, where NaN doesn't count.

  Args:
    x: positions.
    columns: values at them.
    most: number of rows that is left.

  Returns:
    The positions and the columns.
  """
  size = -(-len(x) // most)
  if size <= 1:
    return (list(x), *map(list, columns))
  starts = range(0, len(x), size)
  return tuple(
    [_mean([v for v in column[i : i + size] if math.isfinite(v)]) for i in starts]
    for column in (x, *columns)
  )


def _mean(values: Values) -> float:
  return sum(values) / len(values) if values else math.nan


def _shorter(line: Series) -> Series:
  x, values = binned(line.x, line.values)
  return line._replace(x=x, values=values)


def _shorter_band(band: Band) -> Band:
  x, low, high = binned(band.x, band.low, band.high)
  return band._replace(x=x, low=low, high=high)


def _ends(values: Values) -> tuple[float, float]:
  return float(min(values)), float(max(values))


def _bulk(values: Values) -> tuple[float, float]:
  """The least and the greatest value, without single ones far away from the others."""
  ordered = sorted(values)
  left_out = math.ceil(_OUTLIERS * len(ordered))
  if len(ordered) >= 10:
    inner, full = _padded(*_ends(ordered[left_out:-left_out])), _ends(ordered)
    span = inner[1] - inner[0]
    if full[1] - full[0] > _FAR * span:
      return max(full[0], inner[0] - 0.2 * span), min(full[1], inner[1] + 0.2 * span)
  return _padded(*_ends(ordered))


def _padded(low: float | int, high: float | int) -> tuple[float, float]:
  """A range that is not empty: a constant curve gets a tenth of its value on both sides, and a
  curve of zeros gets [0, 1].
  """
  if high - low > 1e-9 * max(abs(low), abs(high)):
    return float(low), float(high)
  room = abs(high) * 0.1
  return (low - room, high + room) if room else (0.0, 1.0)


def _axis(low: float | int, high: float | int, count: int = 5, percent: bool = False) -> Axis:
  marks = ticks(low, high, count)
  step = marks[1] - marks[0]
  texts = [number_text(mark, step) for mark in marks]
  if percent:
    texts = [f"{number_text(100 * mark, 100 * step)} %" for mark in marks]
  return Axis(marks[0], marks[-1], marks, texts)


def _count(count: int, noun: str) -> str:
  return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _runs(*columns: Values) -> Iterator[list[int]]:
  """Stretches of positions at which all columns are finite. Between them the curve has a gap."""
  run: list[int] = []
  for index, row in enumerate(zip(*columns)):
    if all(math.isfinite(value) for value in row):
      run.append(index)
    elif run:
      yield run
      run = []
  if run:
    yield run


def _path(points: Sequence[tuple[float | int, float | int]], x: Axis, y: Axis) -> str:
  places = [(_SIDE * x.place(across), _SIDE * (1 - y.place(value))) for across, value in points]
  return "M" + "L".join(f"{across:.1f} {down:.1f}" for across, down in places)


def _area(band: Band, x: Axis, y: Axis) -> str:
  paths = []
  for run in _runs(band.low, band.high):
    upper = [(band.x[i], band.high[i]) for i in run]
    lower = [(band.x[i], band.low[i]) for i in reversed(run)]
    paths.append(f"{_path(upper + lower, x, y)}Z")
  return f'<path class="band c{band.color}" d="{"".join(paths)}"/>'


def _line(line: Series, x: Axis, y: Axis) -> Iterator[str]:
  """The line, and points on it that show their value under the pointer."""
  runs = list(_runs(line.values))
  paths = [_path([(line.x[i], line.values[i]) for i in run], x, y) for run in runs]
  yield f'<path class="line c{line.color}" d="{"".join(paths)}"/>'
  points = [i for run in runs for i in run]
  stride = max(1, -(-len(points) // _MAX_POINTS))
  for i in dict.fromkeys(points[::stride] + points[-1:]):
    if not y.low <= line.values[i] <= y.high:
      continue
    # A line without neighbours is not seen, so the point itself is drawn.
    css = "dot shown" if line.dots and len(points) <= _MAX_DOTS or [i] in runs else "dot"
    label = escape(f"{line.label}, {line.x[i]:.0f}: {number_text(line.values[i])}")
    place = _path([(line.x[i], line.values[i])], x, y)
    yield f'<path class="{css} c{line.color}" d="{place}h0"><title>{label}</title></path>'


def _described(line: Series) -> str:
  finite = [value for value in line.values if math.isfinite(value)]
  if not finite:
    return f"{line.label}: no values"
  return f"{line.label}: from {number_text(finite[0])} to {number_text(finite[-1])}"

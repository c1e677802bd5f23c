"""Draws line charts as SVG. Colours and fonts come from the page's CSS, so that charts follow its
light or dark theme.

Matplotlib's SVG backend was tried in place of this. It took two seconds a page instead of a
fiftieth of a second, has fixed colours, and shows no values under the pointer.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 40  # margins, in units of the view box
_MAX_POINTS = 120  # points of a line that show their value under the pointer

Values = Sequence[float | int]  # NaN is a gap
Place = Callable[[float | int, float | int], tuple[float, float]]  # from values to the view box


class Series(NamedTuple):
  """One line. `color` is the number of a CSS class, c1, c2, ..."""

  label: str
  values: Values
  color: int = 1


class Band(NamedTuple):
  """A filled area between two curves. A weak one is paler and lies below the others."""

  label: str
  low: Values
  high: Values
  color: int = 1
  weak: bool = False

  @property
  def css(self) -> str:
    """The classes of the area."""
    return f"weak c{self.color}" if self.weak else f"c{self.color}"


def chart(
  title: str,
  unit: str,
  x: Values,
  lines: Sequence[Series],
  bands: Sequence[Band] = (),
  x_label: str = "iteration",
) -> str:
  """A figure with title, unit, legend, axes and curves, as HTML; "" where no value is finite.

  Args:
    title: of the figure.
    unit: of the y axis, with an explanation where that helps.
    x: positions, ascending.
    lines: their values, one for each position.
    bands: their limits, one pair for each position.
    x_label: of the x axis.
  """
  curves = [line.values for line in lines]
  curves += [limit for band in bands for limit in (band.low, band.high)]
  finite = [value for curve in curves for value in curve if math.isfinite(value)]
  if not finite or not len(x):
    return ""
  y_ticks = ticks(*_padded(min(finite), max(finite)))
  end = max(x[-1], x[0] + 1)
  x_ticks = [tick for tick in ticks(x[0], end, 6) if tick == int(tick) and x[0] <= tick <= end]
  low, high = y_ticks[0], y_ticks[-1]
  span = max(x[-1] - x[0], 1)

  def place(position: float | int, value: float | int) -> tuple[float, float]:
    across = (position - x[0]) / span * (WIDTH - LEFT - RIGHT)
    return LEFT + across, TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

  parts = [*_axes(x_ticks, y_ticks, place, x_label)]
  parts += [_area(band, x, place) for band in sorted(bands, key=lambda band: not band.weak)]
  parts += [part for line in lines for part in _line(line, x, place)]
  name = escape(title)
  svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg>'
  heading = f'<b>{name}</b> <span class="unit">{escape(unit)}</span>'
  caption = f"<figcaption>{heading}{_legend(lines, bands)}</figcaption>"
  return f'<figure class="chart">{caption}{svg}</figure>'


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


def number(value: float | int, step: float | int = 0) -> str:
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


def _padded(low: float | int, high: float | int) -> tuple[float, float]:
  """A range that is not empty: a constant curve gets a tenth of its value on both sides, and a
  curve of zeros gets [0, 1].
  """
  if high - low > 1e-9 * max(abs(low), abs(high)):
    return float(low), float(high)
  room = abs(high) * 0.1
  return (low - room, high + room) if room else (0.0, 1.0)


def _axes(x_ticks: Values, y_ticks: Values, place: Place, x_label: str) -> Iterator[str]:
  step, bottom, right = y_ticks[1] - y_ticks[0], HEIGHT - BOTTOM, WIDTH - RIGHT
  for tick in y_ticks:
    _, y = place(0, tick)
    yield f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>'
    yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(tick, step)}</text>'
  for tick in x_ticks:
    across, _ = place(tick, y_ticks[0])
    yield f'<path class="axis" d="M{across:.1f} {bottom}v4"/>'
    yield f'<text x="{across:.1f}" y="{bottom + 17}" text-anchor="middle">{int(tick)}</text>'
  yield f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>'
  place_of_label = f'x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 5}" text-anchor="middle"'
  yield f'<text class="label" {place_of_label}>{escape(x_label)}</text>'


def _runs(*columns: Values) -> Iterator[list[int]]:
  """Stretches of positions at which all columns are finite. Between them the curve has a gap."""
  run = []
  for index, row in enumerate(zip(*columns)):
    if all(math.isfinite(value) for value in row):
      run.append(index)
    elif run:
      yield run
      run = []
  if run:
    yield run


def _path(points: Sequence[tuple[float, float]]) -> str:
  return "M" + "L".join(f"{across:.1f} {y:.1f}" for across, y in points)


def _area(band: Band, x: Values, place: Place) -> str:
  paths = []
  for run in _runs(band.low, band.high):
    upper = [place(x[i], band.high[i]) for i in run]
    lower = [place(x[i], band.low[i]) for i in reversed(run)]
    paths.append(f"{_path(upper + lower)}Z")
  return f'<path class="band {band.css}" d="{"".join(paths)}"/>'


def _line(line: Series, x: Values, place: Place) -> Iterator[str]:
  """The line, and points on it that show their value under the pointer."""
  runs = list(_runs(line.values))
  paths = [_path([place(x[i], line.values[i]) for i in run]) for run in runs]
  yield f'<path class="line c{line.color}" d="{"".join(paths)}"/>'
  points = [i for run in runs for i in run]
  stride = max(1, -(-len(points) // _MAX_POINTS))
  for i in points[::stride] + points[-1:]:
    across, y = place(x[i], line.values[i])
    css = f"dot c{line.color}"
    if [i] in runs:  # without neighbours there is no line, so the point itself is drawn
      css += " alone"
    label = escape(f"{line.label}, {x[i]}: {number(line.values[i])}")
    circle = f'<circle class="{css}" cx="{across:.1f}" cy="{y:.1f}" r="4">'
    yield f"{circle}<title>{label}</title></circle>"


def _legend(lines: Sequence[Series], bands: Sequence[Band]) -> str:
  """The names of the curves; "" for a single line, which has the name of the figure."""
  if len(lines) + len(bands) < 2:
    return ""
  entries = [(f"c{line.color}", line.label) for line in lines]
  entries += [(f"area {band.css}", band.label) for band in bands]
  keys = [
    f'<span class="key"><i class="{css}"></i>{escape(label)}</span>' for css, label in entries
  ]
  return f'<span class="legend">{"".join(keys)}</span>'

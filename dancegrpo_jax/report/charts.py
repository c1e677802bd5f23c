"""Line charts as plain SVG: colours and fonts come from the page's CSS, so that they follow its
light or dark theme.
"""

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 40  # margins, in units of the view box
_MAX_POINTS = 120  # of a line that show their value under the pointer

Values = Sequence[float | int]  # NaN is a gap


class Series(NamedTuple):
  """One line. `color` is a number that the CSS gives a colour to (class c1, c2, ...)."""

  label: str
  values: Values
  color: int = 1


class Band(NamedTuple):
  """A filled area between two curves. A weak one is drawn paler, beneath."""

  label: str
  low: Values
  high: Values
  color: int = 1
  weak: bool = False


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
    title: what is shown.
    unit: of the y axis, with a word on what it means where that helps.
    x: positions, ascending.
    lines: one value a position each.
    bands: likewise; spread around a line.
  """
  everything = [value for line in lines for value in line.values] + [
    v for band in bands for v in (*band.low, *band.high)
  ]
  finite = [value for value in everything if math.isfinite(value)]
  if not finite or not len(x):
    return ""
  y_ticks = ticks(*_padded(min(finite), max(finite)))
  x_ticks = [tick for tick in ticks(x[0], max(x[-1], x[0] + 1), 6) if tick == int(tick)]
  low, high = y_ticks[0], y_ticks[-1]
  span = max(x[-1] - x[0], 1)

  def place(position: float | int, value: float | int) -> tuple[float, float]:
    across = (position - x[0]) / span * (WIDTH - LEFT - RIGHT)
    return LEFT + across, TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

  parts = [*_axes(x_ticks, y_ticks, place, x, x_label)]
  parts += [_area(band, x, place) for band in sorted(bands, key=lambda band: not band.weak)]
  parts += [part for line in lines for part in _line(line, x, place)]
  svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
  caption = f'<figcaption><b>{escape(title)}</b> <span class="unit">{escape(unit)}</span>{_legend(lines, bands)}</figcaption>'
  return f'<figure class="chart">{caption}{svg}</figure>'


def ticks(low: float | int, high: float | int, count: int = 5) -> list[float]:
  """Round numbers (1, 2 or 5 times a power of ten) that enclose [low, high]; the first and last are
  the axis' ends.
  """
  raw = (high - low) / count
  magnitude = 10.0 ** math.floor(math.log10(raw))
  step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw * 0.999)
  first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
  digits = max(0, 1 - math.floor(math.log10(step)))
  return [round(index * step, digits) for index in range(first, last + 1)]


def number(value: float | int, step: float | int = 0) -> str:
  """A number as a person writes it, with the digits that a step between ticks needs (or four
  significant ones).
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
  """A range that isn't empty: a constant curve gets a tenth of its value on both sides, one of
  zeros [0, 1].
  """
  if high - low > 1e-9 * max(abs(low), abs(high)):
    return float(low), float(high)
  room = abs(high) * 0.1
  return (low - room, high + room) if room else (0.0, 1.0)


def _axes(x_ticks, y_ticks, place, x: Values, x_label: str) -> Iterator[str]:
  step = y_ticks[1] - y_ticks[0]
  for tick in y_ticks:
    _, y = place(x[0], tick)
    yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
    yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(tick, step)}</text>'
  bottom = HEIGHT - BOTTOM
  for tick in x_ticks:
    if x[0] <= tick <= max(x[-1], x[0] + 1):
      across, _ = place(tick, y_ticks[0])
      yield f'<path class="axis" d="M{across:.1f} {bottom}v4"/>'
      yield f'<text x="{across:.1f}" y="{bottom + 17}" text-anchor="middle">{int(tick)}</text>'
  yield f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>'
  yield f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>'


def _runs(*columns: Values) -> Iterator[list[int]]:
  """Stretches of positions where all columns are finite: a NaN breaks a curve."""
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


def _area(band: Band, x: Values, place) -> str:
  paths = []
  for run in _runs(band.low, band.high):
    upper = [place(x[i], band.high[i]) for i in run]
    lower = [place(x[i], band.low[i]) for i in reversed(run)]
    paths.append(f"{_path(upper + lower)}Z")
  return f'<path class="band{" weak" if band.weak else ""} c{band.color}" d="{"".join(paths)}"/>'


def _line(line: Series, x: Values, place) -> Iterator[str]:
  runs = list(_runs(line.values))
  yield f'<path class="line c{line.color}" d="{"".join(_path([place(x[i], line.values[i]) for i in run]) for run in runs)}"/>'
  shown = [i for run in runs for i in run]
  stride = max(1, -(-len(shown) // _MAX_POINTS))
  for i in shown[::stride] + shown[-1:]:
    across, y = place(x[i], line.values[i])
    lone = " alone" if [i] in runs else ""
    label = f"{line.label}, {x[i]}: {number(line.values[i])}"
    yield f'<circle class="dot c{line.color}{lone}" cx="{across:.1f}" cy="{y:.1f}" r="4"><title>{escape(label)}</title></circle>'


def _legend(lines: Sequence[Series], bands: Sequence[Band]) -> str:
  """Names of the curves; none for a single line, which the title names."""
  if len(lines) + len(bands) < 2:
    return ""
  keys = [
    f'<span class="key"><i class="c{line.color}"></i>{escape(line.label)}</span>' for line in lines
  ]
  for band in bands:
    kind = f"area{' weak' if band.weak else ''} c{band.color}"
    keys.append(f'<span class="key"><i class="{kind}"></i>{escape(band.label)}</span>')
  return f'<span class="legend">{"".join(keys)}</span>'

"""The drawings of a report: differences with their intervals, and who stands where."""

import dataclasses
from collections.abc import Sequence

from lora_jax.report import svg
from lora_jax.report.document import BAD, EVEN, GOOD, Figure
from lora_jax.report.results import BASE, Dataset, Results
from lora_jax.report.tables import spread

_WIDTH = 400
# Names take no more room than this.
_LABELS = 170


@dataclasses.dataclass(frozen=True)
class Point:
  """A labelled point of a scatter, with how far it reaches.

  Attributes:
    label: its name.
    x: place.
    y: place.
    x_range: interval, or None.
    y_range: interval, or None.
    kind: class of its colour.
  """

  label: str
  x: float
  y: float
  x_range: tuple[float, float] | None = None
  y_range: tuple[float, float] | None = None
  kind: str = 'mark'


def front(points: Sequence[Point]) -> list[Point]:
  """The points that no other one beats in both: less x and more y; from the left."""
  best = []
  for point in sorted(points, key=lambda p: (p.x, -p.y)):
    if not best or point.y > best[-1].y:
      best.append(point)
  return best


def differences(dataset: Dataset, names: Sequence[str]) -> Figure | None:
  """A dataset's differences to the base, a row for each configuration, with intervals."""
  held = dataset.statistics
  found = [(name, held.compare(name, BASE)) for name in names] if held else []
  rows = [(name, compared) for name, compared in found if compared]
  if not rows:
    return None
  low = min(0.0, *(c.low for _, c in rows), *(c.difference for _, c in rows))
  high = max(0.0, *(c.high for _, c in rows), *(c.difference for _, c in rows))
  high, low = (high, low) if high > low else (1.0, -1.0)
  labels = min(_LABELS, max(svg.width(name) for name, _ in rows))
  left, right, top = labels + 8, _WIDTH - 14, 8
  place = lambda value: left + (value - low) / (high - low) * (right - left)
  bottom = top + 20 * len(rows)
  parts = []
  for tick in svg.ticks(low, high):
    parts.append(svg.line(place(tick), top, place(tick), bottom, 'axis' if not tick else 'grid'))
    parts.append(svg.text(place(tick), bottom + 15, f'{tick:+g}' if tick else '0', 'middle', 'dim'))
  for i, (name, compared) in enumerate(rows):
    y = top + 20 * i + 10
    kind = {1: GOOD, -1: BAD, 0: EVEN}[compared.beyond_noise]
    numbers = spread(compared.difference, compared.low, compared.high)
    parts += [
      svg.text(labels, y + 4, svg.fitted(name, labels + 1), 'end'),
      svg.line(place(compared.low), y, place(compared.high), y, f'{kind} whisker'),
      svg.dot(place(compared.difference), y, kind, f'{name} {numbers}'),
    ]
  says = f'{dataset.title}: points above the base, each target set with its interval'
  drawn = svg.drawing(_WIDTH, bottom + 22, says, parts)
  return Figure(f'difference_{dataset.name}', dataset.title, drawn, says)


def accuracy_latency(results: Results) -> list[tuple[Figure, list[str]]]:
  """Average score against latency, for prefill and decoding, each with its Pareto front."""
  held = results.average_statistics
  drawings = []
  for work, title in (('prefill', 'Prefill'), ('decode', 'One decoded token')):
    points = []
    for name in results.configurations:
      times, average = results.times(name), results.averages.get(name)
      if times and average and average.mean is not None:
        reach = None
        if name != BASE:
          reach = (times[f'{work}_ratio_low'], times[f'{work}_ratio_high'])
        interval = held.intervals.get(name) if held else None
        points.append(Point(name, times[f'{work}_ratio'], average.mean, reach, interval))
    if points:
      axes = ('latency, base = 1', 'average score')
      says = f'{title}: average score against latency, with the line of those that none beats'
      best = front(points)
      points = [
        point if point in best else dataclasses.replace(point, kind=EVEN) for point in points
      ]
      drawn = scatter(points, axes, says, best)
      figure = Figure(f'accuracy_{work}', title, drawn, says)
      drawings.append((figure, [point.label for point in best]))
  return drawings


def difficulty(points: Sequence[Point]) -> Figure:
  """Spread between configurations against the base's score, a point for each dataset."""
  says = 'range of the configurations’ scores against the base’s score, a point for each dataset'
  drawn = scatter(points, ('score of the base', 'range of scores'), says)
  return Figure('difficulty_spread', 'Difficulty against spread', drawn, says)


def scatter(
  points: Sequence[Point], axes: tuple[str, str], says: str, joined: Sequence[Point] = ()
) -> str:
  """Points with names beside the frame, each led to by a line, so that none overlap.

  Args:
    points: at least one.
    axes: names of x and y.
    says: what is read out.
    joined: points that a dashed line goes through.
  """
  beside = min(_LABELS, max(svg.width(point.label) for point in points))
  height = max(230, svg.LINE * len(points) + 70)
  left, right, top, bottom = 44, _WIDTH - beside - 26, 24, height - 44
  x_low, x_high = _range([(p.x, p.x_range) for p in points])
  y_low, y_high = _range([(p.y, p.y_range) for p in points])
  across = lambda x: left + (x - x_low) / (x_high - x_low) * (right - left)
  up = lambda y: bottom - (y - y_low) / (y_high - y_low) * (bottom - top)
  parts = []
  for tick in svg.ticks(x_low, x_high, 4):
    parts.append(svg.line(across(tick), top, across(tick), bottom, 'grid'))
    parts.append(svg.text(across(tick), bottom + 15, f'{tick:g}', 'middle', 'dim'))
  for tick in svg.ticks(y_low, y_high):
    parts.append(svg.line(left, up(tick), right, up(tick), 'grid'))
    parts.append(svg.text(left - 6, up(tick) + 4, f'{tick:g}', 'end', 'dim'))
  parts.append(svg.text((left + right) / 2, bottom + 34, axes[0], 'middle', 'dim'))
  parts.append(svg.text(4, top - 10, axes[1], 'start', 'dim'))
  places = svg.apart([up(point.y) for point in points], top, bottom)
  for point, place in zip(points, places, strict=True):
    name = svg.fitted(point.label, beside + 1)
    parts.append(svg.text(right + 22, place + 4, name))
    ends = ((across(point.x), up(point.y)), (right + 4, place), (right + 18, place))
    parts.append(svg.path(ends, 'lead'))
  if len(joined) > 1:
    parts.append(svg.path([(across(p.x), up(p.y)) for p in joined], 'front'))
  for point in points:
    x, y = across(point.x), up(point.y)
    if point.x_range:
      parts.append(svg.line(across(point.x_range[0]), y, across(point.x_range[1]), y, point.kind))
    if point.y_range:
      parts.append(svg.line(x, up(point.y_range[0]), x, up(point.y_range[1]), point.kind))
    parts.append(svg.dot(x, y, point.kind, f'{point.label}: {point.x:.4g}, {point.y:.4g}'))
  return svg.drawing(_WIDTH, height, says, parts)


def _range(values: Sequence[tuple[float, tuple[float, float] | None]]) -> tuple[float, float]:
  ends = [end for value, reach in values for end in (value, *(reach or ()))]
  low, high = min(ends), max(ends)
  room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
  return low - room, high + room

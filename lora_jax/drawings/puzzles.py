"""Coloured shapes and numbers in grids, rings, rows and circles, described and asked about."""

import math
import random
from collections.abc import Sequence

from lora_jax.drawings import colours
from lora_jax.drawings.canvas import BLACK, CORNERS, WHITE, Canvas, Rgb, ink_on
from lora_jax.drawings.fonts import Face
from lora_jax.drawings.scene import DESCRIBE, Scene

_RADII = {'small': 0.35, 'medium': 0.62, 'large': 0.95}
_LENGTHS = {'short': 0.35, 'medium': 0.65, 'long': 1.0}
_PALE: Rgb = (238, 238, 238)


def _sheet(rng: random.Random) -> tuple[Canvas, int]:
  side = rng.choice((192, 288, 384, 512))
  return Canvas(side, side, rng.choice((WHITE, WHITE, WHITE, (250, 248, 240)))), side


def _numbers(rng: random.Random, count: int) -> list[str]:
  """Mostly digits; one may be asked for."""
  most = rng.choice((9, 9, 20, 99))
  held = [str(rng.randint(0, most)) for _ in range(count)]
  if rng.random() < 0.6:
    held[rng.randrange(count)] = '?'
  return held


def _size(side: float, share: float) -> int:
  return max(9, round(side * share))


def _listed(items: Sequence[str]) -> str:
  return ', '.join(items)


def grid(rng: random.Random, faces: Sequence[Face]) -> Scene:
  """Squares in rows, each with a number, a colour or both."""
  canvas, side = _sheet(rng)
  rows, columns = rng.randint(2, 4), rng.randint(2, 4)
  with_numbers = rng.random() < 0.75
  held = _numbers(rng, rows * columns) if with_numbers else [''] * (rows * columns)
  many = not with_numbers or rng.random() < 0.5
  palette = colours.distinct(rng, rng.randint(2, 6)) if many else {}
  name = rng.choice(colours.NAMES)
  fills = palette or {name: colours.pick(rng, name)}
  face, cell = rng.choice(faces), side * rng.uniform(0.7, 0.95) / max(rows, columns)
  left, top = (side - columns * cell) / 2, (side - rows * cell) / 2
  edge, corner = rng.choice((BLACK, (60, 60, 60))), rng.choice((0, cell / 8))
  said, chosen = [], []
  for i in range(rows):
    for j in range(columns):
      colour = rng.choice([*fills])
      box = (left + j * cell, top + i * cell, left + (j + 1) * cell, top + (i + 1) * cell)
      canvas.draw.rounded_rectangle(box, corner, fill=fills[colour], outline=edge)
      canvas.name(box, f'{colour} square', 'square', colour)
      text = held[i * columns + j]
      if text:
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        size = _size(cell, rng.uniform(0.3, 0.45))
        canvas.write(*middle, text, face, size, ink_on(fills[colour]), anchor='mm')
      chosen.append((text, colour))
      said.append(' '.join(part for part in (text, colour if palette else '') if part))
  lines = [_listed(said[i * columns : (i + 1) * columns]) for i in range(rows)]
  text = f'A {rows} x {columns} grid. ' + ' '.join(
    f'Row {i + 1}: {line}.' for i, line in enumerate(lines)
  )
  at = rng.randrange(rows * columns)
  where = f'row {at // columns + 1}, column {at % columns + 1}'
  questions = [(DESCRIBE, text), (f'What is in row {at // columns + 1}?', lines[at // columns])]
  if with_numbers:
    questions.append((f'Which number is in {where}?', chosen[at][0]))
  if palette:
    questions.append((f'Which colour is in {where}?', chosen[at][1]))
  return Scene(canvas, text, tuple(questions))


def ring(rng: random.Random, faces: Sequence[Face]) -> Scene:
  """Circles or polygons around a middle, of several sizes, with numbers in them."""
  canvas, side = _sheet(rng)
  count, kind = rng.randint(4, 8), rng.choice(('circle', 'circle', *CORNERS))
  name = rng.choice(colours.NAMES)
  fill, face = colours.pick(rng, name), rng.choice(faces)
  held = _numbers(rng, count)
  most = side * 0.38 * math.sin(math.pi / count) * 0.9
  said = []
  for i, text in enumerate(held):
    angle = 2 * math.pi * i / count - math.pi / 2
    x, y = side / 2 + 0.36 * side * math.cos(angle), side / 2 + 0.36 * side * math.sin(angle)
    size = rng.choice([*_RADII])
    canvas.shape(kind, x, y, most * _RADII[size], name, fill, size=size)
    canvas.write(x, y, text, face, _size(most, 0.5), ink_on(fill), anchor='mm')
    said.append(f'{size} {text}')
  text = f'{count} {name} {kind}s in a ring, clockwise from the top: {_listed(said)}.'
  numbers = _listed(held)
  return Scene(
    canvas, text, ((DESCRIBE, text), ('Which numbers are in the ring, clockwise?', numbers))
  )


def rows_of_shapes(rng: random.Random, faces: Sequence[Face]) -> Scene:
  """Shapes in rows that differ in kind, size and colour; one may be missing."""
  canvas, side = _sheet(rng)
  rows, columns = rng.randint(1, 4), rng.randint(2, 4)
  fills = colours.distinct(rng, rng.randint(1, 5), shades=rng.random() < 0.3)
  kinds, sizes = rng.sample([*CORNERS], rng.randint(1, 3)), rng.choice(([*_RADII], ['large']))
  step, face = side / (max(rows, columns) + 0.2), rng.choice(faces)
  missing = rng.randrange(rows * columns) if rng.random() < 0.6 else -1
  numbered = rng.random() < 0.4
  lines, kept = [], []
  for i in range(rows):
    # The last rows of a pyramid are the longest.
    said, y = [], side / 2 + (i - (rows - 1) / 2) * step
    for j in range(columns):
      x = side / 2 + (j - (columns - 1) / 2) * step
      if i * columns + j == missing:
        canvas.write(x, y, '?', face, _size(step, 0.4), anchor='mm')
        said.append('?')
        continue
      colour, kind, size = rng.choice([*fills]), rng.choice(kinds), rng.choice(sizes)
      word = size if len(sizes) > 1 else ''
      turn = rng.choice((0.0, 0.0, rng.uniform(-0.5, 0.5)))
      radius = 0.46 * step * _RADII[size]
      canvas.shape(kind, x, y, radius, colour, fills[colour], turn=turn, size=word)
      named = f'{word} {colour} {kind}'.strip()
      if numbered and size != 'small':
        number = str(rng.randint(1, 9))
        ink = ink_on(fills[colour])
        canvas.write(x, y, number, face, _size(radius, 0.7), ink, anchor='mm')
        named += f' {number}'
      said.append(named)
      kept.append((i + 1, j + 1, colour, kind))
    lines.append(_listed(said))
  text = ' '.join(f'Row {i + 1}: {line}.' for i, line in enumerate(lines))
  questions = [(DESCRIBE, text)]
  if kept:
    i, j, colour, kind = rng.choice(kept)
    questions.append((f'Which shape is in row {i}, column {j}?', kind))
    questions.append((f'Which colour has the shape in row {i}, column {j}?', colour))
  return Scene(canvas, text, tuple(questions))


def scatter(rng: random.Random, faces: Sequence[Face]) -> Scene:
  """Shapes strewn over a board, to be counted."""
  canvas, side = _sheet(rng)
  fills = colours.distinct(rng, rng.randint(2, 4))
  kinds = rng.sample(['circle', 'triangle', 'square', 'pentagon', 'hexagon'], rng.randint(1, 3))
  counts: dict[tuple[str, str], int] = {}
  places = rng.sample(range(16), rng.randint(3, 10))
  for place in places:
    colour, kind = rng.choice([*fills]), rng.choice(kinds)
    x, y = (place % 4 + rng.uniform(0.4, 0.6)) * side / 4, (place // 4 + 0.5) * side / 4
    canvas.shape(kind, x, y, side / 4 * rng.uniform(0.25, 0.42), colour, fills[colour])
    counts[colour, kind] = counts.get((colour, kind), 0) + 1
  said = [f'{n} {colour} {kind}{"s" * (n > 1)}' for (colour, kind), n in counts.items()]
  text = f'{_listed(said)}.'
  colour, kind = rng.choice([*counts])
  of_colour = sum(n for (c, _), n in counts.items() if c == colour)
  of_kind = sum(n for (_, k), n in counts.items() if k == kind)
  return Scene(
    canvas,
    text,
    (
      (DESCRIBE, text),
      (f'How many {colour} shapes are there?', str(of_colour)),
      (f'How many {kind}s are there?', str(of_kind)),
      ('How many shapes are there?', str(len(places))),
    ),
  )


def bars(rng: random.Random, faces: Sequence[Face]) -> Scene:
  """Upright bars of three lengths side by side, with colours or numbers."""
  canvas, side = _sheet(rng)
  count, face = rng.randint(4, 8), rng.choice(faces)
  by_colour = rng.random() < 0.5
  fills = colours.distinct(rng, 3)
  wide, missing = 0.9 * side / count, rng.randrange(count)
  lengths, inside = [], []
  for i in range(count):
    length = rng.choice([*_LENGTHS])
    colour = rng.choice([*fills]) if by_colour else next(iter(fills))
    hidden = i == missing
    left, tall = 0.05 * side + i * wide, 0.85 * side * _LENGTHS[length]
    box = (left, (side - tall) / 2, left + wide, (side + tall) / 2)
    fill = _PALE if by_colour and hidden else fills[colour]
    canvas.draw.rounded_rectangle(box, wide / 4, fill=fill, outline=BLACK)
    named = 'grey' if by_colour and hidden else colour
    canvas.name(box, f'{length} {named} rectangle', 'rectangle', named)
    text = '?' if hidden else ('' if by_colour else str(rng.randint(0, 9)))
    if text:
      ink = ink_on(fill)
      canvas.write(left + wide / 2, side / 2, text, face, _size(wide, 0.5), ink, anchor='mm')
    lengths.append(length)
    inside.append(text or colour)
  what = 'colours' if by_colour else 'numbers'
  text = (
    f'{count} rectangles. Lengths from left to right: {_listed(lengths)}. '
    f'{what.capitalize()}: {_listed(inside)}.'
  )
  return Scene(
    canvas,
    text,
    (
      (DESCRIBE, text),
      ('Which lengths have the rectangles, from left to right?', _listed(lengths)),
      (f'Which {what} have the rectangles, from left to right?', _listed(inside)),
    ),
  )


def wheel(rng: random.Random, faces: Sequence[Face]) -> Scene:
  """A polygon cut into parts like a cake, each with a colour and perhaps a number."""
  canvas, side = _sheet(rng)
  count, face = rng.choice((4, 6, 6, 8)), rng.choice(faces)
  fills, radius = colours.distinct(rng, rng.randint(2, 4)), 0.45 * side
  held = _numbers(rng, count) if rng.random() < 0.5 else [''] * count
  middle, said = side / 2, []
  corner = lambda i, share: (
    middle + share * radius * math.cos(2 * math.pi * i / count),
    middle - share * radius * math.sin(2 * math.pi * i / count),
  )
  for i, text in enumerate(held):
    colour = rng.choice([*fills])
    points = [(middle, middle), corner(i, 1.0), corner(i + 1, 1.0)]
    canvas.draw.polygon(points, fill=fills[colour], outline=BLACK)
    x, y = corner(i + 0.5, 0.6)
    canvas.name(
      (x - side / 16, y - side / 16, x + side / 16, y + side / 16), colour, 'part', colour
    )
    if text:
      canvas.write(x, y, text, face, _size(side, 0.09), ink_on(fills[colour]), anchor='mm')
    said.append(f'{colour} {text}'.strip())
  text = f'A wheel of {count} parts, anticlockwise from the right: {_listed(said)}.'
  return Scene(canvas, text, ((DESCRIBE, text),))


def venn(rng: random.Random, faces: Sequence[Face]) -> Scene:
  """Circles in a row that overlap, with numbers in all parts."""
  canvas, side = _sheet(rng)
  count, face = rng.choice((2, 3, 3)), rng.choice(faces)
  name = rng.choice([colour for colour in colours.NAMES if colour.startswith('light')])
  fill, held = colours.pick(rng, name), _numbers(rng, 2 * count - 1)
  radius = side / (2 + 1.5 * (count - 1)) * 0.48 * 2
  step, y = 1.45 * radius, side * rng.uniform(0.4, 0.6)
  first = side / 2 - step * (count - 1) / 2
  xs = [first + step * i for i in range(count)]
  for x in xs:
    canvas.shape('circle', x, y, radius, name, fill)
  for x in xs:
    canvas.draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=BLACK)
  for i, text in enumerate(held):
    canvas.write(first + step * i / 2, y, text, face, _size(radius, 0.28), anchor='mm')
  alone, shared = _listed(held[::2]), _listed(held[1::2])
  text = f'{count} circles that overlap hold {alone}. Where they overlap: {shared}.'
  asked = ('Which numbers are in the circles, from left to right?', alone)
  return Scene(canvas, text, ((DESCRIBE, text), asked))


def triads(rng: random.Random, faces: Sequence[Face]) -> Scene:
  """Groups of three numbers in small circles that lines join."""
  canvas, side = _sheet(rng)
  face, name = rng.choice(faces), rng.choice(colours.NAMES)
  fill, places = colours.pick(rng, name), [(0.28, 0.24), (0.72, 0.5), (0.28, 0.76)]
  held, radius = _numbers(rng, 9), 0.075 * side
  groups = []
  for group, (x, y) in enumerate(places[: rng.randint(2, 3)]):
    corners = [(x - 0.08, y - 0.12), (x - 0.08, y + 0.12), (x + 0.12, y)]
    points = [(side * across, side * down) for across, down in corners]
    canvas.draw.line([*points, points[0]], fill=BLACK)
    of_group = held[3 * group : 3 * group + 3]
    for (at_x, at_y), text in zip(points, of_group, strict=True):
      canvas.shape('circle', at_x, at_y, radius, name, fill)
      canvas.write(at_x, at_y, text, face, _size(radius, 0.9), ink_on(fill), anchor='mm')
    groups.append(_listed(of_group))
  text = ' '.join(f'Group {i + 1}: {group}.' for i, group in enumerate(groups))
  at = rng.randrange(len(groups))
  asked = (f'Which numbers are in group {at + 1}?', groups[at])
  return Scene(canvas, text, ((DESCRIBE, text), asked))


def nest(rng: random.Random, faces: Sequence[Face]) -> Scene:
  """Circles inside of each other, from light to dark or in several colours."""
  canvas, side = _sheet(rng)
  count, face = rng.randint(2, 5), rng.choice(faces)
  fills = colours.distinct(rng, count, shades=rng.random() < 0.5)
  said = []
  for i, (colour, fill) in enumerate(fills.items()):
    radius = 0.47 * side * (count - i) / count
    box = (side / 2 - radius, side / 2 - radius, side / 2 + radius, side / 2 + radius)
    canvas.draw.ellipse(box, fill=fill, outline=BLACK)
    # Seen where nothing covers it: in the middle of its band, above.
    y = side / 2 - radius + 0.47 * side / count / 2
    mark = (side / 2 - 8, y - 8, side / 2 + 8, y + 8)
    canvas.name(mark, f'{colour} circle', 'circle', colour)
    said.append(colour)
  if rng.random() < 0.4:
    ink = ink_on([*fills.values()][-1])
    canvas.write(side / 2, side / 2, '?', face, _size(side, 0.07), ink, anchor='mm')
  text = f'{count} circles inside of each other, from the largest: {_listed(said)}.'
  return Scene(canvas, text, ((DESCRIBE, text),))

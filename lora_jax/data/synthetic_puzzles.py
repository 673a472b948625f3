"""Drawn puzzles: a grid of numbers, a row of shapes, or a count, with a staged solution."""

import io
import math
import random
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from lora_jax.errors import UserError

_SIDE = 192  # pixels
_COLORS = {'red': '#d62728', 'blue': '#1f77b4', 'green': '#2ca02c', 'orange': '#ff7f0e'}
_SHAPES = {'circle': 0, 'triangle': 3, 'square': 4, 'pentagon': 5}  # name -> corners
_COUNTS = {2: 'two', 3: 'three'}

# image, question, summary, caption, reasoning, right option, wrong options
_Made = tuple[Image.Image, str, str, str, str, str, list[str]]


def rows(seed: int, count: int) -> list[dict[str, Any]]:
  """LLaVA-CoT rows with PNG bytes in `image`; no question with its caption comes twice.

  A pure function of its arguments; the first rows do not depend on `count`.

  Raises:
    UserError: more rows are asked for than there are puzzles in reach.
  """
  rng = random.Random(f'llava_cot {seed}')
  made: dict[tuple[str, str], dict[str, Any]] = {}
  for _ in range(20 * count):
    if len(made) == count:
      break
    puzzle = rng.choice((_grid, _sequence, _counting))
    image, question, summary, caption, reasoning, right, wrong = puzzle(rng)
    options = [right, *wrong]
    rng.shuffle(options)
    listed = ' '.join(f'({letter}) {text}' for letter, text in zip('ABCD', options, strict=True))
    letter = 'ABCD'[options.index(right)]
    if (question, caption) in made:
      continue
    buffer = io.BytesIO()
    image.save(buffer, format='PNG')
    made[question, caption] = {
      'id': f'synthetic-{len(made)}',
      'image': buffer.getvalue(),
      'conversations': [
        {'from': 'human', 'value': f'{question}\nOptions: {listed}'},
        {
          'from': 'gpt',
          'value': f'<SUMMARY> {summary} </SUMMARY>\n\n<CAPTION> {caption} </CAPTION>\n\n'
          f'<REASONING> {reasoning} </REASONING>\n\n<CONCLUSION> {letter} </CONCLUSION>',
        },
      ],
    }
  if len(made) < count:
    raise UserError(f'llava_cot: found only {len(made)} of {count} puzzles; ask for fewer rows')
  return list(made.values())


def _canvas() -> tuple[Image.Image, ImageDraw.ImageDraw]:
  image = Image.new('RGB', (_SIDE, _SIDE), 'white')
  return image, ImageDraw.Draw(image)


def _text(draw: ImageDraw.ImageDraw, x: float, y: float, text: str) -> None:
  draw.text((x, y), text, fill='black', font=ImageFont.load_default(28), anchor='mm')


def _shape(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, name: str, color: str):
  corners = _SHAPES[name]
  fill = _COLORS[color]
  if not corners:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    return
  turn = -math.pi / 2 + (math.pi / 4 if corners == 4 else 0)
  angles = [turn + 2 * math.pi * corner / corners for corner in range(corners)]
  draw.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles], fill=fill)


def _grid(rng: random.Random) -> _Made:
  """Every row of a 3 x 3 grid adds up to the same number; one cell is missing."""
  total = rng.randint(10, 20)
  grid = []
  while len(grid) < 3:
    first, second = rng.randint(1, 9), rng.randint(1, 9)
    if 1 <= total - first - second <= 9:
      grid.append([first, second, total - first - second])
  row, column = rng.randrange(3), rng.randrange(3)
  value = grid[row][column]
  known = [number for index, number in enumerate(grid[row]) if index != column]
  shown = [[str(number) for number in line] for line in grid]
  shown[row][column] = '?'
  image, draw = _canvas()
  cell = _SIDE / 3
  for i in range(3):
    for j in range(3):
      draw.rectangle((j * cell, i * cell, (j + 1) * cell, (i + 1) * cell), outline='black')
      _text(draw, (j + 0.5) * cell, (i + 0.5) * cell, shown[i][j])
  other = grid[(row + 1) % 3]
  return (
    image,
    'Which number belongs in place of the question mark?',
    'I will read the numbers, find what the rows share, and solve for the missing number.',
    f'A grid with the rows {"; ".join(", ".join(line) for line in shown)}.',
    f'The row {", ".join(map(str, other))} adds up to {total}, as does each full row. '
    f'{total} - {known[0]} - {known[1]} = {value}.',
    str(value),
    [str(number) for number in rng.sample([n for n in range(1, 10) if n != value], 3)],
  )


def _sequence(rng: random.Random) -> _Made:
  """Six shapes that repeat with a period of two or three; one is missing."""
  period = rng.choice((2, 3))
  names = [(color, shape) for color in _COLORS for shape in _SHAPES]
  cycle = rng.sample(names, period)
  missing = rng.randrange(6)
  image, draw = _canvas()
  shown = []
  for index in range(6):
    x, y = (index % 3 + 0.5) * _SIDE / 3, (index // 3 + 0.5) * _SIDE / 2
    color, shape = cycle[index % period]
    if index == missing:
      _text(draw, x, y, '?')
      shown.append('?')
    else:
      _shape(draw, x, y, 24, shape, color)
      shown.append(f'{color} {shape}')
  right = ' '.join(cycle[missing % period])
  step = period if missing < 6 - period else -period
  wrong = rng.sample([' '.join(name) for name in names if ' '.join(name) != right], 3)
  return (
    image,
    'The shapes repeat in reading order. Which shape belongs in place of the question mark?',
    'I will name the shapes in reading order, find after how many they repeat, and fill the gap.',
    f'Six places: {", ".join(shown)}.',
    f'The shapes repeat after {_COUNTS[period]}. The place {_COUNTS[period]} '
    f'{"after" if step > 0 else "before"} the gap holds: {shown[missing + step]}.',
    right,
    wrong,
  )


def _counting(rng: random.Random) -> _Made:
  """Shapes scattered over a 4 x 4 board; how many are of one kind?"""
  names = [(color, shape) for color in _COLORS for shape in _SHAPES]
  kinds = rng.sample(names, 3)
  counts = [rng.randint(1, 5) for _ in kinds]
  places = rng.sample(range(16), sum(counts))
  image, draw = _canvas()
  remaining = iter(places)
  for (color, shape), number in zip(kinds, counts, strict=True):
    for _ in range(number):
      place = next(remaining)
      x, y = (place % 4 + 0.5) * _SIDE / 4, (place // 4 + 0.5) * _SIDE / 4
      _shape(draw, x, y, 18, shape, color)
  color = rng.choice([kind[0] for kind in kinds])
  parts = [
    (number, f'{kind[0]} {kind[1]}s')
    for kind, number in zip(kinds, counts, strict=True)
    if kind[0] == color
  ]
  value = sum(number for number, _ in parts)
  listed = ', '.join(f'{n} {c} {s}s' for (c, s), n in zip(kinds, counts, strict=True))
  added = ' + '.join(str(number) for number, _ in parts)
  near = [n for n in range(max(0, value - 3), value + 4) if n != value]
  return (
    image,
    f'How many {color} shapes are there?',
    f'I will list the shapes by colour and kind, and count those that are {color}.',
    f'Shapes on a white board: {listed}.',
    f'{color.capitalize()} are the {" and the ".join(name for _, name in parts)}: '
    + (f'{added} = {value}.' if len(parts) > 1 else f'there are {value}.'),
    str(value),
    [str(number) for number in rng.sample(near, 3)],
  )

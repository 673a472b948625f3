"""Sheets of text: a note of a few lines, a page, a receipt, a table, a chart of bars."""

import random
from collections.abc import Sequence

from lora_jax.data import synthetic_receipts
from lora_jax.data.json_score import compact
from lora_jax.drawings import colours, words
from lora_jax.drawings.canvas import BLACK, WHITE, Canvas, Rgb, cut
from lora_jax.drawings.fonts import Face
from lora_jax.drawings.scene import READ, Scene


def _ink_and_paper(rng: random.Random) -> tuple[Rgb, Rgb]:
  """Mostly black on white; sometimes coloured, sometimes light on dark."""
  draw = rng.random()
  if draw < 0.75:
    return BLACK, WHITE
  if draw < 0.9:
    dark = [name for name in colours.NAMES if name.startswith('dark')]
    light = [name for name in colours.NAMES if name.startswith('light')]
    return colours.pick(rng, rng.choice(dark)), colours.pick(rng, rng.choice(light))
  return WHITE, rng.choice((BLACK, (40, 40, 90), (70, 20, 20)))


def note(rng: random.Random, faces: Sequence[Face]) -> Scene:
  """One to six lines, large or small, that one tile has room for."""
  ink, paper = _ink_and_paper(rng)
  side = rng.choice((160, 224, 288, 288, 360))
  canvas = Canvas(side, side, paper)
  size = max(9, round(side * rng.uniform(0.035, 0.13)))
  face, y, said = rng.choice(faces), rng.uniform(2, 0.25 * side), []
  pitch = size * rng.uniform(1.05, 1.7)
  while y + 1.3 * size < side and len(said) < 8:
    x = rng.uniform(2, 0.15 * side)
    text = cut(words.line(rng, int(1.8 * side / size)), face, size, side - x - 2)
    canvas.write(x, y, text, face, size, ink)
    said.append(text)
    y += pitch
  text = '\n'.join(said)
  questions = [(READ, text)]
  if len(said) > 1:
    at = rng.randrange(len(said))
    questions.append((f'What does line {at + 1} say?', said[at]))
  return Scene(canvas, text, tuple(questions))


def page(rng: random.Random, faces: Sequence[Face]) -> Scene:
  """A sheet full of lines, some of them headings in another face and size."""
  ink, paper = _ink_and_paper(rng)
  width, height = rng.randint(340, 760), rng.randint(480, 800)
  canvas = Canvas(width, height, paper)
  face, size = rng.choice(faces), rng.randint(10, 17)
  margin, y, said = rng.randint(6, 60), float(rng.randint(6, 50)), []
  while y + 1.3 * size < height - 4:
    heading = rng.random() < 0.1
    of_line, set_in = (size + 6, rng.choice(faces)) if heading else (size, face)
    text = words.line(rng, max(3, int((width - margin) / (0.5 * of_line))))
    text = cut(text, set_in, of_line, width - margin - 3)
    canvas.write(margin, y, text, set_in, of_line, ink)
    said.append(text)
    y += of_line * rng.uniform(1.1, 1.5) + (size if rng.random() < 0.1 else 0)
  text = '\n'.join(said)
  at = rng.randrange(min(len(said), 12))
  return Scene(canvas, text, ((f'What does line {at + 1} say?', said[at]),))


def receipt(rng: random.Random, faces: Sequence[Face]) -> Scene:
  """A receipt as `lora_jax.data.synthetic_receipts` composes it, in any face and layout."""
  printed = synthetic_receipts.compose(rng)
  width, size = rng.randint(270, 560), rng.randint(10, 17)
  face, head = rng.choice(faces), rng.choice(faces)
  pitch = size * rng.uniform(1.1, 1.6)
  rows = len(printed.lines) + 2
  height = max(round(1.1 * width), min(1000, round(rows * pitch * rng.uniform(1.1, 1.7))))
  canvas = Canvas(width, height, rng.choice((WHITE, WHITE, (244, 244, 238))))
  margin = rng.randint(6, max(7, width // 7))
  y, said = rng.uniform(2, max(3.0, height - rows * pitch)), []
  for i, cells in enumerate(printed.lines):
    first = i == 0 and rng.random() < 0.5
    for cell in cells:
      of_cell = _fitting(size + 4 * first, cell.text, (width - 2 * margin) / len(cells))
      side = {0.0: 'l', 0.5: 'm', 1.0: 'r'}[cell.align]
      x = margin + cell.align * (width - 2 * margin)
      canvas.write(x, y, cell.text, head if first else face, of_cell, anchor=f'{side}a')
    said.append(' '.join(cell.text for cell in cells))
    y += pitch + 4 * first
    if rng.random() < 0.1:
      canvas.draw.line((margin, y, width - margin, y), fill=BLACK)
      y += 3
  fields = printed.fields
  questions = [(f'What is the {field}?', value) for field, value in fields.items()]
  keys = ', '.join(fields)
  questions.append((f'Give the {keys} as JSON.', compact(fields)))
  return Scene(canvas, '\n'.join(said), tuple(questions))


def table(rng: random.Random, faces: Sequence[Face]) -> Scene:
  """Names and numbers in ruled columns."""
  rows, columns = rng.randint(2, 7), rng.randint(2, 4)
  face, size = rng.choice(faces), rng.randint(11, 20)
  wide, tall = round(size * rng.uniform(5.0, 7.0)), round(size * rng.uniform(1.5, 2.4))
  canvas = Canvas(columns * wide + 20, (rows + 1) * tall + 20)
  heads = ['', *(words.line(rng, 5)[:7] for _ in range(columns - 1))]
  names = [words.line(rng, 5)[:7] for _ in range(rows)]
  held = [[words.number(rng)[:6] for _ in range(columns - 1)] for _ in names]
  cells = [heads, *([name, *of_row] for name, of_row in zip(names, held, strict=True))]
  for i, of_row in enumerate(cells):
    for j, text in enumerate(of_row):
      box = (10 + j * wide, 10 + i * tall, 10 + (j + 1) * wide, 10 + (i + 1) * tall)
      canvas.draw.rectangle(box, outline=(90, 90, 90))
      if text:
        canvas.write(box[0] + 5, (box[1] + box[3]) / 2, text, face, size, anchor='lm')
  i, j = rng.randrange(rows), rng.randrange(columns - 1)
  said = '\n'.join(' | '.join(of_row) for of_row in cells)
  asked = f'What is in row {i + 2}, column {j + 2} of the table?'
  return Scene(canvas, said, ((READ, said), (asked, held[i][j])))


def chart(rng: random.Random, faces: Sequence[Face]) -> Scene:
  """Bars, each with its name below and its value above."""
  count, face = rng.randint(3, 6), rng.choice(faces)
  size = rng.randint(12, 18)
  wide, tall = round(size * rng.uniform(3.6, 4.6)), rng.randint(160, 260)
  canvas = Canvas(count * wide + 20, tall + 4 * size)
  values = [rng.randint(2, 99) for _ in range(count)]
  names = [words.word(rng)[:5] for _ in range(count)]
  fills = colours.distinct(rng, count)
  ground = tall + 2 * size
  for i, (value, name, colour) in enumerate(zip(values, names, fills, strict=True)):
    left = 10 + i * wide + wide // 5
    box = (left, ground - tall * value / 105, left + 3 * wide // 5, ground)
    canvas.draw.rectangle(box, fill=fills[colour], outline=BLACK)
    canvas.name(box, f'{colour} bar', 'rectangle', colour)
    middle = (box[0] + box[2]) / 2
    canvas.write(middle, box[1] - 2, str(value), face, size, anchor='md')
    canvas.write(middle, ground + 3, name, face, size, anchor='ma')
  at = rng.randrange(count)
  said = ', '.join(f'{name} {value}' for name, value in zip(names, values, strict=True))
  most = max(range(count), key=values.__getitem__)
  colour = [*fills][at]
  return Scene(
    canvas,
    said,
    (
      (READ, said),
      (f'What is the value of bar {at + 1}?', str(values[at])),
      (f'What value has the {colour} bar?', str(values[at])),
      ('Which bar is the highest?', names[most]),
    ),
  )


def _fitting(size: int, text: str, room: float) -> int:
  """A size at which a text goes into so many pixels, whatever the face."""
  return max(8, min(size, int(room / (0.62 * max(len(text), 1)))))

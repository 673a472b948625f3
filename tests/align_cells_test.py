"""What is asked of each cell is what lies in it."""

import dataclasses
import pickle

import numpy as np
import pytest

from lora_jax.align import cells, read
from lora_jax.align.recipe import IMAGES, VISION, Drawn, Recipe, Stage
from lora_jax.config import ImageConfig
from lora_jax.data import tiles
from lora_jax.drawings import fonts
from lora_jax.drawings.canvas import Canvas
from lora_jax.drawings.drawing import KINDS, Drawing
from lora_jax.hub import tiny

TOKENIZER = tiny.chat_tokenizer()
CELL = VISION.patch_size * VISION.shuffle
ACROSS = IMAGES.tile // CELL


def edge(longest):
  return dataclasses.replace(IMAGES, longest_edge=longest)


def sheet(side=288):
  """A word, a shape, and something too small to be read."""
  canvas = Canvas(side, side)
  canvas.write(40, 50, 'Ag 7', fonts.FACES[1], 40)
  canvas.write(40, 200, 'tiny', fonts.FACES[1], 5)
  canvas.shape('circle', 200, 150, 30, 'light blue', (190, 220, 250))
  marks = tuple(canvas.marks)
  return Drawing('note', canvas.image, marks, 'Ag 7', (('?', 'Ag 7'),))


def test_characters_are_in_the_slots_of_their_middles():
  one = sheet()
  _, (labels,) = cells.cut(one, TOKENIZER, edge(288), VISION)
  found = np.argwhere(labels['characters'] > 0)
  said = {chr(labels['characters'][cell, slot] + ord(' ')): (cell, slot) for cell, slot in found}
  assert set(said) == set('Ag7')
  for character, box in zip(one.marks[0].text, one.marks[0].boxes_G4, strict=True):
    if character == ' ':
      continue
    cell, slot = said[character]
    x = (cell % ACROSS + (slot % cells.SLOT_COLUMNS + 0.5) / cells.SLOT_COLUMNS) * CELL
    y = (cell // ACROSS + (slot // cells.SLOT_COLUMNS + 0.5) / cells.SLOT_ROWS) * CELL
    middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    assert abs(x - middle[0]) <= CELL / cells.SLOT_COLUMNS / 2
    assert abs(y - middle[1]) <= CELL / cells.SLOT_ROWS / 2


def test_tokens_and_shapes_are_in_the_cells_of_their_middles():
  _, (labels,) = cells.cut(sheet(), TOKENIZER, edge(288), VISION)
  circle = (150 // CELL) * ACROSS + 200 // CELL
  (found,) = np.nonzero(labels['kinds'] > 0)
  assert found.tolist() == [circle]
  assert cells.KINDS[labels['kinds'][circle]] == 'circle'
  assert cells.COLOURS[labels['colours'][circle]] == 'light blue'
  ids = labels['tokens'][circle]
  assert TOKENIZER.decode([i for i in ids if i >= 0]) == ' light'
  others = np.delete(labels['tokens'], circle, axis=0).ravel()
  assert sorted(TOKENIZER.decode(others[others >= 0]).replace(' ', '')) == ['7', 'A', 'g']


def test_what_is_too_small_is_not_asked_for():
  _, (labels,) = cells.cut(sheet(), TOKENIZER, edge(288), VISION)
  (small,) = np.nonzero(labels['asked'] == 0)
  assert set(small // ACROSS) == {(200 + 3) // CELL}
  assert (labels['characters'][small] == cells.IGNORED).all()
  assert (labels['tokens'][small] == cells.IGNORED).all()
  # Twice as large it is.
  _, held = cells.cut(sheet(), TOKENIZER, edge(576), VISION)
  assert all((labels['asked'] == 1).all() for labels in held[:-1])


@pytest.mark.parametrize('size', [(288, 288), (200, 410), (700, 300)])
def test_tiles_share_what_is_in_the_image(size):
  canvas = Canvas(*size)
  for y in range(20, size[1] - 30, 40):
    canvas.write(10, y, 'Total 12.50 EUR', fonts.FACES[0], 24)
  one = Drawing('page', canvas.image, tuple(canvas.marks), '', ())
  images = ImageConfig(longest_edge=864, tile=288)
  pixels, held = cells.cut(one, TOKENIZER, images, VISION)
  rows, columns = tiles.grid(size, images)
  assert len(pixels) == len(held) == rows * columns + 1
  written = sum(len(mark.text.replace(' ', '')) for mark in one.marks)
  in_tiles = sum((labels['characters'] > 0).sum() for labels in held[:-1])
  assert 0.95 * written <= in_tiles <= written
  # What the labels say is dark where they say it.
  for tile, labels in zip(pixels[:-1], held[:-1], strict=True):
    dark = tile.min(-1) < 128
    for cell in np.unique(np.nonzero(labels['characters'] > 0)[0]):
      y, x = divmod(int(cell), ACROSS)
      y, x = y * CELL, x * CELL
      assert dark[max(y - 8, 0) : y + CELL + 8, max(x - 8, 0) : x + CELL + 8].any()


def test_batches_are_functions_of_their_number_and_hold_what_is_asked():
  stage = Stage('read', 9, 5, 1e-3, tuple(Drawn(kind, 1.0) for kind in KINDS))
  recipe = Recipe('tiny', (stage,))
  batches = read.Batches(recipe, stage, TOKENIZER, fonts.FACES, seed=3)
  one, same, other = batches[4], batches[4], batches[5]
  for name, value in one.items():
    np.testing.assert_array_equal(value, same[name])
  assert not np.array_equal(one['pixels'], other['pixels'])
  # Drawn in another process they are the same.
  sent = pickle.loads(pickle.dumps(batches))[4]
  np.testing.assert_array_equal(sent['pixels'], one['pixels'])
  assert one['pixels'].shape == (5, 288, 288, 3)
  assert one['pixels'].dtype == np.uint8
  candidates = one['candidates']
  assert len(np.unique(candidates)) == len(candidates) == TOKENIZER.vocab_size
  assert candidates[0] == TOKENIZER.encode_plain(' ')[0]
  ids = candidates[one['tokens'][one['tokens'] >= 0]]
  assert len(ids)
  assert TOKENIZER.decode(ids).isprintable()

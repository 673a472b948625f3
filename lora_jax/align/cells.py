"""What lies in each cell of a tile: the square that becomes one embedding.

A cell is divided into `SLOT_ROWS` x `SLOT_COLUMNS` slots, and each slot holds the character
whose middle lies in it: to say where a character is takes no counting, and one that is moved by
a pixel changes one slot. Tokens of the language model and shapes belong to the cell of their
middle. What is too small to be read is asked of nobody.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lora_jax.config import ImageConfig, VisionConfig
from lora_jax.data import tiles
from lora_jax.drawings import colours
from lora_jax.drawings.canvas import SHAPES, Mark
from lora_jax.drawings.drawing import Drawing
from lora_jax.hub.tokenizer import ChatTokenizer

SLOT_ROWS, SLOT_COLUMNS = 2, 5
SLOTS = SLOT_ROWS * SLOT_COLUMNS
# Class 0 is nothing; the others are printable ASCII without the space.
CHARACTERS = 127 - ord(' ')
KINDS, COLOURS = ('', *SHAPES), ('', *colours.NAMES)
# Tokens of a cell that are asked for.
TOKENS = 6

# In pixels of a tile: lower lines and narrower characters are not asked for.
_LEAST_HEIGHT, _LEAST_WIDTH = 7.0, 3.5
IGNORED = -1


@dataclasses.dataclass(frozen=True)
class Items:
  """Things with a place in an image.

  Attributes:
    xy_N2: where their middle is, in pixels.
    value_N: what they are.
    size_N2: what has to be large enough to be read, in pixels.
  """

  xy_N2: np.ndarray
  value_N: np.ndarray
  size_N2: np.ndarray


@dataclasses.dataclass(frozen=True)
class Labels:
  """What a drawing says, before it is cut.

  Attributes:
    characters: classes.
    tokens: ids, in the order that they are read in.
    shapes: pairs of a kind and a colour, by place in `KINDS` and `COLOURS`.
  """

  characters: Items
  tokens: Items
  shapes: Items


def labels(marks: Sequence[Mark], tokenizer: ChatTokenizer) -> Labels:
  """Of everything in a drawing."""
  characters: list[tuple] = []
  tokens: list[tuple] = []
  shapes: list[tuple] = []
  for mark in marks:
    middle_G2 = (mark.boxes_G4[:, :2] + mark.boxes_G4[:, 2:]) / 2
    across = float(mark.boxes_G4[:, 2].max() - mark.boxes_G4[:, 0].min())
    down = float((mark.boxes_G4[:, 3] - mark.boxes_G4[:, 1]).max())
    if mark.shape:
      size = (across, down)
      values = (KINDS.index(mark.shape), COLOURS.index(mark.colour))
      shapes.append((middle_G2[0], values, size))
      tokens += [(middle_G2[0], i, size) for i in tokenizer.encode_plain(f' {mark.text}')]
      continue
    size = (across / len(mark.text), down)
    for character, middle_2 in zip(mark.text, middle_G2, strict=True):
      if character != ' ':
        characters.append((middle_2, ord(character) - ord(' '), size))
    ids = tokenizer.encode_plain(mark.text)
    for i, (start, end) in zip(ids, tokenizer.offsets(mark.text), strict=True):
      inked = [at for at in range(start, end) if mark.text[at] != ' '] or [start]
      tokens.append((middle_G2[inked].mean(0), i, size))
  return Labels(_items(characters), _items(tokens), _items(shapes, 2))


def tile_cells(
  held: Labels, corner: tuple[float, float], scale: tuple[float, float], side: int, across: int
) -> dict[str, np.ndarray]:
  """What lies in the cells of one tile.

  Args:
    held: of the whole drawing.
    corner: left and top of the tile, in pixels of the scaled image.
    scale: of the image, across and down.
    side: of the tile, in pixels.
    across: cells a side; E is its square.

  Returns:
    'characters' (E, SLOTS) int32 and 'kinds', 'colours' (E,) int32, each `IGNORED` where
    nothing is asked; 'tokens' (E, TOKENS) int32, ids, filled up with `IGNORED`; 'asked' (E,)
    float32, 0 where something cannot be read.
  """
  cells = across * across
  out = {
    'characters': np.zeros((cells, SLOTS), np.int32),
    'tokens': np.full((cells, TOKENS), IGNORED, np.int32),
    'kinds': np.zeros(cells, np.int32),
    'colours': np.zeros(cells, np.int32),
    'asked': np.ones(cells, np.float32),
  }

  def inside(items: Items) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Middles in units of cells, values, and whether each can be read, of those in the tile."""
    xy_N2 = (items.xy_N2 * scale - corner) * (across / side)
    seen = np.all((xy_N2 >= 0) & (xy_N2 < across), axis=1)
    large = np.all(items.size_N2 * scale >= (_LEAST_WIDTH, _LEAST_HEIGHT), axis=1)
    return xy_N2[seen], items.value_N[seen], large[seen]

  cell_of = lambda xy_N2: xy_N2[:, 1].astype(int) * across + xy_N2[:, 0].astype(int)
  xy_N2, values, large = inside(held.characters)
  cell_N, part_N2 = cell_of(xy_N2), xy_N2 % 1
  slot_N = (part_N2[:, 1] * SLOT_ROWS).astype(int) * SLOT_COLUMNS
  slot_N += (part_N2[:, 0] * SLOT_COLUMNS).astype(int)
  # Of two in one slot the first in reading order is asked for.
  out['characters'][cell_N[::-1], slot_N[::-1]] = values[::-1]
  out['characters'][cell_N[~large]] = IGNORED
  out['asked'][cell_N[~large]] = 0
  xy_N2, values, large = inside(held.shapes)
  cell_N = cell_of(xy_N2)
  for name, column in (('kinds', 0), ('colours', 1)):
    out[name][cell_N] = values[:, column]
    out[name][cell_N[~large]] = IGNORED
  out['asked'][cell_N[~large]] = 0
  xy_N2, values, _ = inside(held.tokens)
  filled = np.zeros(cells, int)
  for cell, value in zip(cell_of(xy_N2), values, strict=True):
    if filled[cell] < TOKENS:
      out['tokens'][cell, filled[cell]] = value
      filled[cell] += 1
  out['tokens'][out['asked'] == 0] = IGNORED
  return out


def cut(
  drawing: Drawing,
  tokenizer: ChatTokenizer,
  images: ImageConfig,
  vision: VisionConfig,
) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
  """A drawing's tiles as a tower gets them, pixels_IYXC uint8, and what lies in each."""
  held = labels(drawing.marks, tokenizer)
  parts, (width, height) = tiles.cut(drawing.image, images), drawing.image.size
  side, across = images.tile, vision.patches(images.tile) // vision.shuffle
  whole = (parts.columns * side / width, parts.rows * side / height)
  cells = [
    tile_cells(held, (column * side, row * side), whole, side, across)
    for row in range(parts.rows)
    for column in range(parts.columns)
  ]
  cells.append(tile_cells(held, (0, 0), (side / width, side / height), side, across))
  return parts.pixels_IYXC, cells


def _items(held: Sequence[tuple], columns: int = 0) -> Items:
  xy, values, sizes = ([one[i] for one in held] for i in range(3))
  shape = (-1, columns) if columns else (-1,)
  return Items(
    np.asarray(xy, np.float64).reshape(-1, 2),
    np.asarray(values, np.int32).reshape(shape),
    np.asarray(sizes, np.float64).reshape(-1, 2),
  )

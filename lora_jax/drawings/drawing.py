"""One drawing: its image as a file has it, where everything is, and what can be asked of it.

    one = draw('receipt', seed=0, number=17)
    one.image, one.marks[0].text, one.questions

>>> draw('grid', 0, 3).text == draw('grid', 0, 3).text
True
"""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence

from PIL import Image

from lora_jax.drawings import fonts, pages, puzzles, scan
from lora_jax.drawings.canvas import Mark
from lora_jax.drawings.fonts import Face
from lora_jax.drawings.scene import Scene

_SCENES: Mapping[str, Callable[[random.Random, Sequence[Face]], Scene]] = {
  'note': pages.note,
  'page': pages.page,
  'receipt': pages.receipt,
  'table': pages.table,
  'chart': pages.chart,
  'grid': puzzles.grid,
  'ring': puzzles.ring,
  'rows': puzzles.rows_of_shapes,
  'scatter': puzzles.scatter,
  'bars': puzzles.bars,
  'wheel': puzzles.wheel,
  'venn': puzzles.venn,
  'triads': puzzles.triads,
  'nest': puzzles.nest,
}
KINDS = (*_SCENES,)

# What is printed, folded and photographed; a puzzle comes as it was drawn.
_WEAR = {'note': 0.8, 'page': 1.0, 'receipt': 1.0, 'table': 0.6, 'chart': 0.3}
_LEAST_WEAR = 0.15


@dataclasses.dataclass(frozen=True)
class Drawing:
  """An image with exact labels.

  Attributes:
    kind: of `KINDS`.
    image: RGB.
    marks: lines of text and shapes, where they are in the image.
    text: what it says, or a description, in reading order.
    questions: pairs of a question and its answer; the first asks for all of it, where that
      is short.
  """

  kind: str
  image: Image.Image
  marks: tuple[Mark, ...]
  text: str
  questions: tuple[tuple[str, str], ...]


def draw(kind: str, seed: int, number: int, faces: Sequence[Face] = fonts.FACES) -> Drawing:
  """The drawing of a kind that a seed and a number stand for.

  Args:
    kind: of `KINDS`.
    seed: of a run of drawings.
    number: in it.
    faces: that text may be set in.
  """
  rng = random.Random(f'{kind} {seed} {number}')
  scene = _SCENES[kind](rng, faces)
  image, marks = scan.scan(scene.canvas, rng, _WEAR.get(kind, _LEAST_WEAR))
  return Drawing(kind, image, tuple(marks), scene.text, scene.questions)

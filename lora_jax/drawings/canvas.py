"""A sheet to draw on that remembers where everything is.

canvas = Canvas(300, 200, paper=(255, 255, 255))
canvas.write(20, 20, 'Total 12.50', AILERON, 18)
canvas.shape('circle', 150, 120, 40, 'light blue', (190, 220, 250))
canvas.marks[0].boxes_G4[0]     # where the T is
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lora_jax.drawings import fonts
from lora_jax.drawings.fonts import Face

Rgb = tuple[int, int, int]

# Name -> corners; a circle has none. `SHAPES` is what a shape can be told to be.
CORNERS = {
  'circle': 0,
  'triangle': 3,
  'square': 4,
  'pentagon': 5,
  'hexagon': 6,
  'heptagon': 7,
  'octagon': 8,
  'nonagon': 9,
}
SHAPES = (*CORNERS, 'rectangle', 'part')

BLACK: Rgb = (0, 0, 0)
WHITE: Rgb = (255, 255, 255)


@dataclasses.dataclass(frozen=True)
class Mark:
  """One thing to be seen.

  Attributes:
    text: a line of text as it is written, or the name of a shape, as 'light blue circle'.
    boxes_G4: float32, left, top, right and bottom in pixels: of each character of a line,
      or of the one shape.
    shape: of `SHAPES`, or '' for text.
    colour: a shape's, of `lora_jax.drawings.colours`; '' for text.
  """

  text: str
  boxes_G4: np.ndarray
  shape: str = ''
  colour: str = ''


@functools.lru_cache(maxsize=8192)
def _bounds(font: ImageFont.FreeTypeFont, character: str, line: str) -> tuple[float, ...]:
  """Where the ink of a character lies about its anchor."""
  return font.getbbox(character, anchor=f'l{line}')


@functools.lru_cache(maxsize=2**17)
def _advance(font: ImageFont.FreeTypeFont, character: str, following: str) -> float:
  """From where a character begins to where the one after it does."""
  return font.getlength(character + following) - font.getlength(following)


def _starts(font: ImageFont.FreeTypeFont, text: str) -> np.ndarray:
  """Where each character begins, (G,): faces are laid out so that only neighbours count."""
  advances = [_advance(font, *pair) for pair in itertools.pairwise(text)]
  return np.cumsum([0.0, *advances])


def cut(text: str, face: Face, size: int, room: float) -> str:
  """As much of a text's beginning as goes into so many pixels; never nothing."""
  font = fonts.load(face if face.holds(text) else fonts.AILERON, size)
  while len(text) > 1 and font.getlength(text) > room:
    text = text[:-1].rstrip()
  return text


def ink_on(fill: Rgb) -> Rgb:
  """Black, or white where that could not be seen."""
  red, green, blue = fill
  return BLACK if 0.3 * red + 0.6 * green + 0.1 * blue > 75 else WHITE


class Canvas:
  """An image and what is on it.

  Attributes:
    image: RGB.
    draw: draws on it what need not be remembered.
    marks: what is remembered, in the order of drawing.
  """

  def __init__(self, width: int, height: int, paper: Rgb = WHITE):
    """An empty sheet."""
    self.image = Image.new('RGB', (width, height), paper)
    self.draw = ImageDraw.Draw(self.image)
    self.marks: list[Mark] = []

  def write(
    self,
    x: float,
    y: float,
    text: str,
    face: Face,
    size: int,
    ink: Rgb = BLACK,
    anchor: str = 'la',
  ) -> float:
    """Writes a line and gives its width.

    Args:
      x: where it is anchored, in pixels; so is `y`.
      y: see `x`.
      text: printable ASCII, not empty. A face that lacks some of it is replaced.
      face: of the letters.
      size: of the font, in pixels.
      ink: colour.
      anchor: as Pillow has it, beginning with 'l', 'm' or 'r'.
    """
    font = fonts.load(face if face.holds(text) else fonts.AILERON, size)
    width = font.getlength(text)
    left = x - width * {'l': 0.0, 'm': 0.5, 'r': 1.0}[anchor[0]]
    # From the left, so that each character is where its own measure says.
    at = (round(left), round(y))
    self.draw.text(at, text, fill=ink, font=font, anchor=f'l{anchor[1]}')
    boxes_G4 = np.array([_bounds(font, one, anchor[1]) for one in text], np.float32)
    boxes_G4 += np.array([*at, *at], np.float32)
    boxes_G4[:, [0, 2]] += _starts(font, text)[:, None]
    self.marks.append(Mark(text, boxes_G4))
    return width

  def shape(
    self,
    kind: str,
    x: float,
    y: float,
    radius: float,
    colour: str,
    fill: Rgb,
    outline: Rgb | None = BLACK,
    turn: float = 0.0,
    size: str = '',
    thickness: int = 1,
  ) -> None:
    """A circle or polygon around a point.

    Args:
      kind: of `CORNERS`.
      x: of its centre, in pixels; so is `y`.
      y: see `x`.
      radius: to its corners.
      colour: its name.
      fill: what that is here.
      outline: colour of its edge, or None.
      turn: angle that it is turned by, in radians; at 0 it stands as one expects.
      size: a word that goes before its name, or ''.
      thickness: of the edge, in pixels.
    """
    corners = CORNERS[kind]
    if corners:
      start = turn - math.pi / 2 + (math.pi / corners if corners % 2 == 0 else 0)
      angles = [start + 2 * math.pi * corner / corners for corner in range(corners)]
      points = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
      self.draw.polygon(points, fill=fill, outline=outline, width=thickness)
      xs, ys = zip(*points, strict=True)
      box = (min(xs), min(ys), max(xs), max(ys))
    else:
      box = (x - radius, y - radius, x + radius, y + radius)
      self.draw.ellipse(box, fill=fill, outline=outline, width=thickness)
    self.name(box, f'{size} {colour} {kind}'.strip(), kind, colour)

  def name(self, box: Sequence[float], text: str, shape: str, colour: str) -> None:
    """Remembers a shape that was drawn some other way."""
    self.marks.append(Mark(text, np.asarray([box], np.float32), shape, colour))

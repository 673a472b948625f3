"""Typefaces that come with what the project needs anyway: matplotlib's and Pillow's own.

    face = rng.choice(FACES)
    width = load(face, 18).getlength('Total 12.50')

Their licences let them be used for anything (Bitstream Vera's and DejaVu's, SIL OFL 1.1,
Knuth's, CC0 of Aileron).
"""

import dataclasses
import functools
from pathlib import Path

import matplotlib
from PIL import ImageFont

# Computer Modern's roman faces have other characters in these places than ASCII.
_NOT_ROMAN = '"<>\\^_`{|}~$'


@dataclasses.dataclass(frozen=True)
class Face:
  """A typeface.

  Attributes:
    name: its file among matplotlib's, without `.ttf`, or 'Aileron', which Pillow holds.
    kind: 'sans', 'serif' or 'mono'.
    lacks: characters of printable ASCII that it shows otherwise or not at all.
  """

  name: str
  kind: str
  lacks: str = ''

  def holds(self, text: str) -> bool:
    """Whether it shows all of a text."""
    return not set(text) & set(self.lacks)


AILERON = Face('Aileron', 'sans')

FACES = (
  AILERON,
  Face('DejaVuSans', 'sans'),
  Face('DejaVuSans-Bold', 'sans'),
  Face('DejaVuSans-Oblique', 'sans'),
  Face('DejaVuSansMono', 'mono'),
  Face('DejaVuSansMono-Oblique', 'mono'),
  Face('DejaVuSerif-Bold', 'serif'),
  Face('DejaVuSerif-Italic', 'serif'),
  Face('STIXGeneral', 'serif'),
  Face('STIXGeneralBol', 'serif'),
  Face('STIXGeneralItalic', 'serif'),
  Face('cmb10', 'serif', _NOT_ROMAN),
  Face('cmr10', 'serif', _NOT_ROMAN),
  Face('cmtt10', 'mono'),
)

# One of each kind that nothing is learnt from, to see whether reading goes beyond them.
HELD_OUT = (
  Face('cmss10', 'sans', _NOT_ROMAN),
  Face('DejaVuSerif', 'serif'),
  Face('DejaVuSansMono-Bold', 'mono'),
)


@functools.lru_cache(maxsize=512)
def load(face: Face, size: int) -> ImageFont.FreeTypeFont:
  """A face at a size in pixels, laid out alike wherever it is drawn."""
  if face != AILERON:
    path = Path(matplotlib.get_data_path()) / 'fonts' / 'ttf' / f'{face.name}.ttf'
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
  font = ImageFont.load_default(size)
  if not isinstance(font, ImageFont.FreeTypeFont):
    raise RuntimeError('this Pillow was built without FreeType')
  return font.font_variant(layout_engine=ImageFont.Layout.BASIC)

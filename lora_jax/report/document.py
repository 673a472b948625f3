"""What a report says, apart from how it looks: sections of text, tables and figures.

`markdown` makes report.md of it, `lora_jax.report.page` report.html. Texts may hold
`code` and **bold** as Markdown writes them, and nothing else of it.
"""

import dataclasses
from collections.abc import Sequence

from lora_jax.report import tables

# What a cell, a card or a point says: better, worse, inside the noise, the highest, or nothing.
GOOD, BAD, EVEN, BEST, PLAIN = 'good', 'bad', 'even', 'best', ''


@dataclasses.dataclass(frozen=True)
class Cell:
  """A cell of a table.

  Attributes:
    text: what it says; a line for each of several statements.
    detail: what stands in brackets behind it, such as an interval.
    mark: a sign after both.
    value: what the column is sorted by; None: it has no number and goes last.
    tone: one of the constants above.
  """

  text: str
  value: float | None = None
  tone: str = PLAIN
  detail: str = ''
  mark: str = ''


@dataclasses.dataclass(frozen=True)
class Table:
  """A table; its first `left` columns hold words.

  Attributes:
    header: names of the columns.
    rows: their cells.
    left: how many columns are aligned to the left.
    note: what its marks mean.
    footer: rows that stay below, however the others are sorted.
  """

  header: Sequence[str]
  rows: Sequence[Sequence[Cell | str]]
  left: int = 1
  note: str = ''
  footer: Sequence[Sequence[Cell | str]] = ()


@dataclasses.dataclass(frozen=True)
class Figure:
  """A drawing.

  Attributes:
    name: of its file, without suffix.
    title: for its caption.
    svg: an SVG element that has its own style.
    says: what one sees, for those who do not.
  """

  name: str
  title: str
  svg: str
  says: str


@dataclasses.dataclass(frozen=True)
class Gallery:
  """Figures side by side, as many as there is room for.

  Attributes:
    figures: the drawings.
    note: what their marks mean.
    in_markdown: whether report.md shows them, as files beside it.
  """

  figures: Sequence[Figure]
  note: str = ''
  in_markdown: bool = True


@dataclasses.dataclass(frozen=True)
class Card:
  """A recommendation: for whom, which target set, why, and what would make it surer."""

  title: str
  choice: str
  why: str
  lacks: str


@dataclasses.dataclass(frozen=True)
class Cards:
  """Recommendations side by side."""

  cards: Sequence[Card]


@dataclasses.dataclass(frozen=True)
class Bullets:
  """A list of sentences."""

  lines: Sequence[str]


# A string is a paragraph.
Block = str | Table | Gallery | Cards | Bullets


@dataclasses.dataclass(frozen=True)
class Section:
  """A titled part of a report."""

  title: str
  blocks: Sequence[Block]


@dataclasses.dataclass(frozen=True)
class Document:
  """A report.

  Attributes:
    title: its heading.
    intro: what comes before the first section.
    warnings: what a reader must not overlook.
    sections: in order; those without blocks are left out.
  """

  title: str
  intro: Sequence[Block]
  warnings: Sequence[str]
  sections: Sequence[Section]

  def figures(self) -> list[Figure]:
    """Those that report.md shows."""
    blocks = [block for section in self.sections for block in section.blocks]
    galleries = [b for b in blocks if isinstance(b, Gallery) and b.in_markdown]
    return [figure for gallery in galleries for figure in gallery.figures]


def text_of(cell: Cell | str) -> str:
  """What a cell says, on one line."""
  if isinstance(cell, str):
    cell = Cell(cell)
  parts = (cell.text, f'({cell.detail})' if cell.detail else '', cell.mark)
  return ' '.join(part for part in parts if part).replace('\n', '; ')


def markdown(document: Document) -> str:
  """The whole of report.md."""
  parts = [
    f'# {_safe(document.title)}',
    *map(_block, document.intro),
    *(f'> **Note:** {_safe(warning)}' for warning in document.warnings),
  ]
  for section in document.sections:
    if section.blocks:
      parts += [f'## {_safe(section.title)}', *map(_block, section.blocks)]
  return '\n\n'.join(part for part in parts if part) + '\n'


def _block(block: Block) -> str:
  if isinstance(block, str):
    return _safe(block)
  if isinstance(block, Bullets):
    return '\n'.join(f'- {_safe(line)}' for line in block.lines)
  if isinstance(block, Table):
    rows = [*block.rows, *block.footer]
    return '\n\n'.join([_table(block.header, rows, block.left), _safe(block.note)]).strip()
  if isinstance(block, Cards):
    rows = [[card.title, card.choice, card.why, card.lacks] for card in block.cards]
    return _table(['you want', 'targets', 'why', 'what it lacks'], rows, left=4)
  images = [f'![{_safe(figure.title)}]({figure.name}.svg)' for figure in block.figures]
  return '\n\n'.join([*images, _safe(block.note)]).strip() if block.in_markdown else ''


def _table(header: Sequence[str], rows: Sequence[Sequence[Cell | str]], left: int) -> str:
  texts = [[_safe(text_of(cell)) for cell in row] for row in rows]
  return tables.markdown([_safe(name) for name in header], texts, left)


def _safe(text: str) -> str:
  """No name of a user's is HTML; what stands in `code` never is."""
  parts = text.split('`')
  parts[::2] = [part.replace('<', '&lt;') for part in parts[::2]]
  return '`'.join(parts)

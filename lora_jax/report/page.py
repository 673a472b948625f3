"""A document as report.html: one file that needs nothing beside it, and no network.

Names come from users' files and command lines, so every text is escaped; what stands in
`code` and **bold** becomes an element afterwards.
"""

import functools
import importlib.resources

import jinja2
from markupsafe import Markup, escape

from lora_jax.report.document import Cell, Document


def render(document: Document) -> str:
  """The whole of report.html."""
  return _template().render(document=document)


@functools.cache
def _template() -> jinja2.Template:
  environment = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
  )
  environment.filters['inline'] = _inline
  environment.filters['slug'] = lambda title: ''.join(
    letter if letter.isalnum() else '-' for letter in title.lower()
  )
  environment.filters['drawn'] = lambda figure: Markup(figure.svg)
  environment.globals.update(
    kind=lambda block: type(block).__name__, style=_file('page.css'), script=_file('page.js')
  )
  environment.filters['cell'] = lambda cell: cell if isinstance(cell, Cell) else Cell(cell)
  return environment.from_string(_file('page.html.jinja'))


def _inline(text: str) -> Markup:
  """`code` and **bold** as elements, everything else as it is."""
  made = Markup()
  for i, part in enumerate(text.split('`')):
    if i % 2:
      # Where a line may break within a long name.
      made += Markup('<code>{}</code>').format(Markup(',<wbr>').join(part.split(',')))
    else:
      for bold, piece in enumerate(part.split('**')):
        made += Markup('<b>{}</b>').format(piece) if bold % 2 else escape(piece)
  return made


def _file(name: str) -> Markup:
  return Markup(
    importlib.resources.files('lora_jax.report').joinpath(name).read_text(encoding='utf-8')
  )

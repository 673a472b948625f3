"""The table of scores for a terminal of any width.

Cells stand on one line where there is room and break at a space where there is not;
columns that still do not fit go into a further table below.
"""

import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_jax.report import document
from lora_jax.report.results import NEEDS_VISION, PARTLY_DIVERGED, Average, Entry, Results
from lora_jax.report.tables import arm_title, best, entry_score, score

# A longer word of a column's name, as of a regular expression, may be cut anywhere.
_HEADER_WORD = 8

# A row: its title and its cells by configuration.
_Row = tuple[str, dict[str, str]]


def render(results: Results, width: int) -> str:
  """The table and the lines that explain its marks.

  A star marks what is bold in Markdown, since bold does not survive a log file.

  Args:
    results: the numbers; other arms follow below.
    width: columns of the terminal; lines are no longer, unless a single column is.
  """
  tables, legend = _arm(results, width)
  for arm, other in results.others.items():
    below, more = _arm(other, width)
    tables += [*_title(arm, other, width), '', *below]
    legend |= more
  return '\n'.join([*tables, *legend])


def plain(table: document.Table, width: int) -> str:
  """A table of a report for a terminal, with its note."""
  made = Table(box=rich.box.SIMPLE, pad_edge=False, show_edge=False)
  for i, name in enumerate(table.header):
    justify = 'left' if i < table.left else 'right'
    made.add_column(_text(name), justify=justify, vertical='bottom', overflow='fold')
  for row in [*table.rows, *table.footer]:
    made.add_row(*(_text(document.text_of(cell)) for cell in row))
  return '\n'.join([_printed(made, width), *textwrap.wrap(table.note, width), ''])


def _text(said: str) -> Text:
  # A space gives a set of targets a place to break, and a number none.
  return Text(re.sub(r',(?=[^\d\s])', ', ', said.replace('`', '')))


def _arm(results: Results, width: int) -> tuple[list[str], dict[str, None]]:
  """The tables of one arm, and what explains their marks."""
  unseen = [
    dataset.title
    for dataset in results.datasets
    if any(entry.status == NEEDS_VISION for entry in dataset.entries.values())
  ]
  rows = [
    (dataset.title, _cells(dataset.entries, _entry, best(results, row)))
    for row, dataset in enumerate(results.datasets)
    if dataset.title not in unseen
  ]
  if results.averages:
    rows.append(('average', _cells(results.averages, _average, best(results, -1))))
  entries = [entry for dataset in results.datasets for entry in dataset.entries.values()]
  legend = ['scores 0 to 100, ± standard error over test rows, * highest in its row']
  averages = results.averages.values()
  if any(one.mean is not None and one.se is None for one in (*entries, *averages)):
    legend.append(
      'no ±: all rows score alike, or there is one, here or on a dataset of the average'
    )
  if any('†' in cell for _, cells in rows for cell in cells.values()):
    legend.append('† without the seeds that diverged')
  if unseen:
    legend.append(f'not run, needs vision: {", ".join(unseen)}')
  return _tables(results.configurations, rows, width), dict.fromkeys(legend)


def _title(arm: str, results: Results, width: int) -> list[str]:
  """Which arm, and the rank of each set with its size beside the budget."""
  held = lambda name: f'{results.costs[name].trainable_params:,}'
  sizes = [
    f'{name} rank {size.rank} with {held(name)} ({100 * size.miss:+.1f} %)'
    for name, size in results.sizes.items()
  ]
  text = f'at {arm_title(arm)}'
  if sizes:
    budget = next(iter(results.sizes.values())).budget
    text += f', {budget:,} trainable: {"; ".join(sizes)}'
  return textwrap.wrap(text, width, break_on_hyphens=False)


def _tables(names: Sequence[str], rows: Sequence[_Row], width: int) -> list[str]:
  titles = max((len(title) for title, _ in rows), default=0)
  gap, widths = 2, {name: _needed(name, rows, lambda text: [text]) for name in names}
  if titles + sum(widths.values()) + gap * len(widths) > width:
    gap, widths = 1, {name: _needed(name, rows, str.split) for name in names}
  blocks, room = [[]], width - titles
  for name in names:
    if blocks[-1] and room < gap + widths[name]:
      blocks.append([])
      room = width - titles
    blocks[-1].append(name)
    room -= gap + widths[name]
  return [_table({name: widths[name] for name in block}, rows, gap, width) for block in blocks]


def _needed(name: str, rows: Sequence[_Row], pieces: Callable[[str], list[str]]) -> int:
  """The width of a column whose texts break into these pieces."""
  cells = [len(piece) for _, row in rows for piece in pieces(row[name])]
  return max([*cells, *(min(len(piece), _HEADER_WORD) for piece in pieces(_head(name)))])


def _table(widths: Mapping[str, int], rows: Sequence[_Row], gap: int, width: int) -> str:
  # The box itself sets one space between columns.
  table = Table(box=rich.box.SIMPLE, padding=(0, 0, 0, gap - 1), pad_edge=False, show_edge=False)
  table.add_column('', no_wrap=True)
  for name, needed in widths.items():
    table.add_column(Text(_head(name)), justify='right', width=needed, overflow='fold')
  for title, cells in rows:
    table.add_row(title, *(Text(cells[name]) for name in widths))
  return _printed(table, width)


def _printed(table: Table, width: int) -> str:
  console = Console(file=io.StringIO(), width=width, force_terminal=False, color_system=None)
  with console.capture() as captured:
    console.print(table)
  return '\n'.join([*(line.rstrip() for line in captured.get().splitlines()), ''])


def _head(name: str) -> str:
  # A space gives a set of targets a place to break.
  return name.replace(',', ', ')


def _cells(values: Mapping[str, Any], cell: Callable[[Any], str], top: set[str]) -> dict[str, str]:
  return {
    name: cell(value).replace('± ', '±') + '*' * (name in top) for name, value in values.items()
  }


def _entry(entry: Entry) -> str:
  if entry.status == PARTLY_DIVERGED:
    return f'{score(entry.mean, entry.se)}†'
  return entry_score(entry)


def _average(average: Average) -> str:
  return score(average.mean, average.se)

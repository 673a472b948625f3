"""Times in batches (`experiments.latency`), in a study's report or in one of their own."""

from collections.abc import Mapping
from typing import Any

from lora_jax.batch import BASE, MERGED, Batch
from lora_jax.report import svg, tables, timings
from lora_jax.report.document import EVEN, Cell, Document, Figure, Gallery, Section, Table
from lora_jax.report.tables import code

_WORKS = (('prefill', 'prefill'), ('decode', 'decoded token'))
_WIDTH = 380


def document(held: Mapping[str, Any]) -> Document:
  """A report of batches alone.

  Args:
    held: the content of batches.json.
  """
  return Document(
    title=f'Latency of unmerged adapters on {held["about"]["base"]}',
    intro=['Target sets beside the base, by rows in a batch and by the adapters that they have.'],
    warnings=[],
    sections=sections(held),
  )


def text(held: Mapping[str, Any]) -> str:
  """The tables for a terminal."""
  lines = []
  for batch in held['batches']:
    table = _table(batch)
    rows = [[_plain(cell) for cell in row] for row in table.rows]
    title = Batch(batch['rows'], batch['adapters']).label
    lines += [title, tables.markdown(table.header, rows), '']
  return '\n'.join(lines)


def sections(held: Mapping[str, Any] | None) -> list[Section]:
  """A table for each batch, and drawings of its ratios; none where nothing was timed."""
  if held is None:
    return []
  about, found = held['about'], []
  for batch in held['batches']:
    of = Batch(batch['rows'], batch['adapters'])
    bank = 'each row by its own adapter from a bank of slots' if of.adapters > 1 else 'one for all'
    note = (
      f'Adapters of rank {about["rank"]} unmerged, {bank}; prompts of {about["prompt_tokens"]} '
      f'tokens, on {tables.device(about)} in {about["dtype"]}. {timings.note(about["turns"])} '
      'Tokens/s follow from the milliseconds.'
    )
    drawn = [_figure(batch, of, work, title) for work, title in _WORKS]
    blocks = [_table(batch, note), Gallery(drawn, in_markdown=False)]
    found.append(Section(f'In a batch: {of.label}', blocks))
  return found


def _table(batch: Mapping[str, Any], note: str = '') -> Table:
  rows, held = [], batch['times']
  for name in held:
    speed = 1e3 * batch['rows'] / timings.milliseconds(held, name, 'decode')
    title = Cell(name if name in (BASE, MERGED) else code(name))
    rows.append([title, *timings.cells(held, name), Cell(tables.significant(speed), speed)])
  return Table(['targets', *timings.HEADER, 'tokens/s'], rows, 1, note)


def _figure(batch: Mapping[str, Any], of: Batch, work: str, title: str) -> Figure:
  """Each ratio with its quartiles, and a line where the base is."""
  times = {name: held for name, held in batch['times'].items() if name != BASE}
  ends = [held[f'{work}_ratio{end}'] for held in times.values() for end in ('_low', '_high')]
  low, high = min(*ends, 1.0), max(*ends, 1.0)
  room = 0.06 * (high - low) or 0.05
  low, high = low - room, high + room
  left = min(160, 12 + max(svg.width(name) for name in times))
  across = lambda value: left + (value - low) / (high - low) * (_WIDTH - left - 12)
  bottom = svg.LINE * len(times) + 14
  parts = [svg.line(across(1), 4, across(1), bottom, 'axis')]
  for tick in svg.ticks(low, high, 4):
    parts.append(svg.line(across(tick), 4, across(tick), bottom, 'grid'))
    parts.append(svg.text(across(tick), bottom + 14, f'{tick:g}', 'middle', 'dim'))
  for place, (name, held) in enumerate(times.items()):
    y = 14 + svg.LINE * place
    one, middle, other = (held[f'{work}_ratio{end}'] for end in ('_low', '', '_high'))
    parts.append(svg.text(left - 10, y + 4, svg.fitted(name, left - 12), 'end'))
    parts.append(svg.line(across(one), y, across(other), y, f'{EVEN} whisker'))
    parts.append(svg.dot(across(middle), y, 'mark', f'{name}: {middle:.3f}'))
  says = f'{of.label}, {title}: time over the base’s, each target set with its quartiles'
  drawn = svg.drawing(_WIDTH, bottom + 20, says, parts)
  return Figure(f'batch_{of.rows}_{of.adapters}_{work}', f'{title}, base = 1', drawn, says)


def _plain(cell: Cell | str) -> str:
  if isinstance(cell, str):
    return cell
  says = cell.text.replace('`', '')
  return f'{says} ({cell.detail})' if cell.detail else says

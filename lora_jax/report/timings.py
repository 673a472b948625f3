"""Times of the base and of target sets as the cells of tables, in which no row contradicts another.

Where a machine changes its speed between turns, the medians of two sets over all turns tell of
the machine more than of the sets, and only what is compared within a turn does not.
"""

from collections.abc import Mapping
from typing import Any

from lora_jax.batch import BASE
from lora_jax.report import tables
from lora_jax.report.document import Cell

HEADER = ('prefill ms', 'ratio to base', 'decoded token ms', 'ratio to base')
_WORKS = ('prefill', 'decode')
# Turns of the base that are further apart than this are told.
_WIDE = 1.1


def milliseconds(times: Mapping[str, Mapping[str, Any]], name: str, work: str) -> float:
  """The base's median, and of another that times its ratio.

  Args:
    times: name -> times as `lora_jax.latency.measure` gives them, the base's among them.
    name: one of them.
    work: 'prefill' or 'decode'.
  """
  return times[BASE][f'{work}_ms'] * times[name][f'{work}_ratio']


def cells(times: Mapping[str, Mapping[str, Any]], name: str) -> list[Cell]:
  """The cells below `HEADER` of one of `times`."""
  found = []
  for work in _WORKS:
    held, taken = times[name], milliseconds(times, name, work)
    middle, low, high = (held[f'{work}_ratio{end}'] for end in ('', '_low', '_high'))
    if name == BASE:
      reach = _range(held.get(f'{work}_turns_ms'))
      found += [Cell(tables.significant(taken), taken, detail=reach), Cell('1', 1.0)]
    else:
      ratio = Cell(f'{middle:.2f}', middle, detail=f'{low:.2f} to {high:.2f}')
      found += [Cell(tables.significant(taken), taken), ratio]
  return found


def note(turns: int) -> str:
  """How the cells came about."""
  return (
    f'Ratios are taken within a turn: medians over {turns} turns, quartiles in brackets. '
    'Milliseconds: the base’s median, with its fastest and slowest turn in brackets where these '
    'are more than a tenth apart; of the others that median times their ratio.'
  )


def _range(turns_ms: list[float] | None) -> str:
  # Records from before turns were kept have none.
  if not turns_ms or max(turns_ms) <= _WIDE * min(turns_ms):
    return ''
  return f'{tables.significant(min(turns_ms))} to {tables.significant(max(turns_ms))}'

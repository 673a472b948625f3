"""Numbers as the cells of tables, and tables as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.report.results import DONE, MISSING, PARTLY_DIVERGED, Entry, Results

NOTHING = '-'


def score(mean: float | None, se: float | None) -> str:
  """A score or an average: '41.2 ± 1.3'."""
  if mean is None:
    return NOTHING
  return f'{mean:.1f}' if se is None else f'{mean:.1f} ± {se:.1f}'


def entry_score(entry: Entry) -> str:
  """An entry's score, or its status where it has none."""
  if entry.status == MISSING:
    return NOTHING
  if entry.status == PARTLY_DIVERGED:
    seeds = len(entry.diverged) + len(entry.seed_means)
    return f'{score(entry.mean, entry.se)} ({len(entry.diverged)} of {seeds} seeds diverged)'
  return score(entry.mean, entry.se) if entry.status == DONE else entry.status


def spread(middle: float, low: float, high: float, digits: int = 1) -> str:
  """A difference and its interval: '+3.1 (-0.2 to +6.4)'."""
  # 'z': what rounds to zero has no sign to show.
  return f'{middle:+z.{digits}f} ({reach(low, high, digits)})'


def reach(low: float, high: float, digits: int = 1) -> str:
  """The interval of a difference: '-0.2 to +6.4'."""
  return f'{low:+z.{digits}f} to {high:+z.{digits}f}'


def best(results: Results, row: int) -> set[str]:
  """The configurations whose score is the highest as printed; none where all are equal.

  Args:
    results: the numbers.
    row: index of a dataset, or -1 for the averages.
  """
  if row < 0:
    means = {key: average.mean for key, average in results.averages.items()}
  else:
    entries = results.datasets[row].entries
    means = {key: entry.mean for key, entry in entries.items() if entry.status == DONE}
  printed = {key: round(mean, 1) for key, mean in means.items() if mean is not None}
  if len(set(printed.values())) < 2:
    return set()
  return {key for key, value in printed.items() if value == max(printed.values())}


def code(text: str) -> str:
  """A name in Markdown as it is written on a command line."""
  # A backtick would end the code, and no module's path has one.
  return f'`{text.replace("`", "´")}`'


def arm_title(arm: str) -> str:
  """An arm for people: 'equal parameters'."""
  return arm.replace('_', ' ')


def device(times: Mapping[str, Any]) -> str:
  """What times were taken on: 'NVIDIA H100', or 'cpu (AMD EPYC 9454, 8 cores)'."""
  # Older ones do not say which CPU.
  which = f' ({times["processor"]})' if 'processor' in times else ''
  return f'{times["device"]}{which}'


def significant(value: float) -> str:
  """A positive number with three digits, or as many as its whole part has."""
  return f'{value:,.0f}' if value >= 100 else f'{value:#.3g}'


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
  """A Markdown table whose source lines up.

  Args:
    header: names of the columns.
    rows: their cells.
    left: how many columns hold words; the others are aligned to the right.
  """
  # A pipe ends a cell even within code.
  table = [[cell.replace('|', '\\|') for cell in row] for row in (header, *rows)]
  widths = [max(3, *(len(cell) for cell in column)) for column in zip(*table, strict=True)]
  lines = [
    [cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(pairs)]
    for pairs in (list(zip(row, widths, strict=True)) for row in table)
  ]
  rule = ['-' * width if i < left else '-' * (width - 1) + ':' for i, width in enumerate(widths)]
  return '\n'.join(f'| {" | ".join(line)} |' for line in (lines[0], rule, *lines[1:]))

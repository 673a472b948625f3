"""Small financial tables with a question that needs a step or two of arithmetic."""

import random
from typing import Any

_FIRST = ('Alder', 'Birch', 'Cobalt', 'Delta', 'Ember', 'Fjord', 'Granite', 'Harbor', 'Indigo')
_SECOND = ('Foods', 'Energy', 'Rail', 'Media', 'Mining', 'Textiles', 'Air', 'Software')
_ITEMS = (
  'Revenue',
  'Cost of sales',
  'Research expense',
  'Marketing expense',
  'Interest expense',
  'Operating income',
  'Cash',
  'Inventory',
  'Long-term debt',
  'Capital spending',
)

# A table: item -> year -> amount, in the scale's unit.
_Table = dict[str, dict[int, int]]
# question, reasoning, answer, unit of the answer ('scale' or 'percent' or '')
_Made = tuple[str, str, int, str]


def rows(seed: int, count: int) -> list[dict[str, Any]]:
  """FinCoT rows: a table of three or four items over two or three years, and a question.

  A pure function of its arguments; the first rows do not depend on `count`.
  """
  rng = random.Random(f'fincot {seed}')
  return [{'id': f'synthetic-{index}', **_row(rng)} for index in range(count)]


def _row(rng: random.Random) -> dict[str, Any]:
  last = rng.randint(2012, 2023)
  years = list(range(last - rng.choice((1, 2)), last + 1))
  items = rng.sample(_ITEMS, rng.choice((3, 4)))
  # Multiples of ten keep the arithmetic within reach of a small model, and percentages exact.
  table = {item: {year: 10 * rng.randint(2, 40) for year in years} for item in items}
  scale = rng.choice(('thousand', 'million'))
  kind = rng.choice((_lookup, _difference, _difference, _total, _change, _change, _share))
  question, reasoning, value, unit = kind(rng, table, scale)
  if unit == 'percent':
    answer = f'{value}%'
  else:
    answer = f'{"-" if value < 0 else ""}${abs(value)} {scale}'
  context = (
    f'The table shows accounts of {rng.choice(_FIRST)} {rng.choice(_SECOND)} '
    f'in {scale}s of dollars.\n- | {" | ".join(map(str, years))}\n'
    + '\n'.join(f'{item} | {" | ".join(map(str, table[item].values()))}' for item in items)
  )
  return {
    'Question': 'Please answer the given financial question based on the context.\n'
    f'Context: {context}\nQuestion: {question}\nAnswer:',
    'Reasoning_process': reasoning,
    'Final_response': f'The answer is {answer}.',
    'answer': value,
    'scale': 'percent' if unit == 'percent' else scale,
  }


def _pick(rng: random.Random, table: _Table) -> tuple[str, int, int]:
  item = rng.choice(list(table))
  before, after = sorted(rng.sample(list(table[item]), 2))
  return item, before, after


def _lookup(rng: random.Random, table: _Table, scale: str) -> _Made:
  item, _, year = _pick(rng, table)
  value = table[item][year]
  question = f'What was {item.lower()} in {year}?'
  return question, f'The row {item} shows {value} under {year}.', value, 'scale'


def _difference(rng: random.Random, table: _Table, scale: str) -> _Made:
  item, before, after = _pick(rng, table)
  old, new = table[item][before], table[item][after]
  return (
    f'By how much did {item.lower()} change from {before} to {after}?',
    f'{item} was {old} in {before} and {new} in {after}. {new} - {old} = {new - old}.',
    new - old,
    'scale',
  )


def _total(rng: random.Random, table: _Table, scale: str) -> _Made:
  item, before, after = _pick(rng, table)
  old, new = table[item][before], table[item][after]
  return (
    f'What was {item.lower()} in {before} and {after} together?',
    f'{item} was {old} in {before} and {new} in {after}. {old} + {new} = {old + new}.',
    old + new,
    'scale',
  )


def _change(rng: random.Random, table: _Table, scale: str) -> _Made:
  item, before, after = _pick(rng, table)
  old, percent = rng.choice((50, 100, 200, 250, 400)), rng.choice((-60, -40, -20, 20, 40, 60, 80))
  new = old + old * percent // 100
  table[item][before], table[item][after] = old, new
  return (
    f'What was the percentage change in {item.lower()} from {before} to {after}?',
    f'{item} was {old} in {before} and {new} in {after}. {new} - {old} = {new - old}. '
    f'{new - old} / {old} = {percent / 100:.2f}, which is {percent}%.',
    percent,
    'percent',
  )


def _share(rng: random.Random, table: _Table, scale: str) -> _Made:
  part, whole = rng.sample(list(table), 2)
  year = rng.choice(list(table[part]))
  base, percent = rng.choice((50, 100, 200, 250, 400)), rng.choice((10, 20, 30, 40, 60, 80))
  table[part][year], table[whole][year] = base * percent // 100, base
  return (
    f'What percentage of {whole.lower()} was {part.lower()} in {year}?',
    f'In {year}, {part.lower()} was {base * percent // 100} and {whole.lower()} {base}. '
    f'{base * percent // 100} / {base} = {percent / 100:.2f}, which is {percent}%.',
    percent,
    'percent',
  )

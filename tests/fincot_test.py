"""Amounts are read as a person reads them, and FinCoT is scored on them."""

import doctest
from decimal import Decimal

import pytest

from lora_jax.data import fincot, numbers, synthetic_statements

TASK = fincot.TASK


@pytest.mark.parametrize(
  ('text', 'value', 'unit'),
  [
    ('-25.53%', '-25.53', 'percent'),
    ('$1,234.50', '1234.50', ''),
    ('-$121.8 million', '-121.8', 'million'),
    ('$ (279) thousand', '-279', 'thousand'),
    ('(25.5%)', '-25.5', 'percent'),
    ('(25.5)%', '-25.5', 'percent'),
    ('\u22123 billion dollars', '-3', 'billion'),
    ('about 12 percent more than in 2019', '12', 'percent'),
    ('12.5% of 2018 sales', '12.5', 'percent'),
    ('in 2019 it was $3, up from 2018', '3', ''),
    ('it rose from 2018 to 2019 by 7.', '7', ''),
    ('10-12', '10', ''),
    ('.5', '0.5', ''),
    ('US$3.2bn', '3.2', 'billion'),
    ('3 months', '3', ''),
  ],
)
def test_amounts_are_read(text, value, unit):
  assert numbers.read_quantity(text) == numbers.Quantity(Decimal(value), unit)


def test_texts_without_or_with_more_than_an_amount():
  assert numbers.read_quantity('none at all') is None
  assert numbers.read_quantity('25 days', whole=True) is None
  assert numbers.read_quantity('$ 25', whole=True) == numbers.Quantity(Decimal(25), '')
  assert numbers.read_quantity('2018, 2019', whole=True) is None
  assert doctest.testmod(numbers).failed == 0


def row(answer, scale, final='x'):
  return {
    'Question': 'Context: c\nQuestion: q\nAnswer:',
    'Reasoning_process': 'r',
    'Final_response': final,
    'answer': answer,
    'scale': scale,
  }


@pytest.mark.parametrize(
  ('answer', 'scale', 'said', 'right'),
  [
    (-25.53, 'percent', '-25.53%', True),
    (-25.53, 'percent', '-25.5%', True),
    (-25.53, 'percent', '(25.53)%', True),
    (-25.53, 'percent', '-25.53', True),
    (-25.53, 'percent', '-0.2553', True),
    (-25.53, 'percent', '-0.2553%', False),
    (-25.53, 'percent', '25.53%', False),
    (-25.53, 'percent', '-26%', False),
    (-25.53, 'percent', '-25.8%', False),
    (121.8, 'million', '$121.8 million', True),
    (121.8, 'million', '121.8', True),
    (121.8, 'million', '$121,800,000', True),
    (121.8, 'million', '121,800 thousand', True),
    (121.8, 'million', '121.8 thousand', False),
    (121.8, 'million', '121.8%', False),
    (['2018'], '', '2018', True),
    (['2018'], '', '2019', False),
    ('3', '', '3.', True),
    (0, '', '0', True),
    (0, '', '0.4', False),
    (['$31.4 million'], '', '31.4 million', True),
    (['$31.4 million', '$28.5 million'], '', '$31.4 million, $28.5 million', True),
    (['$31.4 million', '$28.5 million'], '', '$31.4 million', False),
    (['the United States'], '', 'United States.', True),
    (['25 days'], '', '25 days.', True),
    (['25 days'], '', '26 days.', False),
    ('nan', '', 'inf', False),
  ],
)
def test_scoring(answer, scale, said, right):
  example = row(answer, scale)
  assert TASK.score(f'First 12 and 99.\nThe answer is {said}', example)['accuracy'] == right


def test_the_scale_may_be_spelt_in_capitals_and_an_unknown_one_is_refused():
  assert TASK.score('The answer is 5 thousand', row('5', 'Thousand'))['accuracy'] == 1
  with pytest.raises(ValueError, match="scale is 'dozen', not one of percent, thousand"):
    TASK.target(row('5', 'dozen'))


def test_the_last_marked_answer_counts():
  example = row(5, '')
  assert TASK.score('The answer is 4. No: the answer is 5.', example)['accuracy'] == 1
  assert TASK.score('The answer is **5**\nBecause 2 + 3 = 5, not 6.', example)['accuracy'] == 1
  assert TASK.score('The answer is 5, then 7.\nAnswer: 7', example)['accuracy'] == 0
  assert TASK.score('2 + 3 =\n5', example) == {'accuracy': 1, 'answered': 0}


@pytest.mark.parametrize(
  ('said', 'right'),
  [
    ('Sales rose from 2018 to 2019 by 20 %.', 1),
    ('Sales were 12.\n\nThe change is therefore 0.20.', 1),
    ('20 / 60 = 0.20. 20 / 60 = 0.20', 0),
    ('It is 20 % of 60.', 0),
    ('The share is 20 %. This follows from the table.', 0),
    ('', 0),
  ],
)
def test_without_a_marker_the_last_sentence_may_give_one_number(said, right):
  assert TASK.score(said, row(20, 'percent')) == {'accuracy': right, 'answered': 0}


def test_reference_without_an_answer_field():
  example = row(None, None, 'The change from 2018 to 2019 was 12.5%.')
  assert TASK.target(example).endswith('The answer is The change from 2018 to 2019 was 12.5%.')
  assert TASK.score('The answer is 12.5%.', example)['accuracy'] == 1
  assert TASK.score('The answer is 2019.', example)['accuracy'] == 0


def test_cutting_the_context_keeps_the_question():
  example = TASK.synthetic(0, 1)[0]
  prompt = TASK.prompt(example)
  question = example['Question'].split('Question: ')[1].removesuffix('\nAnswer:')
  assert question in prompt.text(0)
  assert ' | ' in prompt.document
  assert ' | ' not in prompt.text(0)


def test_synthetic_answers_follow_from_the_table():
  """Recomputes each answer from the printed table and question alone."""
  for example in synthetic_statements.rows(1, 300):
    document = TASK.prompt(example).document
    head, *lines = document.split('\n- | ')[1].split('\n')
    years = head.split(' | ')
    table = {}
    for line in lines:
      name, *cells = line.split(' | ')
      table |= {(name.lower(), year): int(cell) for year, cell in zip(years, cells, strict=True)}
    question = TASK.prompt(example).after
    items = sorted({n for n, _ in table if n in question}, key=question.index)
    asked = [year for year in years if year in question]
    values = [table[item, year] for item in items for year in asked]
    if 'percentage of' in question:
      expected = 100 * values[1] / values[0]
    elif 'percentage change' in question:
      expected = 100 * (values[1] - values[0]) / values[0]
    elif 'together' in question:
      expected = sum(values)
    elif 'By how much' in question:
      expected = values[1] - values[0]
    else:
      (expected,) = values
    assert example['answer'] == pytest.approx(expected)

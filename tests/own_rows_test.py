"""A user's own file as a dataset of the study: how it is split, and what is refused at once."""

import json
import random

import pytest

from lora_jax.data import own_rows
from lora_jax.errors import UserError


def row(prompt, answer='4', **more):
  turns = [('user', prompt), ('assistant', answer)]
  return {'messages': [{'role': role, 'content': text} for role, text in turns], **more}


def write(path, rows):
  path.write_text(''.join(json.dumps(held) + '\n' for held in rows))
  return path


def many(count, answer=str):
  return [row(f'what is {i} and 1?', answer(i + 1)) for i in range(count)]


def asked(rows):
  return {held.messages[0]['content'] for held in rows}


def test_a_row_keeps_its_side_whatever_stands_beside_it(tmp_path):
  rows = many(200)
  whole = own_rows.read(write(tmp_path / 'my.jsonl', rows))
  assert 25 <= len(whole.test) <= 55
  assert len(whole.train) + len(whole.test) == 200
  assert not asked(whole.train) & asked(whole.test)
  some = random.Random(0).sample(rows, 120)
  part = own_rows.read(write(tmp_path / 'part.jsonl', some))
  assert asked(part.test) == asked(whole.test) & {r['messages'][0]['content'] for r in some}
  # The answer has no say in it, nor have spaces.
  spaced = [row(f' what is  {i} and 1? ', 'other') for i in range(200)]
  again = own_rows.read(write(tmp_path / 'spaced.jsonl', spaced))
  assert [held.id for held in again.test] == [held.id for held in whole.test]


def test_a_file_of_test_rows_is_taken_whole(tmp_path):
  path = write(tmp_path / 'my.jsonl', many(9))
  others = write(tmp_path / 'other.jsonl', [row(f'{i}?') for i in range(8)])
  rows = own_rows.read(path, others)
  assert (len(rows.train), len(rows.test)) == (9, 8)
  task = own_rows.make(rows, 'exact_match')
  assert rows.describe(task) == 'my.jsonl, 9 train; 8 test, of other.jsonl'
  assert task.title == 'my'
  assert 'compared by exact_match' in task.note
  posed = next(rows.rows(task)['test'])
  assert task.score(task.target(posed), posed)['exact_match'] == 1
  before = rows.fingerprint(task)
  assert own_rows.read(path, others).fingerprint(task) == before
  assert rows.fingerprint(own_rows.make(rows, 'numeric')) != before
  write(others, [row(f'{i}?', '5') for i in range(8)])
  assert own_rows.read(path, others).fingerprint(task) != before


@pytest.mark.parametrize(
  ('rows', 'says'),
  [
    ([*many(80), row('what is  7 and 1?')], r'my\.jsonl:81: asks the same as .*my\.jsonl:8,'),
    ([*many(80), *many(3)], r'my\.jsonl:81: asks the same .*; so do 2 rows more'),
    ([row('a?', id='x'), row('b?', id='x')], r"my\.jsonl:2: id 'x' is that of .*my\.jsonl:1 too"),
    (many(9), r'my\.jsonl: 9 rows are too few .*--test_data'),
    ([*many(40), {'messages': []}], r'my\.jsonl:41: '),
  ],
)
def test_rows_that_make_no_study_are_named(tmp_path, rows, says):
  with pytest.raises(UserError, match=says):
    own_rows.read(write(tmp_path / 'my.jsonl', rows))


def test_what_is_learned_is_not_tested(tmp_path):
  path = write(tmp_path / 'my.jsonl', many(20))
  others = write(tmp_path / 'other.jsonl', [row('new?'), row('what is 3 and 1?')])
  with pytest.raises(UserError, match=r'other\.jsonl:2: asks the same as .*my\.jsonl:4'):
    own_rows.read(path, others)
  with pytest.raises(UserError, match=r'other\.jsonl: give at least 8 rows, there are 1'):
    own_rows.read(path, write(others, [row('new?')]))


@pytest.mark.parametrize(
  ('metric', 'answer', 'says'),
  [
    ('numeric', 'none at all', 'holds no number'),
    ('json_fields', 'total 5', 'holds no JSON object'),
    ('rouge', 'всё', 'holds no Latin letter or digit'),
    ('choice', 'a long answer that goes on and on and on and on', 'longer than 40 characters'),
  ],
)
def test_an_answer_that_a_metric_cannot_use_is_named(tmp_path, metric, answer, says):
  usable = {'json_fields': '{"a": 1}'}.get(metric, '5')
  rows = [row(f'{i}?', answer if i == 30 else usable) for i in range(60)]
  found = own_rows.read(write(tmp_path / 'my.jsonl', rows))
  with pytest.raises(UserError, match=rf'my\.jsonl:31: .*{says}'):
    own_rows.make(found, metric)


def test_choices_are_the_answers_that_there_are(tmp_path):
  answers = [row(f'{i}?', 'ABC'[i % 3]) for i in range(60)]
  found = own_rows.read(write(tmp_path / 'my.jsonl', answers))
  task = own_rows.make(found, 'choice')
  example = next(found.rows(task)['test'])
  assert task.choices is not None
  assert task.choices(example) == ('A', 'B', 'C')
  assert 'among A, B, C' in task.note
  with pytest.raises(UserError, match=r"the answer 'C' is none of"):
    own_rows.make(found, 'choice', ('A', 'B'))
  numbers = own_rows.read(write(tmp_path / 'numbers.jsonl', many(80)))
  with pytest.raises(UserError, match=r'80 different answers, .* at most 20'):
    own_rows.make(numbers, 'choice')

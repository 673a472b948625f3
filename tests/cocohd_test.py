import itertools
import json
import random

import pytest

from lora_jax.data import cocohd
from lora_jax.data.cocohd import TASK
from lora_jax.errors import UserError

_ALL_SCORES = {'field_score', 'valid_json', 'member_f1', 'witness_f1'}


@pytest.fixture(scope='module')
def rows():
  return TASK.synthetic(1, 60)


def test_the_target_scores_one_in_any_key_order_and_case(rows):
  rng = random.Random(0)
  for row in rows:
    target = TASK.target(row)
    assert TASK.score(target, row) == dict.fromkeys(_ALL_SCORES, 1.0)
    record = json.loads(target)
    shuffled = {key: record[key] for key in rng.sample(list(record), len(record))}
    assert TASK.score(f'```json\n{json.dumps(shuffled)}\n```', row)['field_score'] == 1.0
    assert TASK.score(json.dumps({**record, 'title': record['title'].swapcase()}), row) == (
      dict.fromkeys(_ALL_SCORES, 1.0)
    )


@pytest.mark.parametrize('text', ['', 'no record', '{"title": "x"', '[]', '{"title": '])
def test_invalid_json_scores_nothing(rows, text):
  assert all(TASK.score(text, row) == dict.fromkeys(_ALL_SCORES, 0.0) for row in rows)


def test_an_empty_object_is_valid_and_earns_nothing(rows):
  for row in rows:
    assert TASK.score('{}', row) == {**dict.fromkeys(_ALL_SCORES, 0.0), 'valid_json': 1.0}


def test_each_wrong_field_costs_an_eighth(rows):
  for row in rows:
    record = json.loads(TASK.target(row))
    for wrong, key in enumerate(list(record), start=1):
      record[key] = ['zzz'] if isinstance(record[key], list) else 'zzz'
      assert TASK.score(json.dumps(record), row)['field_score'] == pytest.approx(1 - wrong / 8)


def test_odd_types_in_a_prediction_are_wrong_and_do_not_fail(rows):
  record = json.loads(TASK.target(rows[0]))
  odd = {
    **record,
    'title': {'a': []},
    'members': 'Ann Ames, Ohio',
    'witnesses': [None, 3, {'x': 1}],
  }
  assert TASK.score(json.dumps(odd), rows[0])['field_score'] == pytest.approx(5 / 8)


def test_members_as_objects_count_like_strings(rows):
  row = rows[0]
  record = json.loads(TASK.target(row))
  record['members'] = row['details']['members']
  assert TASK.score(json.dumps(record), row)['member_f1'] == 1.0


def test_lists_are_cut_and_keys_keep_their_order():
  people = [{'name': f'Ann Ames {i}', 'state': 'Ohio', 'affiliation': 'x'} for i in range(20)]
  record = cocohd.record({'details': {'witnesses': people, 'members': people, 'title': 'T'}})
  assert list(record) == [
    'title', 'committee', 'chamber', 'congress_session', 'held_date', 'serial_no', 'members',
    'witnesses',
  ]  # fmt: skip
  assert record['members'] == [f'Ann Ames {i}, Ohio' for i in range(cocohd.MAX_MEMBERS)]
  assert record['witnesses'] == [f'Ann Ames {i}' for i in range(cocohd.MAX_WITNESSES)]
  assert record['serial_no'] is None


def test_details_may_be_json_text(rows):
  for row in rows[:5]:
    assert TASK.target({**row, 'details': json.dumps(row['details'])}) == TASK.target(row)


@pytest.mark.parametrize('details', ['{"title": ', '[1]', 7, {'members': 'Ann Ames'}])
def test_bad_details_are_a_user_error_that_names_the_row(details):
  with pytest.raises(UserError, match=r"row h-7: field 'details'") as caught:
    TASK.target({'id': 'h-7', 'transcript': '', 'details': details})
  assert '\n' not in str(caught.value)


def test_tidy_keeps_the_words_and_drops_the_layout():
  page = (
    '   TITLE OF IT\n\n     ______\n=====\nAnn Ames, Ohio      Bo Birch, Utah\nCole, Di....... 4\n'
  )
  assert cocohd.tidy(page) == 'TITLE OF IT\nAnn Ames, Ohio  Bo Birch, Utah\nCole, Di.. 4'


def test_rows_are_a_pure_function_of_seed_and_index():
  assert TASK.synthetic(5, 6) == TASK.synthetic(5, 12)[:6]
  assert TASK.synthetic(5, 6) != TASK.synthetic(6, 6)


def test_every_answer_can_be_read_from_the_transcript(rows):
  assert len({TASK.target(row) for row in rows}) == len(rows)
  for row in rows:
    text, record = row['transcript'].casefold(), cocohd.record(row)
    for key in ('title', 'committee', 'held_date'):
      assert record[key].casefold() in text
    assert (record['serial_no'] or '').casefold() in text
    for member in record['members']:
      assert member.casefold() in text
    for witness in record['witnesses']:
      assert all(part.casefold() in text for part in witness.split())
    assert TASK.target(row) not in TASK.prompt(row).text()


def test_another_rows_record_earns_little(rows):
  scores = [TASK.score(TASK.target(a), b)[TASK.headline] for a, b in itertools.pairwise(rows)]
  assert sum(scores) / len(scores) < 0.2

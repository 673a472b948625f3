import io
import json
import random

import pytest
from PIL import Image

from lora_jax.data import invoice_ocr
from lora_jax.data.invoice_ocr import TASK
from lora_jax.errors import UserError

_ALL_SCORES = {'entity_f1', 'tree_edit', 'valid_json'}
_NESTED = {
  'header': {'number': '71', 'date': '2/3/2021'},
  'items': [{'name': 'tea', 'price': '2.00'}, {'name': 'oats', 'price': '9.50'}],
  'summary': {'total': '11.50'},
}


@pytest.fixture(scope='module')
def rows():
  return TASK.synthetic(1, 40)


def _row(parsed_data, raw_data='{"ocr_words": ["tea", "2.00"]}'):
  return {'id': 'r-9', 'parsed_data': parsed_data, 'raw_data': raw_data}


def test_the_target_scores_one_in_any_key_order(rows):
  rng = random.Random(0)
  for row in rows:
    fields = json.loads(TASK.target(row))
    assert list(fields) == ['company', 'date', 'address', 'total']
    shuffled = {key: fields[key] for key in rng.sample(list(fields), len(fields))}
    assert TASK.score(TASK.target(row), row) == dict.fromkeys(_ALL_SCORES, 1.0)
    assert TASK.score(f'Sure!\n{json.dumps(shuffled)}', row) == dict.fromkeys(_ALL_SCORES, 1.0)


@pytest.mark.parametrize('text', ['', 'total 5.00', '{"total": "5.00"', '["a"]'])
def test_invalid_json_scores_nothing(rows, text):
  assert all(TASK.score(text, row) == dict.fromkeys(_ALL_SCORES, 0.0) for row in rows)


def test_each_wrong_field_costs_a_quarter_of_the_f1(rows):
  for row in rows[:10]:
    fields = json.loads(TASK.target(row))
    similarity = 1.0
    for wrong, key in enumerate(fields, start=1):
      fields[key] += '!'
      scores = TASK.score(json.dumps(fields), row)
      assert scores['entity_f1'] == pytest.approx(1 - wrong / 4)
      assert 0.5 < scores['tree_edit'] < similarity
      similarity = scores['tree_edit']


@pytest.mark.parametrize('inner', [json.dumps, repr])
@pytest.mark.parametrize('outer', [json.dumps, repr])
def test_json_and_python_literals_read_alike(inner, outer):
  words = ['O\'Hara "Tea"', '2.00']
  row = _row(
    outer({'xml': '', 'json': inner(_NESTED), 'kie': ''}),
    outer({'ocr_words': inner(words), 'ocr_boxes': []}),
  )
  assert invoice_ocr.fields(row) == _NESTED
  assert invoice_ocr.words(row) == words
  assert TASK.score(TASK.target(row), row) == dict.fromkeys(_ALL_SCORES, 1.0)


def test_words_come_from_boxes_where_no_words_are():
  polygon = [[0, 0], [9, 0], [9, 5], [0, 5]]
  boxes = [[polygon, ('tea', 0.99)], [polygon, ['2.00', 0.5]]]
  row = _row(json.dumps({'json': json.dumps(_NESTED)}), repr({'ocr_words': [], 'ocr_boxes': boxes}))
  assert invoice_ocr.words(row) == ['tea', '2.00']


def test_a_nested_prompt_names_the_keys_and_no_value():
  row = _row(json.dumps({'json': json.dumps(_NESTED)}), '{"ocr_words": ["nothing"]}')
  text = TASK.prompt(row).text()
  assert 'header.number, header.date, items[].name, items[].price, summary.total' in text
  assert all(value not in text for value in ('71', '2/3/2021', 'tea', 'oats', '11.50'))


@pytest.mark.parametrize(
  'parsed_data',
  [
    '__import__("os").getcwd()',
    '{"json": "{\'a\': open}"}',
    '{"json": "[1, 2]"}',
    '{"json": "{}"}',
    '"words"',
    '{"json": {"a": 1}',
    "{'json': {1, 2}}",
    '(' * 2000,
    '',
  ],
)
def test_bad_parsed_data_is_a_user_error_that_names_the_row(parsed_data):
  with pytest.raises(UserError, match=r"row r-9: field 'parsed_data'") as caught:
    TASK.target(_row(parsed_data))
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'raw_data',
  ['nonsense', '[]', '{}', '{"ocr_words": 3}', '{"ocr_boxes": [[1, 2]]}', '{"ocr_words": "x["}'],
)
def test_bad_raw_data_is_a_user_error_that_names_the_row(raw_data):
  row = _row(json.dumps({'json': json.dumps(_NESTED)}), raw_data)
  with pytest.raises(UserError, match=r"row r-9: field 'raw_data'"):
    TASK.prompt(row)


def test_rows_are_a_pure_function_of_seed_and_index():
  assert TASK.synthetic(5, 3) == TASK.synthetic(5, 6)[:3]
  assert TASK.synthetic(5, 3) != TASK.synthetic(6, 3)


def test_every_answer_can_be_read_from_the_words_in_order(rows):
  assert len({TASK.target(row) for row in rows}) == len(rows)
  for row in rows:
    printed = ' '.join(TASK.prompt(row).document.split('\n'))
    fields = invoice_ocr.fields(row)
    assert fields['company'] in printed
    assert fields['date'] in printed
    assert fields['total'] in printed
    assert fields['address'] in printed
    assert TASK.target(row) not in TASK.prompt(row).text()


def test_the_total_is_what_was_paid(rows):
  paid = 0
  for row in rows:
    words = invoice_ocr.words(row)
    if 'Cash' in words:
      cash, change = (float(words[words.index(label) + 1]) for label in ('Cash', 'Change'))
      assert float(invoice_ocr.fields(row)['total']) == pytest.approx(cash - change)
      assert change > 0
      paid += 1
  assert paid > 10


def test_boxes_lie_on_the_ink_of_the_image(rows):
  for row in rows[:10]:
    image = Image.open(io.BytesIO(row['image']))
    raw = json.loads(row['raw_data'])
    assert len(raw['ocr_words']) == len(raw['ocr_boxes'])
    blank = image.copy()
    for (left, top), _, (right, bottom), _ in raw['ocr_boxes']:
      assert 0 <= left < right <= image.width
      assert 0 <= top < bottom <= image.height
      assert min(image.crop((left, top, right, bottom)).tobytes()) < 128
      blank.paste(255, (left - 1, top - 1, right + 1, bottom + 1))
    assert set(blank.tobytes()) == {255}

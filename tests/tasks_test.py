"""What every dataset owes the study, whatever its content."""

import collections

import pytest

from lora_jax.data import sources, tasks
from lora_jax.errors import UserError

ALL = list(tasks.TASKS.values())
NAMES = ('fincot', 'govreport', 'medmcqa', 'medreason', 'cocohd', 'llava_cot', 'invoice_ocr')
each_task = pytest.mark.parametrize('task', ALL, ids=lambda task: task.name)


@pytest.fixture(scope='module', params=ALL, ids=lambda task: task.name)
def drawn(request):
  rows = sources.Synthetic(seed=0, train=60, test=40).rows(request.param)
  return request.param, {split: list(rows[split]) for split in rows}


def shown(task, row):
  return task.prompt(row).text() + (repr(row['image']) if task.needs_vision else '')


def test_by_names():
  assert tuple(tasks.TASKS) == NAMES
  chosen = tasks.by_names(['medmcqa', 'fincot', 'medmcqa'])
  assert [task.name for task in chosen] == ['medmcqa', 'fincot']
  with pytest.raises(UserError) as error:
    tasks.by_names(['fincot', 'banana'])
  assert all(name in str(error.value) for name in ('banana', *NAMES))
  with pytest.raises(UserError, match='medreason'):
    tasks.by_names([])


def test_train_and_test_pose_nothing_twice(drawn):
  task, splits = drawn
  posed = [shown(task, row) for rows in splits.values() for row in rows]
  assert (len(splits['train']), len(splits['test'])) == (60, 40)
  assert len(set(posed)) == len(posed)


def test_targets_score_full_and_nonsense_scores_nothing(drawn):
  task, splits = drawn
  for row in splits['test']:
    scores = task.score(task.target(row), row)
    assert scores[task.headline] == pytest.approx(1)
    assert all(0 <= value <= 1 for value in scores.values())
    for nonsense in ('', 'qqqq zzzz', '\x00<{["', '1' * 500, '(' * 500):
      worst = task.score(nonsense, row)
      assert worst.keys() == scores.keys()
      assert worst[task.headline] == 0


def test_another_rows_target_rarely_scores(drawn):
  task, splits = drawn
  rows = splits['test']
  mixed = [task.score(task.target(rows[i - 1]), row)[task.headline] for i, row in enumerate(rows)]
  assert sum(mixed) / len(mixed) < 0.6


def test_no_constant_answer(drawn):
  task, splits = drawn
  targets = collections.Counter(task.target(row) for row in splits['train'])
  assert targets.most_common(1)[0][1] < 0.5 * len(splits['train'])


@each_task
def test_rows_are_a_function_of_the_seed(task):
  assert task.synthetic(5, 4) == task.synthetic(5, 4)
  assert task.synthetic(5, 4) != task.synthetic(6, 4)
  assert task.synthetic(5, 4) == task.synthetic(5, 8)[:4]


@each_task
def test_fields_are_declared(task):
  assert set(task.required) <= set(task.features)
  assert set(task.features.values()) <= {'text', 'int', 'float', 'json', 'image'}
  (row,) = task.synthetic(0, 1)
  assert {*task.required, 'id'} <= set(row)
  if task.choices is not None:
    assert task.target(row) in task.choices(row)

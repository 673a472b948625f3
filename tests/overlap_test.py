"""What is tested on is not learned."""

import dataclasses

import pytest
from sources_test import write
from study_test import SETTINGS

from lora_jax import overlap
from lora_jax.data import llava_cot, medmcqa, sources
from lora_jax.errors import UserError
from lora_jax.hub import bases
from lora_jax.task_rows import TaskRows

TASK = medmcqa.TASK


def made(count):
  return list(sources.Synthetic(seed=0, train=count, test=1).rows(TASK)['train'])


def posed(tmp_path, train, test, test_rows=2):
  settings = dataclasses.replace(
    SETTINGS,
    train=dataclasses.replace(SETTINGS.train, eval_rows=2),
    eval=dataclasses.replace(SETTINGS.eval, test_rows=test_rows),
  )
  source = write(tmp_path / 'data', train, test)
  return TaskRows(TASK, source, bases.load('tiny'), settings, tmp_path / 'cache', None)


@pytest.mark.parametrize('test_rows', [1, 0])
def test_rows_of_the_test_split_are_left_out_and_counted(tmp_path, capsys, test_rows):
  rows = made(12)
  # Another id and another answer do not make another question of it.
  test = [rows[10], rows[11], *({**row, 'cop': (row['cop'] + 1) % 4} for row in rows[:3])]
  held = posed(tmp_path, rows[:10], test, test_rows)
  counts = held.counts()
  assert (counts['in_test'], counts['train'], counts['eval'], counts['left_out']) == (3, 5, 2, 0)
  assert (counts['test'], counts['test_of']) == (test_rows or 5, 5)
  assert 'medmcqa: 3 of 10 train rows ask what test rows do' in capsys.readouterr().err
  tokenizer = bases.load('tiny').tokenizer
  said = [tokenizer.decode(row.arrays['tokens'].tolist()) for row in held.train]
  asks = lambda row: any(TASK.prompt(row).text() in one for one in said)
  # The last two of those that are left watch the loss.
  assert [asks(row) for row in rows] == [3 <= i < 8 for i in range(12)]


def test_a_test_file_that_is_the_train_file_is_refused(tmp_path):
  rows = made(6)
  with pytest.raises(UserError, match='medmcqa: all 6 train rows ask what test rows do') as error:
    posed(tmp_path, rows, rows)
  assert '\n' not in str(error.value)


def test_rows_that_share_nothing_are_all_learned_and_nothing_is_said(tmp_path, capsys):
  rows = made(10)
  assert posed(tmp_path, rows[:8], rows[8:]).counts()['in_test'] == 0
  assert capsys.readouterr().err == ''
  assert overlap.apart(TASK, rows[:8], rows[8:]) == rows[:8]


def test_an_image_is_part_of_what_is_asked():
  task = llava_cot.TASK.posed(sees=True)
  assert task is not None
  one, other = llava_cot.TASK.synthetic(0, 2)
  swapped = {**one, 'image': other['image']}
  assert [*overlap.apart(task, [one, swapped, other], [one])] == [swapped, other]
  assert [*overlap.apart(task, [one, swapped, other], [one])[1:]] == [other]
  missing = {**one, 'image': None}
  assert [*overlap.apart(task, [one, missing], [missing])] == [one]

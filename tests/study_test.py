import dataclasses
import json

import pytest

from lora_jax.data import sources, tasks
from lora_jax.errors import UserError
from lora_jax.hub import bases
from lora_jax.presets import PRESETS
from lora_jax.progress import Progress
from lora_jax.records import RunDirectory
from lora_jax.study import Grid, Study
from lora_jax.task_rows import TaskRows

SMOKE = PRESETS['smoke']
SETTINGS = dataclasses.replace(
  SMOKE,
  train=dataclasses.replace(
    SMOKE.train, steps=2, tokens_per_batch=1024, max_length=1024, dtype='float32'
  ),
  eval=dataclasses.replace(SMOKE.eval, test_rows=2),
  latency_turns=1,
)
GRID = Grid(tasks.by_names(['medmcqa']), ('o_proj', 'fc2'), (0,))


def run(out, cache, grid=GRID, settings=SETTINGS, cells=2):
  source = sources.Synthetic(seed=0, train=64, test=2)
  directory = RunDirectory(out)
  directory.lock()
  Study(settings, bases.load('tiny'), source, directory, cache, cells).run(grid)


def records(out):
  files = sorted((out / 'cells').glob('*.json'))
  return {file.name: json.loads(file.read_text()) for file in files}


@pytest.mark.slow
def test_what_was_trained_before_an_interruption_is_not_trained_again(tmp_path, monkeypatch):
  whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
  run(whole, tmp_path / 'cache')

  def interrupted(*arguments, **options):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr('lora_jax.study.score_pack', interrupted)
    with pytest.raises(KeyboardInterrupt):
      run(stopped, tmp_path / 'cache')
  assert [*records(stopped)] == ['medmcqa-base.json']
  with monkeypatch.context() as patch:
    patch.setattr('lora_jax.grid.train_wave', interrupted)
    run(stopped, tmp_path / 'cache')
  one, other = records(whole), records(stopped)
  assert one.keys() == other.keys()
  for name, record in one.items():
    assert record['status'] == other[name]['status'] == 'done'
    assert record['scores']['rows'] == other[name]['scores']['rows']
    assert record.get('train', {}).get('losses') == other[name].get('train', {}).get('losses')
  assert not [*(stopped / 'cells').glob('*.trained')]


@pytest.mark.slow
@pytest.mark.parametrize(('cells', 'stops_in'), [(1, 'cell 2 of 2'), (2, 'cells 1-2 of 2')])
def test_a_wave_that_is_interrupted_is_lost_and_no_other(tmp_path, monkeypatch, cells, stops_in):
  class Interrupted(Progress):
    def advance(self, count=1, **numbers):
      if self._what == f'train medmcqa, {stops_in}':
        raise KeyboardInterrupt
      super().advance(count, **numbers)

  whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
  # How long adapters take is not the question, and takes most of the time.
  monkeypatch.setattr(Study, '_time_targets', lambda study, grid: None)
  with monkeypatch.context() as patch:
    patch.setattr('lora_jax.train.Progress', Interrupted)
    with pytest.raises(KeyboardInterrupt):
      run(stopped, tmp_path / 'cache', cells=cells)
  kept = records(stopped)
  finished = ['medmcqa-base.json', 'medmcqa-o_proj-equal_rank-seed0.json']
  assert [*kept] == finished[: 3 - cells]
  run(stopped, tmp_path / 'cache', cells=cells)
  run(whole, tmp_path / 'cache', cells=cells)
  one, other = records(whole), records(stopped)
  assert one.keys() == other.keys()
  assert len(one) == 3
  for name, record in one.items():
    assert record['scores']['rows'] == other[name]['scores']['rows']
    assert record.get('train', {}).get('losses') == other[name].get('train', {}).get('losses')
    assert kept.get(name, other[name]) == other[name]


def test_rows_too_few_to_watch_a_loss_on_are_told(tmp_path, capsys):
  settings = dataclasses.replace(
    SETTINGS, train=dataclasses.replace(SETTINGS.train, train_rows=6, eval_rows=4)
  )
  source = sources.Synthetic(seed=0, train=6, test=2)
  rows = TaskRows(GRID.tasks[0], source, bases.load('tiny'), settings, tmp_path, None)
  assert (len(rows.train), rows.eval_batches) == (6, [])
  # The task's own limit, where it is less than that of the settings.
  assert rows.counts()['answer_limit'] == GRID.tasks[0].max_new_tokens < 8
  assert 'medmcqa: no validation loss, since 6 rows' in capsys.readouterr().err
  few = dataclasses.replace(settings, train=dataclasses.replace(settings.train, eval_rows=3))
  rows = TaskRows(GRID.tasks[0], source, bases.load('tiny'), few, tmp_path, None)
  assert (len(rows.train), len(rows.eval_batches)) == (3, 1)
  assert capsys.readouterr().err == ''


def test_a_choice_that_is_no_token_is_found_before_anything_is_scored(tmp_path):
  task = dataclasses.replace(GRID.tasks[0], choices=lambda example: ('A', 'none of them'))
  source = sources.Synthetic(seed=0, train=6, test=2)
  with pytest.raises(UserError, match='medmcqa row test-0: a choice is more than one token'):
    TaskRows(task, source, bases.load('tiny'), SETTINGS, tmp_path, None)

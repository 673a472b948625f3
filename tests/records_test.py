"""A record is there whole or not at all, and a directory is one run's."""

import dataclasses
import errno
import fcntl
import json
import os
import pathlib

import pytest

from lora_jax import records
from lora_jax.errors import UserError
from lora_jax.records import Cell, RunDirectory

MADE_FROM = {'rows': '12ab', 'base': '34cd'}
CELL = Cell('tiny', 'medmcqa', 'o_proj,fc2', 'equal_rank', 3)
COMMON = {
  'status': 'needs vision',
  'provenance': MADE_FROM,
  'settings': {},
  'base': {},
  'rows': {},
  'versions': {},
}
SCORES = {
  'headline': 'accuracy',
  'means': {'accuracy': 100.0},
  'rows': [{'id': 'r0', 'accuracy': 1.0}],
  'unfinished': 0,
}
RECORD = {**COMMON, 'status': 'done', 'scores': SCORES}


def files(path):
  return sorted(str(file.relative_to(path)) for file in path.rglob('*') if file.is_file())


def test_json_comes_back_as_it_was(tmp_path):
  value = {'b': [1, 2.5, None], 'a': {'é': 'ž ▲'}}
  records.write_json(tmp_path / 'deep' / 'x.json', value)
  assert records.read_json(tmp_path / 'deep' / 'x.json') == value
  assert files(tmp_path) == ['deep/x.json']


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'x.json'
  records.write_json(path, {'held': 1})

  def full(descriptor):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(UserError, match=r'cannot write .*x\.json: No space left on device'):
    records.write_json(path, {'held': 2})
  assert records.read_json(path) == {'held': 1}
  assert files(tmp_path) == ['x.json']


def test_a_write_that_is_interrupted_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'x.txt'
  records.write_text(path, 'old')

  def interrupt(self, target):
    raise KeyboardInterrupt

  monkeypatch.setattr(pathlib.Path, 'replace', interrupt)
  with pytest.raises(KeyboardInterrupt):
    records.write_text(path, 'new')
  assert path.read_text() == 'old'
  assert files(tmp_path) == ['x.txt']


def test_a_number_that_json_lacks_is_refused_and_nothing_is_written(tmp_path):
  with pytest.raises(ValueError, match='not JSON compliant'):
    records.write_json(tmp_path / 'x.json', {'loss': float('nan')})
  assert files(tmp_path) == []


def test_a_place_that_cannot_be_written_is_a_users_mistake(tmp_path):
  (tmp_path / 'file').write_text('')
  # A path through a file, which not even root can write to.
  run = RunDirectory(tmp_path / 'file' / 'run')
  with pytest.raises(UserError, match=r'cannot write .*; give another --out'):
    run.claim({'rank': 4})
  with pytest.raises(UserError, match=r'cannot write .*; give another --out'):
    RunDirectory(tmp_path / 'file').claim({'rank': 4})
  assert not run.finished(CELL, MADE_FROM)
  assert run.cells() == []


def test_a_directory_is_claimed_by_one_configuration(tmp_path):
  run = RunDirectory(tmp_path)
  run.claim({'rank': 8})
  # Nothing was computed yet, so the mistake can be mended in place.
  run.claim({'rank': 4, 'targets': ('q', 'k')})
  run.write_cell(CELL, RECORD)
  # The same again, as it reads after JSON.
  run.claim({'targets': ['q', 'k'], 'rank': 4})
  with pytest.raises(UserError, match='holds a run with rank=4, not 8'):
    run.claim({'rank': 8, 'targets': ['q', 'k']})
  # Settings that only one side knows: no flag could bring the two together.
  other_version = 'of another version of this project, whose settings differ in {}; give another'
  with pytest.raises(UserError, match=other_version.format('dropout')):
    run.claim({'rank': 8, 'targets': ['q', 'k'], 'dropout': 0.1})
  with pytest.raises(UserError, match=other_version.format('rank')):
    run.claim({'targets': ['q', 'k']})
  run.claim({'rank': 4, 'targets': ['q', 'k']})
  assert files(tmp_path) == ['.lock', f'cells/{CELL.name}.json', 'run.json']


def test_a_file_system_without_locks_can_be_used(tmp_path, monkeypatch):
  def refuse(descriptor, how):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', refuse)
  RunDirectory(tmp_path).claim({'rank': 4})
  assert (tmp_path / 'run.json').exists()


def test_a_directory_in_use_is_refused_until_its_run_ends(tmp_path):
  first = RunDirectory(tmp_path)
  first.claim({'rank': 4})
  with pytest.raises(UserError, match='in use by another run'):
    RunDirectory(tmp_path).claim({'rank': 4})
  del first
  RunDirectory(tmp_path).claim({'rank': 4})


DAMAGED = ['', '{"format": 1', '\x00', '[]', '{"format": 0}', '{}']
DAMAGED += [
  json.dumps({'format': 1, 'cell': {}, **RECORD, **damage})
  for damage in (
    *({'format': 0}, {'provenance': None}, {'scores': None}, {'scores': {}}),
    *({'status': None}, {'status': 'diverged'}, {'train': {}}, {'train': {'losses': [1.0]}}),
    *({'scores': {**SCORES, 'rows': rows}} for rows in ([], [{'id': 'r0'}], [3])),
  )
]


@pytest.mark.parametrize('content', DAMAGED)
def test_a_record_that_is_damaged_or_of_another_format_is_named(tmp_path, content):
  run = RunDirectory(tmp_path)
  run.write_cell(CELL, RECORD)
  run.cell_file(CELL).write_text(content)
  with pytest.raises(UserError, match=r'seed3\.json .*; delete it and run again'):
    run.cells()
  with pytest.raises(UserError, match=r'seed3\.json .*; delete it and run again'):
    run.finished(CELL, MADE_FROM)


@pytest.mark.parametrize('content', ['{', '[]', '{}', '{"about": {}, "sets": {}, "datasets": []}'])
def test_a_damaged_probe_is_named(tmp_path, content):
  run = RunDirectory(tmp_path)
  assert run.probe() is None
  held = {'about': {}, 'versions': {}, 'sets': {}, 'datasets': {}}
  run.write_probe(held)
  assert run.probe() == held
  (tmp_path / 'probe.json').write_text(content)
  with pytest.raises(UserError, match=r'probe\.json .*; delete it and run again'):
    run.probe()


@pytest.mark.parametrize('content', ['{', '[]', '{}', '{"targets": []}'])
def test_damaged_times_are_named(tmp_path, content):
  run = RunDirectory(tmp_path)
  assert run.latency() is None
  run.write_latency({'targets': {}})
  assert run.latency() == {'targets': {}}
  (tmp_path / 'latency.json').write_text(content)
  with pytest.raises(UserError, match=r'latency\.json .*; delete it and run again'):
    run.latency()


@pytest.mark.parametrize('content', ['', '[]', 'null', '{"shared": 3}'])
def test_a_damaged_run_file_is_named(tmp_path, content):
  run = RunDirectory(tmp_path)
  run.write_cell(CELL, RECORD)
  (tmp_path / 'run.json').write_text(content)
  with pytest.raises(UserError, match=r'run\.json'):
    run.claim({'rank': 4})


def test_cells_without_their_settings_are_not_mixed_with_new_ones(tmp_path):
  run = RunDirectory(tmp_path)
  run.claim({'rank': 4})
  run.write_cell(CELL, RECORD)
  (tmp_path / 'run.json').unlink()
  with pytest.raises(UserError, match='does not say under which settings'):
    run.claim({'rank': 8})


def test_bytes_that_are_no_text_are_damage(tmp_path):
  (tmp_path / 'x.json').write_bytes(b'"\xff\xfe"')
  with pytest.raises(UserError, match='not a readable record'):
    records.read_json(tmp_path / 'x.json')


def test_a_cell_is_finished_once_it_has_its_record(tmp_path):
  run = RunDirectory(tmp_path)
  assert not run.finished(CELL, MADE_FROM)
  run.write_cell(CELL, RECORD, [{'id': 'r0', 'prediction': 'ž\n▲'}, {'id': 'r1'}])
  assert run.finished(CELL, {})
  assert not run.finished(dataclasses.replace(CELL, seed=4), {})
  (held,) = run.cells()
  assert held == {'format': 1, 'cell': dataclasses.asdict(CELL), **RECORD}
  lines = run.cell_file(CELL).with_suffix('.predictions.jsonl').read_text('utf-8').splitlines()
  assert json.loads(lines[0]) == {'id': 'r0', 'prediction': 'ž\n▲'}
  assert len(lines) == 2


def test_a_record_is_not_there_before_its_predictions(tmp_path, monkeypatch):
  run = RunDirectory(tmp_path)
  written = []
  write = records.write_text
  monkeypatch.setattr(
    records, 'write_text', lambda path, text: (written.append(path.name), write(path, text))
  )
  run.write_cell(CELL, {}, [{'id': 'r0'}])
  assert written == [f'{CELL.name}.predictions.jsonl', f'{CELL.name}.json']


def test_cells_come_in_one_order_whatever_order_they_were_written_in(tmp_path):
  cells = [dataclasses.replace(CELL, seed=seed) for seed in (2, 0, 1)]
  run = RunDirectory(tmp_path)
  for cell in cells:
    run.write_cell(cell, COMMON, [{'id': 'r0'}])
  assert [record['cell']['seed'] for record in run.cells()] == [0, 1, 2]


def test_different_cells_have_different_files(tmp_path):
  targets = [
    'base', 'all', 'qkv', 'q,kv', 'q_proj', 'q-proj', 'q/proj', 'q.proj', 'q%proj', 'q%2fproj',
    '.*/o_proj', '.*%2fo_proj', '(o|q)_proj', '[oq]_proj', 'o_proj-equal_rank-seed1', 'o_proj',
    'a\x025', 'a%', 'a 14', 'a\u2014', '..', '', ' ',
  ]  # fmt: skip
  cells = [
    Cell('tiny', dataset, target, '' if target == 'base' else arm, seed)
    for dataset in ('medmcqa', 'medreason')
    for target in targets
    for arm in (('',) if target == 'base' else ('equal_rank', 'equal_params'))
    for seed in ((0,) if target == 'base' else (0, 1, 11))
  ]
  run = RunDirectory(tmp_path)
  paths = [run.cell_file(cell) for cell in cells]
  assert len(set(paths)) == len(cells)
  # Each is a plain file of the one folder, whatever a regular expression holds.
  assert {path.parent for path in paths} == {tmp_path / 'cells'}
  assert all('/' not in cell.name and not cell.name.startswith('.') for cell in cells)


def test_a_record_of_other_rows_or_another_base_is_refused(tmp_path):
  run = RunDirectory(tmp_path)
  run.write_cell(CELL, RECORD)
  assert run.finished(CELL, MADE_FROM)
  for what in MADE_FROM:
    with pytest.raises(UserError, match=f'{CELL.name}.*{what}'):
      run.finished(CELL, {**MADE_FROM, what: 'other'})


def test_a_refused_setting_is_named_by_its_path(tmp_path):
  run = RunDirectory(tmp_path)
  run.claim({'settings': {'lora': {'rank': 4, 'alpha': 8}}})
  run.write_cell(CELL, RECORD)
  with pytest.raises(UserError, match=r'settings\.lora\.rank=4, not 16;'):
    run.claim({'settings': {'lora': {'rank': 16, 'alpha': 8}}})


def test_a_very_long_regular_expression_still_names_a_file(tmp_path):
  cells = [
    dataclasses.replace(CELL, targets='|'.join(f'layers/attn/{end}' * 9 for end in ends))
    for ends in ('qkv', 'qko')
  ]
  run = RunDirectory(tmp_path)
  for cell in cells:
    with run.open_metrics(cell):
      run.write_cell(cell, COMMON)
  assert len(run.cells()) == 2

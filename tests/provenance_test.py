"""A record is about the rows that were read, whatever becomes of their files meanwhile."""

import dataclasses
import hashlib
import json

import pytest
from sources_test import ROW, write
from study_test import GRID, SETTINGS, records

from lora_jax import checkpoint
from lora_jax.data import builder, medmcqa, sources
from lora_jax.errors import UserError
from lora_jax.hub import bases
from lora_jax.provenance import once
from lora_jax.records import RunDirectory
from lora_jax.study import Study

TASK = medmcqa.TASK


def add(root, **more):
  with (root / 'medmcqa' / 'train.jsonl').open('a') as file:
    file.write('\n' + json.dumps({**ROW, **more}))


def test_a_source_says_what_its_rows_were_when_it_was_first_asked(tmp_path):
  directory = write(tmp_path / 'data', [ROW])
  asked = once(directory)
  first = asked.fingerprint(TASK), asked.describe(TASK)
  assert first == (directory.fingerprint(TASK), directory.describe(TASK))
  add(tmp_path / 'data')
  assert directory.fingerprint(TASK) != first[0]
  assert (asked.fingerprint(TASK), asked.describe(TASK)) == first
  (tmp_path / 'data').rename(tmp_path / 'moved')
  assert (asked.fingerprint(TASK), asked.describe(TASK), asked.kind) == (*first, 'directory')


def test_rows_that_change_while_they_are_read_are_not_kept(tmp_path):
  class Growing(sources.Directory):
    def rows(self, task):
      found = super().rows(task)
      add(self.path)
      return found

  write(tmp_path / 'data', [ROW])
  asked, cache = once(Growing(tmp_path / 'data')), tmp_path / 'cache'
  with pytest.raises(UserError, match='medmcqa: rows were changed while they were read'):
    builder.prepare(TASK, asked, cache)
  assert not [*cache.iterdir()]


@pytest.mark.slow
def test_a_study_records_the_rows_that_it_read(tmp_path, monkeypatch):
  data, out = tmp_path / 'data', tmp_path / 'out'
  made = list(sources.Synthetic(seed=0, train=40, test=2).rows(TASK)['train'])
  source = write(data, made[2:], made[:2])
  rows = hashlib.sha256(source.fingerprint(TASK).encode()).hexdigest()

  def save(*arguments):
    add(data)
    data.rename(tmp_path / 'moved')
    held(*arguments)

  held = checkpoint.save
  monkeypatch.setattr(checkpoint, 'save', save)
  monkeypatch.setattr(Study, '_time_targets', lambda study, grid: None)
  directory = RunDirectory(out)
  directory.lock()
  settings = dataclasses.replace(
    SETTINGS, train=dataclasses.replace(SETTINGS.train, steps=1, eval_rows=0)
  )
  study = Study(settings, bases.load('tiny'), source, directory, tmp_path / 'cache')
  study.run(dataclasses.replace(GRID, targets=('o_proj',)))
  found = records(out)
  assert len(found) == 2
  for record in found.values():
    assert record['status'] == 'done'
    assert record['provenance']['rows'] == rows
    assert '38 train, 2 test' in record['rows']['description']

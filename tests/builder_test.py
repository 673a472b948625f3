"""Prepared rows come back as they went in, once, and without noise."""

import dataclasses
import json
import pickle
import socket
from typing import Any, ClassVar

import pytest

from lora_jax.data import builder, medmcqa, sources
from lora_jax.data.task import Prompt
from lora_jax.errors import UserError

TASK = dataclasses.replace(
  medmcqa.TASK,
  name='mixed',
  features={'words': 'text', 'n': 'int', 'x': 'float', 'any': 'json', 'image': 'image'},
  required=('words',),
  prompt=lambda example: Prompt(before=example['words']),
  target=lambda example: 'yes',
)
ROWS = [
  {'id': 'a', 'words': 'é \u2028 "q"\0', 'n': -(2**63), 'x': 0.1, 'any': {'k': [1, None, 'ü']}},
  {'id': 'b', 'words': '', 'n': 0, 'x': 1e300, 'any': False, 'image': b'\x00\xff\x00'},
  {'id': 'c', 'words': 'x', 'any': 'text'},
  {'id': 'd', 'words': 'y', 'any': None, 'image': b''},
]


@dataclasses.dataclass(frozen=True)
class Fixed:
  """A source of given rows that counts how often they are read."""

  train: list
  reads: list
  kind: ClassVar[str] = 'fixed'

  def check(self, task):
    pass

  def fingerprint(self, task):
    return repr(self.train)

  def rows(self, task):
    self.reads.append(task.name)
    full = [{**dict.fromkeys(task.features), **row} for row in self.train]
    return {'train': iter(full), 'test': iter(full[:1])}

  def describe(self, task):
    return 'given rows'


def test_every_kind_of_value_survives(tmp_path):
  splits = builder.prepare(TASK, Fixed(ROWS, []), tmp_path)
  expected = [{**dict.fromkeys(TASK.features), **row} for row in ROWS]
  train = splits['train']
  assert [train[index] for index in range(len(train))] == expected
  assert {type(value) for row in train for value in row.values()} <= {
    str, int, float, bytes, bool, dict, type(None)
  }  # fmt: skip
  assert train[-1] == expected[-1]
  assert list(train[1:3]) == expected[1:3]
  assert list(train[1:][:-1]) == expected[1:-1]
  assert repr(train[1:]) != repr(train)
  assert len(splits['test']) == 1
  with pytest.raises(IndexError):
    train[len(ROWS)]


def test_prepared_once_and_again_when_rows_change(tmp_path):
  source = Fixed(ROWS, [])
  first = builder.prepare(TASK, source, tmp_path)
  again = builder.prepare(TASK, source, tmp_path)
  assert len(source.reads) == 1
  assert repr(first['train']) == repr(again['train'])
  changed = Fixed(ROWS[::-1], source.reads)
  assert builder.prepare(TASK, changed, tmp_path)['train'][0]['id'] == 'd'
  assert len(source.reads) == 2


def test_quiet_offline_and_leaving_nothing_behind(tmp_path, monkeypatch, capfd):
  def refuse(*args, **kwargs):
    raise AssertionError('tried the network')

  monkeypatch.setattr(socket.socket, 'connect', refuse)
  monkeypatch.setattr(socket, 'getaddrinfo', refuse)
  builder.prepare(TASK, Fixed(ROWS, []), tmp_path)
  assert capfd.readouterr() == ('', '')
  assert len(list(tmp_path.iterdir())) == 1


def test_interrupted_preparation_is_not_taken_for_whole(tmp_path):
  class Broken(Fixed):
    def rows(self, task):
      def fail():
        yield {**dict.fromkeys(task.features), **ROWS[0]}
        raise KeyboardInterrupt

      return {'train': fail(), 'test': iter([])}

  with pytest.raises(KeyboardInterrupt):
    builder.prepare(TASK, Broken(ROWS, []), tmp_path)
  assert not list(tmp_path.iterdir())
  assert len(builder.prepare(TASK, Fixed(ROWS, []), tmp_path)['train']) == len(ROWS)


def test_a_bad_row_is_named_and_nothing_is_written(tmp_path):
  folder = tmp_path / 'data' / 'medmcqa'
  folder.mkdir(parents=True)
  row = medmcqa.TASK.synthetic(0, 1)[0]
  (folder / 'train.jsonl').write_text(json.dumps(row) + '\n{}\n')
  (folder / 'test.jsonl').write_text(json.dumps(row))
  with pytest.raises(UserError, match=r'train\.jsonl:2'):
    builder.prepare(medmcqa.TASK, sources.Directory(tmp_path / 'data'), tmp_path / 'cache')
  assert not (tmp_path / 'cache').exists()


def test_pickles_and_is_read_by_grain(tmp_path):
  import grain

  splits = builder.prepare(medmcqa.TASK, sources.Synthetic(seed=0, train=20, test=3), tmp_path)
  assert pickle.loads(pickle.dumps(splits['train']))[7] == splits['train'][7]
  dataset: Any = grain.MapDataset.source(splits['train']).shuffle(seed=1)
  ids = [dataset[index]['id'] for index in range(len(dataset))]
  assert sorted(ids) == sorted(f'train-{index}' for index in range(20))
  assert ids != sorted(ids)

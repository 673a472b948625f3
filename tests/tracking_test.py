"""Where metrics go: JSON lines, event files, and calls of Weights & Biases."""

import importlib.machinery
import json
import math
import struct
import sys
import types

import pytest

from lora_jax import tracking
from lora_jax.errors import UserError

ENTRIES = [
  {'step': 1, 'loss': 2.5, 'grad_norm': 0.5},
  {'step': 2, 'loss': float('nan'), 'grad_norm': float('inf')},
  {'step': 2, 'eval_loss': 2.25},
]


def log_all(out, names, config=None):
  with tracking.open_trackers(out, names, 'mine', config or {}) as log:
    for entry in ENTRIES:
      log(entry)


def test_json_lines_are_written_always(tmp_path):
  log_all(tmp_path / 'out', [])
  lines = (tmp_path / 'out' / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    ENTRIES[0],
    {'step': 2, 'loss': None, 'grad_norm': None},
    ENTRIES[2],
  ]


def events(path):
  """(tag, step, value) of each scalar in an event file (TFRecord, its checksums skipped)."""
  from tensorboardX.proto import event_pb2

  content, at = path.read_bytes(), 0
  while at < len(content):
    (length,) = struct.unpack_from('<Q', content, at)
    event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
    at += 12 + length + 4
    for value in event.summary.value:
      yield value.tag, event.step, value.simple_value


def test_event_files_hold_what_was_logged(tmp_path):
  pytest.importorskip('tensorboardX')
  log_all(tmp_path, ['tensorboard'])
  (file,) = (tmp_path / 'tensorboard').iterdir()
  held = list(events(file))
  assert ('train/loss', 1, 2.5) in held
  assert ('train/grad_norm', 1, 0.5) in held
  assert ('eval/loss', 2, 2.25) in held
  assert [math.isnan(value) for tag, step, value in held if (tag, step) == ('train/loss', 2)] == [
    True
  ]
  assert len(held) == 5


class FakeRun:
  """What `wandb.init` gives, as far as it is used."""

  def __init__(self):
    self.logged, self.ended = [], []

  def log(self, data, step):
    self.logged.append((step, data))

  def finish(self, exit_code=None):
    self.ended.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
  """A stand-in: the package itself starts processes and is large."""
  module = types.ModuleType('wandb')
  module.__spec__ = importlib.machinery.ModuleSpec('wandb', None)
  module.run, module.asked = FakeRun(), []
  module.init = lambda **asked: module.asked.append(asked) or module.run
  monkeypatch.setitem(sys.modules, 'wandb', module)
  return module


def test_weights_and_biases_get_the_same(tmp_path, wandb):
  tracking.check_trackers(['wandb'])
  log_all(tmp_path, ['wandb'], {'lora': {'rank': 4}})
  (asked,) = wandb.asked
  assert asked == {'dir': str(tmp_path), 'name': 'mine', 'config': {'lora': {'rank': 4}}}
  steps, logged = zip(*wandb.run.logged, strict=True)
  assert steps == (1, 2, 2)
  assert logged[0] == {'train/loss': 2.5, 'train/grad_norm': 0.5}
  assert logged[2] == {'eval/loss': 2.25}
  assert wandb.run.ended == [None]


def test_a_run_that_fails_is_marked_as_failed(tmp_path, wandb):
  with (
    pytest.raises(RuntimeError),
    tracking.open_trackers(tmp_path, ['wandb'], 'mine', {}),
  ):
    raise RuntimeError
  assert wandb.run.ended == [1]


def test_what_weights_and_biases_refuses_is_one_line(tmp_path, wandb):
  def refuse(**asked):
    raise ValueError('no API key\nconfigured')

  wandb.init = refuse
  with pytest.raises(UserError, match=r'^Weights & Biases: no API key configured; .*WANDB_MODE'):
    log_all(tmp_path, ['wandb'])


def test_a_package_that_does_not_import_is_one_line(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(UserError, match=r'^Weights & Biases: import of wandb'):
    log_all(tmp_path, ['wandb'])


def test_names_and_packages_that_are_missing_are_named(monkeypatch):
  with pytest.raises(UserError, match="unknown tracker 'mlflow'; there are tensorboard, wandb"):
    tracking.check_trackers(['mlflow'])
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  for name, package in tracking.PACKAGES.items():
    with pytest.raises(UserError, match=f'^{name} needs a package: pip install {package}$'):
      tracking.check_trackers([name])


def test_a_place_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'cannot write .*file'):
    log_all(tmp_path / 'file', [])

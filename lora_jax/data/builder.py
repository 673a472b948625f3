"""Rows into ArrayRecord through tensorflow-datasets, and back as plain Python values.

  splits = prepare(medmcqa.TASK, sources.Directory(Path('data')), cache_dir)
  splits['test'][0]['question']

TensorFlow is not needed. A row is written once; later runs, and other processes,
read it at random from disk.
"""

import contextlib
import hashlib
import io
import json
import operator
import pathlib
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import tensorflow_datasets as tfds

from lora_jax.data.sources import SPLITS, Source
from lora_jax.data.task import Task

# Part of every key: raise it when the layout on disk changes.
_VERSION = '1.0.0'
_NAME = 'rows'


def _encode(kind: str, value: Any) -> bytes:
  if kind == 'image':
    return value
  # Numbers as text too: a stored example would hold a float in 32 bits.
  return (value if kind == 'text' else json.dumps(value, ensure_ascii=False)).encode()


def _decode(kind: str, stored: bytes) -> Any:
  if kind == 'image':
    return stored
  return stored.decode() if kind == 'text' else json.loads(stored)


class Examples(Sequence[dict[str, Any]]):
  """One split: a random-access sequence of examples, each with an `id`.

  A row is read and decoded when it is asked for, and a slice reads nothing. Picklable,
  and with a stable `repr`, which grain compares when it restores an iterator.
  """

  def __init__(
    self,
    name: str,
    source: Sequence[Any],
    features: Mapping[str, str],
    rows: range | None = None,
  ):
    self._name = name
    self._source = source
    self._features = dict(features)
    self._rows = range(len(source)) if rows is None else rows

  def __len__(self) -> int:
    return len(self._rows)

  @overload
  def __getitem__(self, index: int) -> dict[str, Any]: ...

  @overload
  def __getitem__(self, index: slice) -> 'Examples': ...

  def __getitem__(self, index: int | slice) -> 'dict[str, Any] | Examples':
    if isinstance(index, slice):
      return Examples(self._name, self._source, self._features, self._rows[index])
    stored = self._source[self._rows[operator.index(index)]]
    return {
      field: _decode(kind, stored[field][0]) if len(stored[field]) else None
      for field, kind in self._features.items()
    }

  def __repr__(self) -> str:
    return f'Examples({self._name}, {self._rows})'


class _Rows(tfds.core.GeneratorBasedBuilder):
  """Writes given rows; each field is a list of no or one value, so that null survives."""

  VERSION = tfds.core.Version(_VERSION)
  name = _NAME
  # Only for checksum files; looking for it imports importlib_resources, which
  # tensorflow-datasets 4.9.10 no longer declares.
  code_path = None

  def __init__(
    self, rows: Mapping[str, Iterable[dict[str, Any]]], features: Mapping[str, str], **kwargs: Any
  ):
    self._rows = rows
    self._kinds = features
    super().__init__(file_format='array_record', **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    # Images stay encoded: tfds.features.Image needs TensorFlow.
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          field: tfds.features.Sequence(tfds.features.Tensor(shape=(), dtype=np.object_))
          for field in self._kinds
        }
      ),
      disable_shuffling=True,  # the order of a file is the order of its split
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(rows) for split, rows in self._rows.items()}

  def _generate_examples(self, rows):
    for index, row in enumerate(rows):
      yield (
        index,
        {
          field: [] if row[field] is None else [_encode(kind, row[field])]
          for field, kind in self._kinds.items()
        },
      )


def prepare(task: Task, source: Source, cache_dir: str | pathlib.Path) -> dict[str, Examples]:
  """Writes the task's rows once and opens them.

  Args:
    task: the dataset.
    source: where its rows come from; `source.check` is called before any writing.
    cache_dir: prepared rows are kept in it, keyed by task and by the source's
      fingerprint, so that edited rows or generators are never read stale.

  Returns:
    'train' and 'test' -> `Examples` in the source's order.

  Raises:
    UserError: as `source.check`.
  """
  features = {**task.features, 'id': 'text'}
  key = hashlib.sha256(
    '\0'.join(
      [
        _VERSION,
        task.name,
        task.hub_id,
        json.dumps([sorted(features.items()), sorted(task.required)]),
        source.kind,
        source.fingerprint(task),
      ]
    ).encode()
  ).hexdigest()[:16]
  name = f'{task.name}-{source.kind}-{key}'
  final = pathlib.Path(cache_dir) / name
  if not final.is_dir():
    source.check(task)
    _write(source.rows(task), features, final)
  opened: Any = tfds.builder_from_directory(str(final / _NAME / _VERSION))
  return {
    split: Examples(f'{name}/{split}', opened.as_data_source(split), features) for split in SPLITS
  }


def _write(
  rows: dict[str, Iterator[dict[str, Any]]], features: Mapping[str, str], final: pathlib.Path
) -> None:
  """Prepares in a folder of its own and renames it, so that no reader sees half a dataset."""
  final.parent.mkdir(parents=True, exist_ok=True)
  temporary = final.with_name(f'.preparing-{uuid.uuid4().hex}')
  try:
    with _quiet():
      _Rows(rows, features, data_dir=str(temporary)).download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
      )
    try:
      temporary.rename(final)
    except OSError:
      if not final.is_dir():  # otherwise another process was first, with the same rows
        raise
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(io.StringIO()):
    yield

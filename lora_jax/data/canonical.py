"""The canonical datasets on the Hugging Face hub: ids, splits, and how rows are laid out.

Needs `pip install -e .[hub]` and the network. Layouts are those of the dataset
cards; the tests run them against a stand-in for the hub, not against the hub itself.

Where a dataset publishes one split, rows are held out by a hash of what makes them
alike (the question, the image, the hearing), so that a row's split never changes and
near-copies stay on one side.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

from lora_jax.data.rows import check_row
from lora_jax.data.task import Task
from lora_jax.errors import UserError, one_line

Rows = Iterable[dict[str, Any]]

_DETAILS_ID = 'gtfintechlab/CoCoHD_hearing_details_cleaned'
_REMEDY = (
  'check the network, log in with `hf auth login`, accept the terms on the dataset page, '
  'or give a directory of rows'
)


@dataclasses.dataclass(frozen=True)
class Hub:
  """Rows from the canonical datasets.

  Attributes:
    load: stands in for `datasets.load_dataset`; None imports it.
    download: stands in for `huggingface_hub.snapshot_download`; None imports it.
  """

  load: Callable[..., Rows] | None = None
  download: Callable[..., str] | None = None
  kind: ClassVar[str] = 'hub'

  def check(self, task: Task) -> None:
    """Raises UserError when the hub libraries are not installed or the task has no layout."""
    if task.name not in _SPLITS:
      raise UserError(f'{task.name} is not on the hub; the hub has {", ".join(_SPLITS)}')
    _library(self)

  def fingerprint(self, task: Task) -> str:
    return hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()

  def rows(self, task: Task) -> dict[str, Iterator[dict[str, Any]]]:
    """Downloads the dataset (into the hub's own cache) and reads it.

    Raises:
      UserError: the hub cannot be reached or refuses, or a row lacks a field.
    """
    self.check(task)
    with _fetching(task):
      splits = _SPLITS[task.name](task.hub_id, *_library(self))
    return {split: _checked(task, split, rows) for split, rows in splits.items()}

  def describe(self, task: Task) -> str:
    return f'hub dataset {task.hub_id}'


def _library(hub: Hub) -> tuple[Callable[..., Rows], Callable[..., str]]:
  if hub.load is not None and hub.download is not None:
    return hub.load, hub.download
  try:
    # An extra that development does without, so the type checker does not find them.
    import datasets  # pyright: ignore[reportMissingImports]
    import huggingface_hub  # pyright: ignore[reportMissingImports]
  except ImportError:
    raise UserError('the hub source needs `pip install -e .[hub]`') from None
  return hub.load or datasets.load_dataset, hub.download or huggingface_hub.snapshot_download


@contextlib.contextmanager
def _fetching(task: Task) -> Iterator[None]:
  """Says in one line what the hub's libraries say in dozens of unrelated types."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    text = f'{task.hub_id} could not be fetched ({one_line(error):.200}); {_REMEDY}'
    raise UserError(text) from error


def _fetched(task: Task, rows: Rows) -> Iterator[dict[str, Any]]:
  # Rows may be read lazily, so the network can fail at any of them.
  with _fetching(task):
    yield from rows


def _checked(task: Task, split: str, rows: Rows) -> Iterator[dict[str, Any]]:
  seen: set[str] = set()
  for index, record in enumerate(_fetched(task, rows)):
    record = {
      field: _image_bytes(value) if task.features.get(field) == 'image' else value
      for field, value in record.items()
    }
    row = check_row(task, record, f'{task.hub_id} {split} row {index}')
    if row['id'] is None or row['id'] in seen:
      row['id'] = f'{split}-{index}'
    seen.add(row['id'])
    yield row


def _image_bytes(value: Any) -> Any:
  """Encoded bytes of an image as the hub library gives it: decoded, or {'bytes', 'path'}."""
  if isinstance(value, dict):
    return value['bytes'] or pathlib.Path(value['path']).read_bytes()
  if hasattr(value, 'save'):
    buffer = io.BytesIO()
    value.save(buffer, format='PNG')
    return buffer.getvalue()
  return value


def _held_out(key: Any, per_thousand: int) -> bool:
  return int(hashlib.sha256(str(key).encode()).hexdigest(), 16) % 1000 < per_thousand


def _by_hash(rows: Callable[[], Rows], key: str, per_thousand: int) -> dict[str, Rows]:
  # Two passes over a lazy reader: full datasets with images do not fit in memory.
  def split(test: bool) -> Rows:
    return (row for row in rows() if _held_out(row[key], per_thousand) is test)

  return {'train': split(False), 'test': split(True)}


def _named(train: str, test: str):
  def splits(hub_id, load, download):
    return {'train': load(hub_id, split=train), 'test': load(hub_id, split=test)}

  return splits


def _medreason(hub_id, load, download):
  rows = load(hub_id, split='train')
  return _by_hash(lambda: rows, 'question', per_thousand=30)


def _cocohd(hub_id, load, download):
  """Transcripts are text files named by govinfo id; their details are another dataset."""
  details = {row['govinfo_id']: row for row in load(_DETAILS_ID, split='train')}
  folder = pathlib.Path(download(hub_id, repo_type='dataset'))
  files = {path.stem: path for path in sorted(folder.rglob('*.txt')) if path.stem in details}
  if not files:
    raise UserError(f'no transcript of {hub_id} is named by a govinfo_id of {_DETAILS_ID}')

  def rows() -> Rows:
    for name, path in files.items():
      transcript = path.read_text(encoding='utf-8', errors='replace')
      yield {'id': name, 'transcript': transcript, 'details': dict(details[name])}

  return _by_hash(rows, 'id', per_thousand=30)


def _llava_cot(hub_id, load, download):
  """`train.jsonl` beside one zip of images cut into parts."""
  patterns = ['train.jsonl', 'image.zip.part-*']
  folder = pathlib.Path(download(hub_id, repo_type='dataset', allow_patterns=patterns))
  parts = sorted(folder.glob('image.zip.part-*'))

  def rows() -> Rows:
    with zipfile.ZipFile(_Joined(parts)) as images, (folder / 'train.jsonl').open('rb') as lines:
      for line in lines:
        row = json.loads(line)
        yield {**row, 'path': row['image'], 'image': images.read(row['image'])}

  return _by_hash(rows, 'path', per_thousand=10)


class _Joined(io.RawIOBase):
  """Files read as one, so that a zip in parts needs no second copy on disk."""

  def __init__(self, paths: list[pathlib.Path]):
    self._files = [path.open('rb') for path in paths]
    self._sizes = [path.stat().st_size for path in paths]
    self._at = 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: sum(self._sizes)}[whence]
    self._at = start + offset
    return self._at

  def readinto(self, buffer) -> int:
    begin = 0
    for file, size in zip(self._files, self._sizes, strict=True):
      if self._at < begin + size:
        file.seek(self._at - begin)
        count = file.readinto(buffer)
        self._at += count
        return count
      begin += size
    return 0

  def close(self) -> None:
    for file in self._files:
      file.close()
    super().close()


_SPLITS: dict[str, Callable[..., dict[str, Rows]]] = {
  'fincot': _named('SFT', 'RL'),
  'govreport': _named('train', 'test'),
  'medmcqa': _named('train', 'validation'),  # the test split has no labels
  'medreason': _medreason,
  'cocohd': _cocohd,
  'llava_cot': _llava_cot,
  'invoice_ocr': _named('train', 'test'),
}

"""Where rows come from: generated, read from a directory, or fetched from the hub.

Every source answers the same four questions, so that nothing behind it knows which
one is in use:

  source.check(task)        raise early what the user must mend
  source.fingerprint(task)  text that changes when the rows would
  source.rows(task)         {'train': iterator, 'test': iterator} of checked rows
  source.describe(task)     a phrase for the report
"""

import dataclasses
import functools
import hashlib
import inspect
import os
import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

from lora_jax.data import images
from lora_jax.data.canonical import Hub as Hub
from lora_jax.data.rows import check_row, parse_line
from lora_jax.data.task import Task
from lora_jax.errors import UserError

SPLITS = ('train', 'test')


class Source(Protocol):
  """What `lora_jax.data.builder` asks of a source of rows."""

  kind: ClassVar[str]

  def check(self, task: Task) -> None: ...

  def fingerprint(self, task: Task) -> str: ...

  def rows(self, task: Task) -> dict[str, Iterator[dict[str, Any]]]: ...

  def describe(self, task: Task) -> str: ...


@dataclasses.dataclass(frozen=True)
class Synthetic:
  """Rows from the task's own generator; no two rows pose the same to the model.

  Attributes:
    seed: seed of the generator.
    train: rows of the train split.
    test: rows of the test split; they do not depend on `train`.
  """

  seed: int
  train: int
  test: int
  kind: ClassVar[str] = 'synthetic'

  def check(self, task: Task) -> None:
    """Raises UserError unless both splits have rows."""
    for split, count in (('train', self.train), ('test', self.test)):
      if count < 1:
        raise UserError(
          f'{task.name}: asked for {count} synthetic {split} rows; ask for at least 1'
        )

  def fingerprint(self, task: Task) -> str:
    return f'{self.seed} {self.train} {self.test} {_code_hash(task)}'

  def rows(self, task: Task) -> dict[str, Iterator[dict[str, Any]]]:
    """Draws one pool of distinct prompts and cuts it, test first."""
    pool: list[dict[str, Any]] = []
    wanted, asked = self.train + self.test, 0
    while len(pool) < wanted:
      asked = 2 * asked or wanted
      before, pool = len(pool), []
      seen: set[str] = set()
      for index, record in enumerate(task.synthetic(self.seed, asked)):
        row = check_row(task, record, f'synthetic {task.name} row {index}')
        posed = _posed(task, row)
        if posed not in seen:
          seen.add(posed)
          pool.append(row)
      if len(pool) < wanted and len(pool) <= before:
        raise UserError(
          f'{task.name}: the generator makes only {len(pool)} different rows; ask for fewer'
        )
    return {
      'train': _with_ids(pool[self.test : wanted], 'train'),
      'test': _with_ids(pool[: self.test], 'test'),
    }

  def describe(self, task: Task) -> str:
    return f'synthetic rows, seed {self.seed}, {self.train} train, {self.test} test'


@dataclasses.dataclass(frozen=True)
class Directory:
  """Rows from `<path>/<task.name>/train.jsonl` and `test.jsonl`, in canonical field names.

  An image field holds a path relative to the dataset's folder.

  Attributes:
    path: the directory that holds one folder a dataset.
  """

  path: pathlib.Path
  kind: ClassVar[str] = 'directory'

  def check(self, task: Task) -> None:
    """Reads and checks every row (images: the head of each; all of it is read when it is seen).

    Raises:
      UserError: a missing directory, folder, file, field or image; a row that is not
        what the task needs, with its file and line; a split without rows.
    """
    self._files(task)
    for split in SPLITS:
      for _ in self._read(task, split, load_images=False):
        pass

  def fingerprint(self, task: Task) -> str:
    digest = hashlib.sha256()
    for path in self._files(task):
      digest.update(path.read_bytes() + b'\0')
    if 'image' in task.features.values():
      folder = self._folder(task)
      for path in sorted(folder.rglob('*')):
        if path.is_file() and path.suffix != '.jsonl':
          # By content: a copy of the folder has other times and the same rows.
          own = hashlib.sha256(path.read_bytes()).hexdigest()
          digest.update(f'{path.relative_to(folder)} {own}\0'.encode())
    return digest.hexdigest()

  def rows(self, task: Task) -> dict[str, Iterator[dict[str, Any]]]:
    return {split: self._read(task, split, load_images=True) for split in SPLITS}

  def describe(self, task: Task) -> str:
    counts = []
    for split, path in zip(SPLITS, self._files(task), strict=True):
      with path.open('rb') as lines:
        counts.append(f'{sum(1 for line in lines if line.strip())} {split}')
    return f'directory {self._folder(task)}, {", ".join(counts)}'

  def _folder(self, task: Task) -> pathlib.Path:
    return self.path / task.name

  def _files(self, task: Task) -> list[pathlib.Path]:
    root, folder = self.path, self._folder(task)
    if not root.is_dir():
      raise UserError(
        f'no directory {root}; give one that holds {task.name}/train.jsonl and test.jsonl'
      )
    if not folder.is_dir():
      raise UserError(f'no folder {folder}; {task.name} needs train.jsonl and test.jsonl in it')
    files = [folder / f'{split}.jsonl' for split in SPLITS]
    for path in files:
      if not path.is_file():
        raise UserError(f'no file {path}; {task.name} needs train.jsonl and test.jsonl')
    return files

  def _read(self, task: Task, split: str, load_images: bool) -> Iterator[dict[str, Any]]:
    path = self._folder(task) / f'{split}.jsonl'
    first_line: dict[str, int] = {}
    with path.open('rb') as lines:
      for number, line in enumerate(lines, start=1):
        if not line.strip():
          continue
        where = f'{path}:{number}'
        record = parse_line(line, where)
        record = self._with_images(task, record, where, load_images)
        row = check_row(task, record, where)
        row['id'] = row['id'] or f'{split}-{len(first_line)}'
        if row['id'] in first_line:
          raise UserError(
            f'{where}: id {row["id"]!r} was used on line {first_line[row["id"]]}; ids must differ'
          )
        first_line[row['id']] = number
        yield row
    if not first_line:
      raise UserError(f'{path} has no rows; {task.name} needs at least one')

  def _with_images(self, task: Task, record: Any, where: str, load: bool) -> Any:
    fields = [field for field, kind in task.features.items() if kind == 'image']
    if not fields or not isinstance(record, dict):
      return record
    record = dict(record)
    for field in fields:
      name = record.get(field)
      if name is None:
        continue
      if not isinstance(name, str):
        raise UserError(f'{where}: field {field!r} must be the path of an image file')
      folder = self._folder(task)
      path = folder / name
      # By name alone: what a link inside the folder points to is its owner's choice.
      if pathlib.Path(name).is_absolute() or os.path.normpath(name).startswith('..'):
        raise UserError(f'{where}: field {field!r} names {name}, which is not under {folder}')
      if not path.is_file():
        raise UserError(f'{where}: field {field!r} names {path}, which is not there')
      data = path.read_bytes()
      if not load:
        images.size(data, where)
      record[field] = data if load else b''
    return record


def _posed(task: Task, row: dict[str, Any]) -> str:
  """All that the model is shown of a row."""
  text = task.prompt(row).text()
  return text + repr(row['image']) if task.needs_vision else text


def _with_ids(rows: list[dict[str, Any]], split: str) -> Iterator[dict[str, Any]]:
  # A pool is cut after it was drawn, so a generator's own ids cannot name the split.
  for index, row in enumerate(rows):
    yield {**row, 'id': f'{split}-{index}'}


@functools.cache
def _package_hash() -> str:
  digest = hashlib.sha256()
  for path in sorted(pathlib.Path(__file__).parent.glob('*.py')):
    digest.update(path.read_bytes())
  return digest.hexdigest()


def _code_hash(task: Task) -> str:
  # Generators share tables between modules: any edit here regenerates, which is cheap.
  own = pathlib.Path(inspect.getfile(inspect.unwrap(task.synthetic))).read_bytes()
  return _package_hash() + hashlib.sha256(own).hexdigest()

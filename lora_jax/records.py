"""Results on disk: a JSON file for each finished cell of the grid.

    OUT/run.json                   what all cells share
    OUT/cells/<name>.json          one record, with one score a test row
    OUT/cells/<name>.predictions.jsonl   what the model said
    OUT/latency.json               times of the target sets, a row at a time
    OUT/batches.json               the same in batches (experiments.latency)
    OUT/probe.json                 what a probe foretells of them (experiments.probe)
    OUT/rates/<name>.json          learning rates that were tried for a target set

A file appears whole or not at all, so what exists is finished and is never redone.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
import urllib.parse
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from lora_jax.errors import UserError

FORMAT = 1

# What file systems over a network say that have no locks; there, take turns yourself.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)

# File systems allow 255 bytes; dataset, arm, seed and suffix need theirs.
_LONGEST_NAME = 120


@dataclasses.dataclass(frozen=True)
class Cell:
  """A point of the grid.

  Attributes:
    base: name of the base.
    dataset: name of the task.
    targets: comma-joined targets, or 'base' for the base as it is.
    arm: 'equal_rank' or 'equal_parameters'; '' for the base.
    seed: of the run; the base's is 0.
  """

  base: str
  dataset: str
  targets: str
  arm: str
  seed: int

  @property
  def name(self) -> str:
    """The file name, without suffix; readable, and different for different cells."""
    if self.targets == 'base':
      return f'{self.dataset}-base'
    # A regular expression may hold anything; escaped, two never fall on one name.
    safe = urllib.parse.quote(self.targets, safe=',+')
    if len(safe) > _LONGEST_NAME:
      safe = f'{safe[:_LONGEST_NAME]}-{hashlib.sha256(self.targets.encode()).hexdigest()[:8]}'
    return f'{self.dataset}-{safe}-{self.arm}-seed{self.seed}'


def write_json(path: Path, value: Any) -> None:
  """Writes JSON so that `path` is either the old file or the whole new one.

  Raises:
    UserError: the file cannot be written.
  """
  write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + '\n')


def write_text(path: Path, text: str) -> None:
  """Writes text as `write_json` does."""
  write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
  """Writes bytes as `write_json` does."""
  with new_file(path) as file:
    file.write(content)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
  """A file to fill, which is at `path` whole after the block; till then the old one is.

  Raises:
    UserError: the file cannot be written.
  """
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open('wb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
  except OSError as error:
    raise UserError(f'cannot write {path}: {error.strerror}; give another --out') from error
  finally:
    # Where the place itself is at fault, this fails as the write did.
    with contextlib.suppress(OSError):
      temporary.unlink()


def check_new(path: Path) -> None:
  """Raises `UserError` where something is already, or nothing can be written."""
  if path.exists():
    raise UserError(f'{path} is there already; give another --out or delete it')
  check_room(path)


def check_room(path: Path) -> None:
  """Raises `UserError` where a directory cannot be made or written to; writes nothing itself."""
  there = next(one for one in (path, *path.absolute().parents) if os.path.lexists(one))
  if not there.is_dir():
    raise UserError(f'cannot write {path}: {there} is no directory; give another --out')
  if not os.access(there, os.W_OK | os.X_OK):
    raise UserError(f'cannot write {path}: {there} is not yours to write; give another --out')


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
  """A directory to fill, which is `path` whole after the block, or never.

  Raises:
    UserError: `path` is there already, or cannot be written.
  """
  check_new(path)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    temporary.mkdir(parents=True)
    yield temporary
    temporary.rename(path)
  except OSError as error:
    raise UserError(f'cannot write {path}: {error.strerror}; give another --out') from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: Path) -> Any:
  """Reads a file of this module's.

  Raises:
    UserError: it is not JSON.
  """
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise UserError(f'{path} is not a readable record; delete it and run again') from error


def read_record(path: Path) -> dict[str, Any]:
  """Reads a cell's record, which holds all that readers of records count on.

  Raises:
    UserError: it does not.
  """
  record = read_json(path)
  try:
    sound = record['format'] == FORMAT and _holds_all(record)
  except (TypeError, KeyError, AttributeError):
    sound = False
  if not sound:
    raise UserError(f'{path} is not a record of format {FORMAT}; delete it and run again')
  return record


def _holds_all(record: Mapping[str, Any]) -> bool:
  parts = ('cell', 'settings', 'base', 'provenance', 'rows', 'versions')
  if not all(isinstance(record[part], dict) for part in parts):
    return False
  if record['status'] == 'diverged':
    return isinstance(record['why'], str)
  if record['status'] != 'done':
    return record['status'] == 'needs vision'
  if 'train' in record and not (record['train']['losses'] and record['lora']['modules']):
    return False
  scores = record['scores']
  needed = {'id', scores['headline']}
  rows = scores['rows']
  return (
    bool(rows) and all(needed <= {*row} for row in rows) and {'means', 'unfinished'} <= {*scores}
  )


class RunDirectory:
  """The records of one run."""

  def __init__(self, path: Path):
    """Points to a directory, which need not exist."""
    self.path = path
    self._locked = False

  def claim(self, shared: Mapping[str, Any]) -> None:
    """Makes the directory this run's, or checks that it already is.

    No other can claim it while this object lives.

    Args:
      shared: the configuration that all cells share. Datasets, targets and seeds are
        not part of it: a later call may add more of them.

    Raises:
      UserError: the directory holds a run with another configuration or of another
        version, is in use, or cannot be written to.
    """
    from flax.traverse_util import flatten_dict  # readers of records do without

    self.lock()
    file = self.path / 'run.json'
    shared = json.loads(json.dumps(shared))
    # A run that ended before its first cell has nothing that other settings could spoil.
    if any((self.path / 'cells').glob('*.json')):
      try:
        record = read_json(file)
      except UserError:
        record = None
      held = record.get('shared') if isinstance(record, dict) else None
      if not isinstance(held, dict):
        raise UserError(
          f'{file} does not say under which settings the cells beside it ran; give another --out'
        )
      old, new = flatten_dict(held, sep='.'), flatten_dict(shared, sep='.')
      differing = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
      unknown = [key for key in differing if key not in old or key not in new]
      if unknown:
        raise UserError(
          f'{self.path} holds a run with other flags or of another version of this project, whose '
          f'settings differ in {unknown[0]}; give another --out'
        )
      if differing:
        key = differing[0]
        raise UserError(
          f'{self.path} holds a run with {key}={old.get(key)!r}, not {new.get(key)!r}; '
          'give another --out or the same settings'
        )
    write_json(file, {'format': FORMAT, 'shared': shared})

  def lock(self) -> None:
    """Makes the directory and keeps it for this process while this object lives.

    Raises:
      UserError: another process has it, or it cannot be written to.
    """
    if self._locked:
      return
    file = self.path / '.lock'
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
      # Open for as long as this object lives: closing gives the lock back.
      weakref.finalize(self, os.close, descriptor)
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      self._locked = True
    except BlockingIOError:
      raise UserError(
        f'{self.path} is in use by another run; wait for it or give another --out'
      ) from None
    except OSError as error:
      if error.errno in _NO_LOCKS:
        return
      raise UserError(f'cannot write {file}: {error.strerror}; give another --out') from error

  def cell_file(self, cell: Cell) -> Path:
    """Where the cell's record is, or would be."""
    return self.path / 'cells' / f'{cell.name}.json'

  def finished(self, cell: Cell, provenance: Mapping[str, str]) -> bool:
    """Whether the cell has a record.

    Args:
      cell: the cell.
      provenance: what the record must have been made from, as `write_cell` was given
        it: scores of other rows or of another base must not stand beside new ones.

    Raises:
      UserError: there is a record, made from something else.
    """
    file = self.cell_file(cell)
    if not file.exists():
      return False
    held = read_record(file)['provenance']
    for what, value in provenance.items():
      if held.get(what) != value:
        raise UserError(
          f'{file} was made from other {what} than there are now; give another --out or delete it'
        )
    return True

  def open_metrics(self, cell: Cell) -> TextIO:
    """Opens the file that a cell's metrics go to while it trains, emptied."""
    file = self.cell_file(cell).with_suffix('.metrics.jsonl')
    try:
      file.parent.mkdir(parents=True, exist_ok=True)
      return file.open('w', encoding='utf-8')
    except OSError as error:
      raise UserError(f'cannot write {file}: {error.strerror}; give another --out') from error

  def write_cell(
    self, cell: Cell, record: Mapping[str, Any], predictions: Iterable[Mapping[str, Any]] = ()
  ) -> None:
    """Writes a cell's record; its predictions first, so that the record marks the end."""
    lines = [json.dumps(prediction, ensure_ascii=False) for prediction in predictions]
    if lines:
      write_text(self.cell_file(cell).with_suffix('.predictions.jsonl'), '\n'.join(lines) + '\n')
    held = {'format': FORMAT, 'cell': dataclasses.asdict(cell), **record}
    write_json(self.cell_file(cell), held)

  def cells(self) -> list[dict[str, Any]]:
    """All records, ordered by file name.

    Raises:
      UserError: a record was written by another version, or is damaged.
    """
    return [read_record(path) for path in sorted((self.path / 'cells').glob('*.json'))]

  def latency(self) -> dict[str, Any] | None:
    """What `write_latency` wrote, or None.

    Raises:
      UserError: the file is damaged.
    """
    return self._read('latency.json', 'times', {'targets': dict}, {'arms': dict})

  def write_latency(self, times: Mapping[str, Any]) -> None:
    """Writes times of target sets: {'targets': name -> times, 'device', 'dtype'}.

    Of other arms than that of equal rank, too: 'arms': arm -> name -> times. Of a CPU, also
    which: 'processor'.
    """
    write_json(self.path / 'latency.json', times)

  def batches(self) -> dict[str, Any] | None:
    """What `write_batches` wrote, or None; raises as `latency` does."""
    return self._read('batches.json', 'times', {'about': dict, 'batches': list})

  def write_batches(self, about: Mapping[str, Any], batches: Sequence[Mapping[str, Any]]) -> None:
    """Writes times of batches.

    Args:
      about: what all share: base, arithmetic, adapters, prompt, device.
      batches: {'rows', 'adapters', 'times': name -> times} of each.
    """
    write_json(self.path / 'batches.json', {'about': about, 'batches': list(batches)})

  def probe(self) -> dict[str, Any] | None:
    """What `write_probe` wrote, or None; raises as `latency` does."""
    return self._read('probe.json', 'a probe', {'about': dict, 'sets': dict, 'datasets': dict})

  def write_probe(self, held: Mapping[str, Any]) -> None:
    """Writes what a probe measured: {'about', 'versions', 'sets', 'datasets'}."""
    write_json(self.path / 'probe.json', held)

  def _read(
    self, name: str, what: str, parts: Mapping[str, type], more: Mapping[str, type] | None = None
  ) -> dict[str, Any] | None:
    """A file that has `parts` of these kinds, and may have `more`."""
    file = self.path / name
    if not file.exists():
      return None
    held = read_json(file)
    wanted = {**(more or {}), **parts}
    found = {key: kind() for key, kind in (more or {}).items()}
    found |= held if isinstance(held, dict) else {}
    if not all(isinstance(found.get(key), kind) for key, kind in wanted.items()):
      raise UserError(f'{file} is not a record of {what}; delete it and run again')
    return held

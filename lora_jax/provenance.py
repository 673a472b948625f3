"""What a study's records say of the rows, the base and the software that they came from.

  source = once(sources.Directory(path))      # asked before its rows are read, and never again
  Provenance(base, source).made_from(task)    # {'rows': hash, 'base': hash}

Files may be added to, edited or moved while a long run trains: its records are about the
rows that it has read.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from lora_jax.data.sources import Source
from lora_jax.data.task import Task
from lora_jax.errors import UserError
from lora_jax.hub.base import Base
from lora_jax.versions import versions


def once(source: Source) -> Source:
  """A source that says what its rows are when it is first asked, and the same from then on."""

  class Once(_Once):
    # A source's kind is its class's.
    kind: ClassVar[str] = source.kind

  return Once(source)


class _Once:
  """See `once`; all of a source but its kind."""

  def __init__(self, source: Source):
    """Reads nothing yet."""
    self._source = source
    self._said: dict[str, tuple[str, str]] = {}

  def check(self, task: Task) -> None:
    """As the source does."""
    self._source.check(task)

  def fingerprint(self, task: Task) -> str:
    return self._first(task)[0]

  def describe(self, task: Task) -> str:
    return self._first(task)[1]

  def rows(self, task: Task) -> dict[str, Iterator[dict[str, Any]]]:
    """The source's.

    Raises:
      UserError: as the source does; at their end, where they are others by then.
    """
    fingerprint = self.fingerprint(task)

    def checked(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
      yield from rows
      if self._source.fingerprint(task) != fingerprint:
        raise UserError(f'{task.name}: rows were changed while they were read; run again')

    return {split: checked(rows) for split, rows in self._source.rows(task).items()}

  def _first(self, task: Task) -> tuple[str, str]:
    if task.name not in self._said:
      self._said[task.name] = self._source.fingerprint(task), self._source.describe(task)
    return self._said[task.name]


class Provenance:
  """Where the scores of one base on one source's rows come from."""

  def __init__(self, base: Base, source: Source):
    """Takes the versions, which what is installed or checked out may no longer be at the end."""
    self._base, self._source, self._versions = base, source, versions()

  def made_from(self, task: Task) -> dict[str, str]:
    """What a task's scores depend on beside the settings, in short."""
    rows = hashlib.sha256(self._source.fingerprint(task).encode()).hexdigest()
    return {'rows': rows, 'base': self._base.record['sha256']}

  def record(self, task: Task, note: str, counts: Mapping[str, int]) -> dict[str, Any]:
    """The part of a task's records that says so.

    Args:
      task: the dataset.
      note: how it is posed.
      counts: how many rows there are, of `TaskRows`; may be empty.
    """
    return {
      'base': self._base.record,
      'provenance': self.made_from(task),
      'rows': {
        'source': self._source.kind,
        'title': task.title,
        'description': self._source.describe(task),
        'note': note,
        **counts,
      },
      'versions': self._versions,
    }

"""What a study's records say of the rows, the base and the software that they came from."""

import hashlib
from collections.abc import Mapping
from typing import Any

from lora_jax.data.sources import Source
from lora_jax.data.task import Task
from lora_jax.hub.base import Base
from lora_jax.records import versions


class Provenance:
  """Where the scores of one base on one source's rows come from."""

  def __init__(self, base: Base, source: Source):
    """Reads nothing yet."""
    self._base, self._source = base, source

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
      'versions': versions(),
    }

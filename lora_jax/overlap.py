"""Rows to learn that are test rows too: left out of training, or a test would be of memory.

  learned = apart(task, splits['train'], splits['test'])

Generated rows and those of a user's own file have none; files of a dataset and the splits of
a hub may.
"""

import hashlib
from collections.abc import Sequence
from typing import overload

from lora_jax.data.task import Example, Task


def apart(task: Task, train: Sequence[Example], test: Sequence[Example]) -> Sequence[Example]:
  """The rows of `train` that ask what no row of `test` does, whatever their answers are.

  Args:
    task: posed as the base can take it; see `Task.posed`.
    train: rows to learn.
    test: all of the split, scored or not: what is learned does not depend on how many are.
  """
  asked = {_asked(task, row) for row in test}
  kept = [i for i, row in enumerate(train) if _asked(task, row) not in asked]
  return train if len(kept) == len(train) else _Chosen(train, kept)


def _asked(task: Task, row: Example) -> bytes:
  """All that the model is shown before its answer, in short."""
  prompt = task.prompt(row)
  turns = [(turn['role'], turn['content']) for turn in prompt.history]
  images = [image and hashlib.sha256(image).digest() for image in prompt.images]
  return hashlib.sha256(repr([prompt.system, turns, prompt.text(), images]).encode()).digest()


class _Chosen(Sequence[Example]):
  """Some rows of a split, each read when it is asked for."""

  def __init__(self, rows: Sequence[Example], chosen: Sequence[int]):
    self._rows, self._chosen = rows, chosen

  def __len__(self) -> int:
    return len(self._chosen)

  @overload
  def __getitem__(self, index: int) -> Example: ...

  @overload
  def __getitem__(self, index: slice) -> Sequence[Example]: ...

  def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
    if isinstance(index, slice):
      return _Chosen(self._rows, self._chosen[index])
    return self._rows[self._chosen[index]]

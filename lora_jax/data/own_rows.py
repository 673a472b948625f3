"""A user's own file as a dataset of the study: its rows checked and split, and the task they are.

  rows = read(Path('my.jsonl'))
  task = make(rows, 'exact_match')
  Study(settings, base, rows, run, cache_dir).run(Grid((task,), targets, seeds))

`OwnRows` answers what is asked of a source; see `lora_jax.data.sources`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lora_jax.data import messages, own_task
from lora_jax.data.messages import Conversation
from lora_jax.data.task import Task
from lora_jax.errors import UserError

# Share of the prompts that are held out to test on, where no file of such rows is given.
_TEST_SHARE = 0.2
# Of fewer test rows next to nothing can be told, and of fewer train rows nothing learned.
_FEWEST = 8
# What still are few short answers.
_MOST_CHOICES, _LONGEST_CHOICE = 20, 40


@dataclasses.dataclass(frozen=True)
class OwnRows:
  """Rows of a user's file, as a source.

  Attributes:
    path: the file.
    test_path: that of the test rows, or None: they are held out of the first.
    train: rows to learn.
    test: rows to score; none asks what another row does.
  """

  path: Path
  test_path: Path | None
  train: Sequence[Conversation]
  test: Sequence[Conversation]
  kind: ClassVar[str] = 'file'

  def check(self, task: Task) -> None:
    """Nothing is left to check: `read` and `make` have."""

  def fingerprint(self, task: Task) -> str:
    held = {split: [*rows] for split, rows in self.rows(task).items()}
    text = json.dumps([held, task.note], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

  def rows(self, task: Task) -> dict[str, Iterator[dict[str, Any]]]:
    return {
      'train': map(own_task.example, self.train),
      'test': map(own_task.example, self.test),
    }

  def describe(self, task: Task) -> str:
    if self.test_path is None:
      how = f'held out of {self.path.name} by a hash of the prompt'
    else:
      how = f'of {self.test_path.name}'
    return f'{self.path.name}, {len(self.train)} train; {len(self.test)} test, {how}'


def read(path: Path, test_path: Path | None = None) -> OwnRows:
  """Reads, checks and splits.

  Whether a row is held out depends on its prompt alone: it stays on its side whatever rows
  are added.

  Raises:
    UserError: a file is not there, a line is no conversation, an id or a prompt is there
      twice, or there are too few rows; with file and line.
  """
  rows = messages.read(path)
  tested = [] if test_path is None else messages.read(test_path)
  for of_file in (rows, tested):
    _check_ids(of_file)
  _check_prompts([*rows, *tested])
  if test_path is None:
    tested = [row for row in rows if _held_out(row)]
    rows = [row for row in rows if not _held_out(row)]
    if min(len(rows), len(tested)) < _FEWEST:
      raise UserError(
        f'{path}: {len(rows) + len(tested)} rows are too few for {_FEWEST} to learn and {_FEWEST} '
        'to test; give more, or the latter by --test_data=FILE'
      )
  for file, held in ((path, rows), (test_path, tested)):
    if len(held) < _FEWEST:
      raise UserError(f'{file}: give at least {_FEWEST} rows, there are {len(held)}')
  return OwnRows(path, test_path, rows, tested)


def make(rows: OwnRows, metric: str, choices: Sequence[str] = ()) -> Task:
  """The task of predicting the last answers, named as the file is.

  Args:
    rows: from `read`.
    metric: a name of `own_task.METRICS`.
    choices: for 'choice': what to choose from; none: the answers that there are, where
      a row has no choices itself.

  Raises:
    UserError: an answer that the metric cannot compare with; with file and line.
  """
  conversations = [*rows.train, *rows.test]
  if metric == 'choice' and not choices:
    choices = _answers(rows.path, [row for row in conversations if not row.choices])
  task = own_task.make(conversations, metric, choices)
  among = f' among {", ".join(choices)}' if metric == 'choice' and choices else ''
  note = f'The last answer of each row is predicted and compared by {metric}{among}.'
  return dataclasses.replace(task, title=rows.path.stem, note=note)


def _answers(path: Path, rows: Sequence[Conversation]) -> tuple[str, ...]:
  instead = 'give each row its "choices", or --metric=exact'
  for row in rows:
    if len(row.answer.strip()) > _LONGEST_CHOICE:
      raise UserError(
        f'{row.where}: the answer is longer than {_LONGEST_CHOICE} characters, and --metric=choice '
        f'compares short ones; {instead}'
      )
  found = sorted({row.answer.strip() for row in rows})
  if len(found) > _MOST_CHOICES:
    raise UserError(
      f'{path}: {len(found)} different answers, and --metric=choice compares at most '
      f'{_MOST_CHOICES}; {instead}'
    )
  return tuple(found)


def _check_ids(rows: Sequence[Conversation]) -> None:
  held: dict[str, Conversation] = {}
  for row in rows:
    if row.id in held:
      raise UserError(
        f'{row.where}: id {row.id!r} is that of {held[row.id].where} too; ids must differ'
      )
    held[row.id] = row


def _check_prompts(rows: Sequence[Conversation]) -> None:
  held: dict[str, Conversation] = {}
  twice = [(row, held.setdefault(_asked(row), row)) for row in rows]
  twice = [(row, first) for row, first in twice if row is not first]
  if twice:
    row, first = twice[0]
    more = f'; so do {len(twice) - 1} rows more' if len(twice) > 1 else ''
    raise UserError(
      f'{row.where}: asks the same as {first.where}, and would count twice or be learned before it '
      f'is tested; leave one out{more}'
    )


def _asked(row: Conversation) -> str:
  """All that comes before the answer, spaces aside."""
  turns = [(turn['role'], ' '.join(turn['content'].split())) for turn in row.messages[:-1]]
  return json.dumps(turns, ensure_ascii=False)


def _held_out(row: Conversation) -> bool:
  digest = hashlib.sha256(_asked(row).encode()).digest()
  return int.from_bytes(digest[:8], 'big') < _TEST_SHARE * 2**64

"""A dataset's rows made ready for one base: read, encoded, split and shaped.

    rows = TaskRows(task, source, base, settings, cache_dir, sight)
    rows.look()              # where there are images, a tower looks at all of them
    for batch in training_batches(rows.train, rows.shape, seed, rows.features): ...
    scores = score_task(model, params, rows.questions, batch_rows=16)

All that is wrong with them is found here, before anything is trained.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_jax import overlap
from lora_jax.data import builder
from lora_jax.data.encode import budget, encode_prompt, pictures
from lora_jax.data.features import FeatureFiles
from lora_jax.data.pipeline import Batch, batch_shape, encode_split, evaluation_batches
from lora_jax.data.sources import Source
from lora_jax.data.task import Example, Task
from lora_jax.errors import UserError
from lora_jax.evaluate import Questions
from lora_jax.hub.base import Base
from lora_jax.presets import Settings
from lora_jax.sight import Sight


class TaskRows:
  """A dataset's rows made ready for one base.

  Attributes:
    task: the dataset.
    sight: what its images are seen with, or None where it is posed without.
    questions: the test rows.
    train: rows to learn.
    shape: of their batches.
  """

  def __init__(
    self,
    task: Task,
    source: Source,
    base: Base,
    settings: Settings,
    cache_dir: Path,
    sight: Sight | None,
  ):
    self.task, config = task, settings.train
    self.sight = sight if task.by_image else None
    self._posed = posed = task.posed(sees=sight is not None) or task
    eyes = self.sight and self.sight.eyes
    splits = builder.prepare(task, source, cache_dir)
    max_length = min(config.max_length, base.config.max_length)
    limits = budget(task, max_length, settings.eval.max_new_tokens)
    test = splits['test'][: settings.eval.test_rows or None]
    prompt = lambda example: encode_prompt(posed, example, base.tokenizer, limits.prompt, eyes)
    self.questions = Questions(
      posed,
      test,
      [prompt(example) for example in test],
      base.tokenizer,
      limits.completion,
      eyes=eyes,
      pictures=[pictures(posed, example, eyes) for example in test],
      features=self.features,
    )
    given = splits['train'][: config.train_rows or None]
    self._examples = examples = _apart(posed, given, splits['test'])
    encoded = encode_split(posed, examples, base.tokenizer, limits, eyes)
    # The last rows watch the loss; too few rows to share all train.
    kept_out = config.eval_rows if len(encoded) >= 2 * config.eval_rows else 0
    if kept_out < config.eval_rows:
      print(
        f'{task.name}: no validation loss, since {len(encoded)} rows are too few to take '
        f'{config.eval_rows} of them for it; lower --eval_rows',
        file=sys.stderr,
      )
    self.train = encoded[: len(encoded) - kept_out]
    self._watched = watched = encoded[len(encoded) - kept_out :]
    if not self.train:
      smaller = 'lower --image_edge or ' if eyes else ''
      raise UserError(
        f'{task.name}: no train row fits in {max_length} tokens; {smaller}raise --max_length'
      )
    self.shape = batch_shape(encoded, config.tokens_per_batch)
    self._counts = {
      'train': len(self.train),
      'eval': len(watched),
      'test': len(test),
      'test_of': len(splits['test']),
      'left_out': len(examples) - len(encoded),
      'in_test': len(given) - len(examples),
      'cut_completions': sum(row.cut for row in encoded),
      'batch_rows': self.shape.rows,
      'row_length': self.shape.length,
      'shared_prefix': len(self.shape.prefix),
      'prompt_limit': limits.prompt,
      'answer_limit': limits.completion,
    }
    if self._counts['cut_completions'] > len(encoded) / 2:
      print(
        f'{task.name}: {self._counts["cut_completions"]} of {len(encoded)} answers to learn are '
        f'longer than {limits.completion} tokens and are cut; raise --max_new_tokens',
        file=sys.stderr,
      )

  @property
  def features(self) -> FeatureFiles | None:
    """Of the images, where the task is posed by image."""
    return None if self.sight is None else self.sight.files

  def look(self) -> None:
    """Looks at all images; batches and scores can be made after it."""
    if self.sight is None:
      return
    learned = [picture for row in [*self.train, *self._watched] for picture in row.pictures]
    self.sight.look(self._posed, self._examples, learned)
    asked = [picture for of_row in self.questions.pictures for picture in of_row]
    self.sight.look(self._posed, self.questions.examples, asked)

  @functools.cached_property
  def eval_batches(self) -> list[Batch]:
    """Rows kept out of training, to watch the loss on."""
    if not self._watched:
      return []
    return evaluation_batches(self._watched, self.shape, self.features)

  def counts(self) -> dict[str, int]:
    """For the record: how many rows, and in what shape."""
    return self._counts


def _apart(task: Task, train: Sequence[Example], test: Sequence[Example]) -> Sequence[Example]:
  """Those of the rows to learn that the test split does not ask, too; how many it does is said."""
  learned = overlap.apart(task, train, test)
  asked = len(train) - len(learned)
  if not learned:
    raise UserError(
      f'{task.name}: all {asked} train rows ask what test rows do, so none is left to train on; '
      'give other rows'
    )
  if asked:
    print(
      f'{task.name}: {asked} of {len(train)} train rows ask what test rows do and are left out '
      'of training',
      file=sys.stderr,
    )
  return learned

"""Scores a model on a task's test rows: generation, or the likelihood of choices.

Adapters stay unmerged: `params` may hold `LoraKernel` leaves.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import choices, packs
from lora_jax.data.eyes import Eyes, Picture
from lora_jax.data.features import FeatureFiles
from lora_jax.data.task import Example, Task
from lora_jax.errors import UserError
from lora_jax.generate import generate, generate_pack
from lora_jax.hub.tokenizer import ChatTokenizer
from lora_jax.progress import Progress
from lora_jax.transformer import Transformer
from lora_jax.vision import Features

# Padded prompt lengths are multiples of these, the finer one up to twice itself, so that
# a whole test split compiles a handful of programs.
_FINE, _COARSE = 128, 256


@dataclasses.dataclass(frozen=True)
class RowScore:
  """One test row: its id, its scores in 0..1 and what the model said."""

  id: str
  scores: dict[str, float]
  prediction: str


@dataclasses.dataclass(frozen=True)
class Scores:
  """A task's test rows, scored.

  Attributes:
    rows: in the order of the test split.
    headline: name of the score that stands in the table.
    means: score -> its mean over the rows, times 100.
    generated_tokens: tokens produced, ends of turn included.
    unfinished: rows that were stopped by the token limit.
    seconds: wall time, compilation included.
  """

  rows: list[RowScore]
  headline: str
  means: dict[str, float]
  generated_tokens: int
  unfinished: int
  seconds: float

  def record(self) -> dict[str, Any]:
    """As plain JSON values, without what was said."""
    return {
      'headline': self.headline,
      'means': self.means,
      'rows': [{'id': row.id, **row.scores} for row in self.rows],
      'generated_tokens': self.generated_tokens,
      'unfinished': self.unfinished,
      'seconds': self.seconds,
    }


@dataclasses.dataclass(frozen=True)
class Questions:
  """A task's test rows, as a base is asked them.

  Attributes:
    task: how rows are posed and scored.
    examples: the test rows; at least one.
    prompts: token ids of each example's prompt, from `encode_prompt`.
    tokenizer: the base's.
    max_new_tokens: the longest prediction, its end included.
    eyes: of the base, where prompts may hold images; predictions are then generated.
    pictures: the images of each prompt then.
    features: what the base's tower made of them.
    choices: for each row what it chooses from, and the token of each, where it chooses.

  Raises:
    UserError: a choice is not one token of this base.
  """

  task: Task
  examples: Sequence[Example]
  prompts: Sequence[Sequence[int]]
  tokenizer: ChatTokenizer
  max_new_tokens: int
  eyes: Eyes | None = None
  pictures: Sequence[Sequence[Picture]] = ()
  features: FeatureFiles | None = None
  choices: Sequence[tuple[tuple[str, ...], list[int]]] = dataclasses.field(init=False, default=())

  def __post_init__(self):
    if self.task.choices is None:
      return
    if any(self.pictures):
      raise ValueError('choices are compared where prompts are text')
    found = [_choices(self.task, example, self.tokenizer) for example in self.examples]
    object.__setattr__(self, 'choices', found)

  def seen(self, chosen: Sequence[int], tokens_BT: np.ndarray) -> Features | None:
    """The features of some prompts, which are the first rows of `tokens_BT`.

    There is room for the most embeddings of any prompt, so that all batches have one shape.
    None where there are no images.
    """
    most = max((sum(one.embeddings for one in of_row) for of_row in self.pictures), default=0)
    if not most or self.eyes is None or self.features is None:
      return None
    shape = (len(tokens_BT), most, self.features.width)
    values_BED = np.zeros(shape, self.features.dtype)
    for row, i in enumerate(chosen):
      values_ED = self.features.of(self.pictures[i])
      values_BED[row, : len(values_ED)] = values_ED
    return Features(jnp.asarray(values_BED), jnp.asarray(self.eyes.slots(tokens_BT)))


def score_task(
  model: Transformer,
  params: Mapping[str, Any],
  questions: Questions,
  batch_rows: int,
  what: str = 'score',
) -> Scores:
  """Predicts every example and scores the predictions.

  Args:
    model: the Transformer.
    params: its parameters, adapters attached or not.
    questions: the test rows.
    batch_rows: prompts that run together, where there are so many; where prompts are only
      read, and so packed, as many tokens as so many of the longest.
    what: name of the work for the progress display.
  """
  if questions.task.choices is not None:

    def likelihoods(fitting: Transformer, batch: choices.PromptBatch) -> jax.Array:
      return choices.next_log_probs(fitting, params, batch.arrays, batch.ends_E)[None]

    answers = _read(model, likelihoods, questions, batch_rows)
  else:

    def continued(tokens: np.ndarray, lengths: np.ndarray, features: Features | None):
      eos_id, most = questions.tokenizer.eos_id, questions.max_new_tokens
      return generate(model, params, tokens, lengths, most, eos_id, features)[None]

    answers = _generated(continued, questions, batch_rows)
  return _score(answers, 1, questions, what)[0]


def score_pack(
  model: Transformer,
  base: Mapping[str, Any],
  pack: packs.Pack,
  cells: int,
  questions: Questions,
  batch_rows: int,
  what: str = 'score',
) -> list[Scores]:
  """As `score_task`, for each cell of a pack; all of them read each batch of prompts.

  Args:
    model: the Transformer.
    base: its frozen parameters.
    pack: the adapters.
    cells: how many of them are to be scored, from the first; the rest fill up.
    questions: the test rows.
    batch_rows: prompts that run together, those of all cells counted.
    what: name of the work for the progress display.

  Returns:
    The scores of each of the `cells`, in their order; `seconds` is each one's share.

  Raises:
    UserError: a choice is not one token of this base.
  """
  batch_rows = max(1, batch_rows // pack.cells)
  if questions.task.choices is not None:

    def likelihoods(fitting: Transformer, batch: choices.PromptBatch) -> jax.Array:
      return choices.next_log_probs_pack(fitting, base, pack, batch.arrays, batch.ends_E)

    answers = _read(model, likelihoods, questions, batch_rows)
  else:

    def continued(tokens: np.ndarray, lengths: np.ndarray, features: Features | None):
      eos_id, most = questions.tokenizer.eos_id, questions.max_new_tokens
      return generate_pack(model, base, pack, tokens, lengths, most, eos_id, features)

    answers = _generated(continued, questions, batch_rows)
  return _score(answers, cells, questions, what)


# Numbers of some prompts (P of them), and what was found for each: generated tokens (C, P, T),
# or log probabilities of the next token (C, P, V). What is beyond the prompts along P is padding.
_Answers = Iterator[tuple[Sequence[int], np.ndarray]]


def _read(
  model: Transformer,
  likelihoods: Callable[[Transformer, choices.PromptBatch], jax.Array],
  questions: Questions,
  batch_rows: int,
) -> _Answers:
  packed = choices.pack_prompts(questions.prompts, batch_rows)
  fitting = packed.fit(model)
  for batch in packed.batches:
    yield batch.prompts, np.asarray(likelihoods(fitting, batch))


def _generated(
  continued: Callable[[np.ndarray, np.ndarray, Features | None], jax.Array],
  questions: Questions,
  batch_rows: int,
) -> _Answers:
  prompts = questions.prompts
  # Rows of like length share a batch, so that little of it is padding.
  order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
  batch_rows = min(batch_rows, len(prompts))
  for at in range(0, len(order), batch_rows):
    chosen = order[at : at + batch_rows]
    tokens, lengths = pad_prompts([prompts[i] for i in chosen], batch_rows)
    yield chosen, np.asarray(continued(tokens, lengths, questions.seen(chosen, tokens)))


def _score(answers: _Answers, cells: int, questions: Questions, what: str) -> list[Scores]:
  start = time.perf_counter()
  sheets = [_Sheet(questions) for _ in range(cells)]
  with Progress(what, len(questions.prompts), unit='row') as progress:
    for chosen, found in answers:
      for sheet, of_cell in zip(sheets, found, strict=False):
        for i, of_row in zip(chosen, of_cell, strict=False):
          sheet.read(i, of_row)
      progress.advance(len(chosen))
  seconds = (time.perf_counter() - start) / cells
  return [sheet.scores(seconds) for sheet in sheets]


class _Sheet:
  """What one model said to the questions."""

  def __init__(self, questions: Questions):
    self._questions = questions
    self._predictions = [''] * len(questions.prompts)
    self._generated = self._unfinished = 0

  def read(self, i: int, found: np.ndarray) -> None:
    """Row i's generated tokens (T,), or log probabilities of its next token (V,)."""
    tokenizer = self._questions.tokenizer
    if self._questions.task.choices is not None:
      texts, ids = self._questions.choices[i]
      self._predictions[i] = texts[int(np.argmax(found[ids]))]
      return
    ends = np.flatnonzero(found == tokenizer.eos_id)
    length = int(ends[0]) if len(ends) else self._questions.max_new_tokens
    self._predictions[i] = tokenizer.decode(found[:length].tolist())
    self._generated += min(length + 1, self._questions.max_new_tokens)
    self._unfinished += not len(ends)

  def scores(self, seconds: float) -> Scores:
    """All of it, once every row was read."""
    task = self._questions.task
    rows = [
      RowScore(example['id'], task.score(prediction, example), prediction)
      for example, prediction in zip(self._questions.examples, self._predictions, strict=True)
    ]
    means = {
      name: 100 * float(np.mean([row.scores[name] for row in rows])) for name in rows[0].scores
    }
    return Scores(rows, task.headline, means, self._generated, self._unfinished, seconds)


def pad_prompts(prompts: Sequence[Sequence[int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
  """Pads prompts on the right, and the batch with empty rows, to one of few shapes.

  Returns:
    tokens (rows, T) int32 and lengths (rows,) int32.
  """
  longest = max(len(prompt) for prompt in prompts)
  multiple = _FINE if longest <= 2 * _FINE else _COARSE
  tokens = np.zeros((rows, -(-longest // multiple) * multiple), np.int32)
  lengths = np.zeros(rows, np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
    lengths[row] = len(prompt)
  return tokens, lengths


def _choices(
  task: Task, example: Example, tokenizer: ChatTokenizer
) -> tuple[tuple[str, ...], list[int]]:
  assert task.choices is not None
  texts = task.choices(example)
  ids = [tokenizer.encode_plain(text) for text in texts]
  if any(len(choice) != 1 for choice in ids):
    raise UserError(
      f'{task.name} row {example["id"]}: a choice is more than one token of this base; '
      'use a base whose vocabulary has single letters, or for rows of your own --metric=exact'
    )
  return texts, [choice[0] for choice in ids]

"""Scores a base, and an adapter beside it, on a user's own conversations.

Completion loss always; with a metric, the last answers are predicted and compared too.
Rows are the same for both, so differences are paired by row.

  rows = encode_rows(conversations, tokenizer, max_length=1024, max_new_tokens=256)
  of_base = score(model, params, rows, tokenizer, task, batch_rows=16)
  of_adapter = score(model, attached, rows, tokenizer, task, batch_rows=16)
  table = compare(of_base, of_adapter)
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.data import messages, own_task
from lora_jax.data.encode import Encoded
from lora_jax.data.messages import Conversation
from lora_jax.data.task import Task
from lora_jax.evaluate import Questions, Scores, pad_prompts, score_task
from lora_jax.head import head_kernel, logits
from lora_jax.hub.tokenizer import ChatTokenizer
from lora_jax.loss import completion_loss
from lora_jax.progress import Progress
from lora_jax.report.results import mean_and_se
from lora_jax.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class FileRows:
  """Conversations as a base sees them.

  Attributes:
    conversations: those that fit.
    encoded: for each, what its loss is taken on: a row, or one for each answer.
    prompts: for each, the ids that its last answer is predicted from.
    left_out: how many did not fit.
    max_new_tokens: the longest prediction.
  """

  conversations: list[Conversation]
  encoded: list[list[Encoded]]
  prompts: list[list[int]]
  left_out: int
  max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class FileScores:
  """What one model makes of them, row by row.

  Attributes:
    losses_N: sum of the losses of a row's answers, nats.
    tokens_N: how many tokens these have.
    predictions: how its last answers compare, or None without a metric.
  """

  losses_N: np.ndarray
  tokens_N: np.ndarray
  predictions: Scores | None


@dataclasses.dataclass(frozen=True)
class Line:
  """One score of the base and of the adapter: means and standard errors over rows.

  Attributes:
    name: of the score; a loss is in nats a token, all others are percentages.
    base: (mean, standard error).
    adapter: the same; None without an adapter.
    difference: adapter less base, paired by row.
  """

  name: str
  base: tuple[float, float | None]
  adapter: tuple[float, float | None] | None = None
  difference: tuple[float, float | None] | None = None


def encode_rows(
  conversations: Sequence[Conversation],
  tokenizer: ChatTokenizer,
  max_length: int,
  max_new_tokens: int,
  last_only: bool = False,
) -> FileRows:
  """Encodes rows for their loss and for predictions; what is too long is left out of both.

  Raises:
    UserError: the chat template refuses a conversation.
  """
  kept, encoded, prompts = [], [], []
  for conversation in conversations:
    rows = messages.encode([conversation], tokenizer, max_length, last_only).rows
    asked = messages.fit_prompt(conversation.messages[:-1], tokenizer, max_length - max_new_tokens)
    if rows and asked is not None:
      kept.append(conversation)
      encoded.append(rows)
      prompts.append(asked[0])
  left_out = len(conversations) - len(kept)
  return FileRows(kept, encoded, prompts, left_out, max_new_tokens)


def score(
  model: Transformer,
  params: Mapping[str, Any],
  rows: FileRows,
  tokenizer: ChatTokenizer,
  task: Task | None,
  batch_rows: int,
  what: str = 'score',
) -> FileScores:
  """Takes the loss of every row, and predicts and scores its last answer where there is a task.

  Args:
    model: the Transformer.
    params: its parameters, an adapter attached or not.
    rows: at least one, from `encode_rows`.
    tokenizer: the base's.
    task: from `own_task.make`, or None.
    batch_rows: rows that run together.
    what: name of the work for the progress display.

  Raises:
    UserError: a choice is not one token of this base.
  """
  questions = None
  if task is not None:
    # Made first: what it refuses is said before anything is computed.
    examples = [own_task.example(row) for row in rows.conversations]
    questions = Questions(task, examples, rows.prompts, tokenizer, rows.max_new_tokens)
  flat = [row for of_one in rows.encoded for row in of_one]
  sums = iter(row_losses(model, params, flat, batch_rows, f'{what}, loss'))
  losses_N = np.asarray([sum(next(sums) for _ in of_one) for of_one in rows.encoded])
  tokens_N = np.asarray(
    [sum(row.arrays['weights'].sum() for row in of_one) for of_one in rows.encoded]
  )
  predictions = None
  if questions is not None:
    predictions = score_task(model, params, questions, batch_rows, what)
  return FileScores(losses_N, tokens_N, predictions)


def row_losses(
  model: Transformer,
  params: Mapping[str, Any],
  rows: Sequence[Encoded],
  batch_rows: int,
  what: str = 'loss',
) -> list[float]:
  """Sum of the losses of each row's learned tokens, in nats, from float32 logits."""
  sums = [0.0] * len(rows)
  # Rows of like length share a batch, so that little of it is padding.
  order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
  with Progress(what, len(rows), unit='row') as progress:
    for at in range(0, len(order), batch_rows):
      chosen = order[at : at + batch_rows]
      tokens, _ = pad_prompts([rows[i].arrays['tokens'].tolist() for i in chosen], batch_rows)
      targets, weights = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
      for row, i in enumerate(chosen):
        targets[row, : len(rows[i])] = rows[i].arrays['targets']
        weights[row, : len(rows[i])] = rows[i].arrays['weights']
      found_B = np.asarray(_batch_losses(model, params, tokens, targets, weights))
      for i, value in zip(chosen, found_B, strict=False):
        sums[i] = float(value)
      progress.advance(len(chosen))
  return sums


@functools.partial(jax.jit, static_argnames='model')
def _batch_losses(model, params, tokens_BT, targets_BT, weights_BT):
  hidden_BTD, _ = model.apply({'params': params}, tokens_BT)
  kernel = head_kernel(model, params)
  head = lambda hidden_CD: logits(model, hidden_CD, kernel)

  def of_row(row):
    hidden_TD, targets_T, weights_T = row
    return completion_loss(head, hidden_TD[None], targets_T[None], weights_T[None])

  return jax.lax.map(of_row, (hidden_BTD, targets_BT, weights_BT))


def compare(base: FileScores, adapter: FileScores | None) -> list[Line]:
  """The loss and every score, of both and their difference."""
  loss = functools.partial(token_mean, tokens_N=base.tokens_N)
  lines = [
    Line(
      'loss',
      loss(base.losses_N),
      None if adapter is None else loss(adapter.losses_N),
      None if adapter is None else loss(adapter.losses_N - base.losses_N),
    )
  ]
  said = base.predictions
  if said is None:
    return lines
  for name in sorted(said.means, key=lambda name: name != said.headline):
    of_base = _percent(said, name)
    if adapter is None or adapter.predictions is None:
      lines.append(Line(name, mean_and_se(of_base)))
      continue
    of_adapter = _percent(adapter.predictions, name)
    gained = [theirs - ours for ours, theirs in zip(of_base, of_adapter, strict=True)]
    lines.append(Line(name, mean_and_se(of_base), mean_and_se(of_adapter), mean_and_se(gained)))
  return lines


def token_mean(losses_N: np.ndarray, tokens_N: np.ndarray) -> tuple[float, float | None]:
  """The mean over all tokens of rows, and its standard error over rows; None for one row.

  The error of a ratio of two sums, to first order (Cochran 1977, section 6.4).
  """
  count, total = len(losses_N), float(tokens_N.sum())
  mean = float(losses_N.sum()) / total
  if count < 2:
    return mean, None
  off_N = losses_N - mean * tokens_N
  return mean, math.sqrt(count / (count - 1) * float(off_N @ off_N)) / total


def _percent(scores: Scores, name: str) -> list[float]:
  return [100 * row.scores[name] for row in scores.rows]

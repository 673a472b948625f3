"""Scores a model on a task's test rows: generation, or the likelihood of choices.

Adapters stay unmerged: `params` may hold `LoraKernel` leaves.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.data.task import Example, Task
from lora_jax.errors import UserError
from lora_jax.generate import generate
from lora_jax.hub.tokenizer import ChatTokenizer
from lora_jax.progress import Progress
from lora_jax.transformer import Transformer, head_kernel, logits

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


def score_task(
  model: Transformer,
  params: Mapping[str, Any],
  task: Task,
  examples: Sequence[Example],
  tokenizer: ChatTokenizer,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  batch_rows: int,
  what: str = 'score',
) -> Scores:
  """Predicts every example and scores the predictions.

  Args:
    model: the Transformer.
    params: its parameters, adapters attached or not.
    task: how rows are posed and scored.
    examples: the test rows; at least one.
    tokenizer: the base's.
    prompts: token ids of each example's prompt, from `encode_prompt`.
    max_new_tokens: the longest prediction, its end included.
    batch_rows: prompts that run together, where there are so many.
    what: name of the work for the progress display.

  Raises:
    UserError: a choice is not one token of this base.
  """
  start = time.perf_counter()
  # Rows of like length share a batch, so that little of it is padding.
  order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
  batch_rows = min(batch_rows, len(prompts))
  predictions = [''] * len(prompts)
  generated = unfinished = 0
  with Progress(what, len(prompts), unit='row') as progress:
    for at in range(0, len(order), batch_rows):
      chosen = order[at : at + batch_rows]
      tokens, lengths = pad_prompts([prompts[i] for i in chosen], batch_rows)
      if task.choices is not None:
        candidates = [_choice_ids(task, examples[i], tokenizer) for i in chosen]
        for i, best in zip(
          chosen, _choose(model, params, tokens, lengths, candidates), strict=True
        ):
          predictions[i] = task.choices(examples[i])[best]
      else:
        out = np.asarray(generate(model, params, tokens, lengths, max_new_tokens, tokenizer.eos_id))
        for i, ids in zip(chosen, out, strict=False):
          ends = np.flatnonzero(ids == tokenizer.eos_id)
          length = int(ends[0]) if len(ends) else max_new_tokens
          predictions[i] = tokenizer.decode(ids[:length])
          generated += min(length + 1, max_new_tokens)
          unfinished += not len(ends)
      progress.advance(len(chosen))
  rows = [
    RowScore(example['id'], task.score(prediction, example), prediction)
    for example, prediction in zip(examples, predictions, strict=True)
  ]
  means = {
    name: 100 * float(np.mean([row.scores[name] for row in rows])) for name in rows[0].scores
  }
  seconds = time.perf_counter() - start
  return Scores(rows, task.headline, means, generated, unfinished, seconds)


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


@functools.partial(jax.jit, static_argnames='model')
def next_log_probs(
  model: Transformer, params: Mapping[str, Any], prompts_BT: jax.Array, lengths_B: jax.Array
) -> jax.Array:
  """Log probabilities (B, V) of the token after each prompt."""
  hidden_BTD, _ = model.apply({'params': params}, prompts_BT)
  last_B = jnp.maximum(lengths_B - 1, 0)
  hidden_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
  return jax.nn.log_softmax(logits(model, hidden_BD, head_kernel(model, params)))


def _choose(model, params, tokens, lengths, candidates: Sequence[Sequence[int]]) -> list[int]:
  log_probs_BV = np.asarray(next_log_probs(model, params, tokens, lengths))
  return [
    int(np.argmax(row_V[list(ids)])) for row_V, ids in zip(log_probs_BV, candidates, strict=False)
  ]


def _choice_ids(task: Task, example: Example, tokenizer: ChatTokenizer) -> list[int]:
  assert task.choices is not None
  ids = [tokenizer.encode_plain(choice) for choice in task.choices(example)]
  if any(len(choice) != 1 for choice in ids):
    raise UserError(
      f'{task.name} row {example["id"]}: a choice is more than one token of this base; '
      'use a base whose vocabulary has single letters'
    )
  return [choice[0] for choice in ids]

"""Examples into token ids: the chat, cut to its budget, and the completion to learn.

Training and scoring see the same prompt: the budget depends on the task and the row
length alone, never on how long a row's target happens to be.
"""

import dataclasses

import numpy as np

from lora_jax.data.task import Example, Prompt, Task
from lora_jax.errors import UserError
from lora_jax.hub.tokenizer import ChatTokenizer

# No token is longer than this in practice; the tokenizer need not see the rest of a
# document that could not fit anyway.
_MAX_CHARS_PER_TOKEN = 16


@dataclasses.dataclass(frozen=True)
class Budget:
  """Tokens that a row may take.

  Attributes:
    prompt: tokens of the rendered prompt, the opening of the answer included.
    completion: tokens of the completion, its end included.
  """

  prompt: int
  completion: int


class PromptTooLongError(UserError):
  """A row's prompt does not fit, even without its document."""


def budget(task: Task, max_length: int, max_new_tokens: int) -> Budget:
  """Splits a row of `max_length` tokens between prompt and completion.

  The completion gets what a prediction may take and no more: to train on longer
  ones would teach answers that scoring cuts off.
  """
  completion = min(task.max_new_tokens, max_new_tokens, max_length // 2)
  return Budget(prompt=max_length - completion, completion=completion)


def encode_prompt(task: Task, example: Example, tokenizer: ChatTokenizer, limit: int) -> list[int]:
  """Token ids of the chat up to where the answer begins, at most `limit` of them.

  Only the prompt's document is cut, from its end.

  Raises:
    PromptTooLongError: the prompt does not fit even without its document.
  """
  prompt = task.prompt(example)
  ids = _chat(prompt, 0, tokenizer)
  if len(ids) > limit:
    raise PromptTooLongError(
      f'{task.name} row {example["id"]}: its prompt takes {len(ids)} tokens, {limit} are allowed; '
      'raise --max_length or leave the row out'
    )
  room = limit - len(ids)
  document = prompt.document[: room * _MAX_CHARS_PER_TOKEN]
  if not document:
    return ids
  # The cut shifts the tokens around it by one or two, so the whole is counted again.
  while room > 0:
    cut = _chat(prompt, tokenizer.fit(document, room), tokenizer)
    if len(cut) <= limit:
      return cut
    room -= len(cut) - limit
  return ids


@dataclasses.dataclass(frozen=True)
class Encoded:
  """One training row.

  Attributes:
    arrays: 'tokens' (T,) int32, the prompt and all but the end of the completion;
      'targets' (T,) int32, the same moved by one; 'weights' (T,) float32, 1 where the
      target belongs to the completion.
    cut: whether the completion was longer than its budget.
  """

  arrays: dict[str, np.ndarray]
  cut: bool

  def __len__(self) -> int:
    return len(self.arrays['tokens'])


def encode_example(
  task: Task, example: Example, tokenizer: ChatTokenizer, limits: Budget
) -> Encoded:
  """Encodes prompt and completion for training.

  A completion over its budget is cut, and then does not teach the end of the turn.

  Raises:
    PromptTooLongError: as `encode_prompt`.
  """
  prompt = encode_prompt(task, example, tokenizer, limits.prompt)
  completion = [*tokenizer.encode_plain(task.target(example)), tokenizer.eos_id]
  kept = completion[: limits.completion]
  ids = np.asarray(prompt + kept, np.int32)
  weights = np.zeros(len(ids) - 1, np.float32)
  weights[len(prompt) - 1 :] = 1
  arrays = {'tokens': ids[:-1], 'targets': ids[1:], 'weights': weights}
  return Encoded(arrays, cut=len(kept) < len(completion))


def _chat(prompt: Prompt, document_chars: int, tokenizer: ChatTokenizer) -> list[int]:
  system = [] if prompt.system is None else [{'role': 'system', 'content': prompt.system}]
  turn = {'role': 'user', 'content': prompt.text(document_chars)}
  return tokenizer.encode_chat([*system, *prompt.history, turn])

"""Examples into token ids: the chat, cut to its budget, and the completion to learn.

Training and scoring see the same prompt: the budget depends on the task and the row
length alone, never on how long a row's target happens to be. An image is in the prompt as
its tokens, all of them: what is cut to fit is text.
"""

import dataclasses

import numpy as np

from lora_jax.data.eyes import Eyes, Picture
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


def pictures(task: Task, example: Example, eyes: Eyes | None) -> tuple[Picture, ...]:
  """What is known of the images of a row's prompt.

  Args:
    task: posed as the base can take it; see `Task.posed`.
    example: the row.
    eyes: of the base, or None where the task is posed without images.

  Raises:
    UserError: one is missing, or cannot be an image; the row is named.
  """
  if eyes is None:
    return ()
  where = f'{task.name} row {example["id"]}'
  return tuple(eyes.picture(image, where) for image in task.prompt(example).images)


def encode_prompt(
  task: Task,
  example: Example,
  tokenizer: ChatTokenizer,
  limit: int,
  eyes: Eyes | None = None,
) -> list[int]:
  """Token ids of the chat up to where the answer begins, at most `limit` of them.

  Only the prompt's document is cut, from its end.

  Args:
    task: posed as the base can take it; see `Task.posed`.
    example: the row.
    tokenizer: the base's.
    limit: tokens at most.
    eyes: of the base; needed where prompts hold images.

  Raises:
    PromptTooLongError: the prompt does not fit even without its document.
    UserError: an image is missing, or cannot be one.
  """
  prompt, seen = task.prompt(example), pictures(task, example, eyes)

  def chat(document_chars: int) -> list[int]:
    ids = _chat(prompt, document_chars, tokenizer)
    return ids if eyes is None else eyes.spell(ids, tokenizer, seen)

  ids = chat(0)
  if len(ids) > limit:
    held, smaller = '', ''
    if eyes is not None and seen:
      shown, tiles = sum(one.embeddings for one in seen), sum(one.tiles for one in seen)
      held = f', {shown} of them for the {tiles} tiles of its image'
      smaller = f'lower --image_edge (now {eyes.images.longest_edge}), '
    raise PromptTooLongError(
      f'{task.name} row {example["id"]}: its prompt takes {len(ids)} tokens{held}, {limit} are '
      f'allowed; {smaller}raise --max_length or leave the row out'
    )
  room = limit - len(ids)
  document = prompt.document[: room * _MAX_CHARS_PER_TOKEN]
  if not document:
    return ids
  # The cut shifts the tokens around it by one or two, so the whole is counted again.
  while room > 0:
    cut = chat(tokenizer.fit(document, room))
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
      target belongs to the completion. Where rows may have images, 'slots' (T,) int32 too:
      which of the row's embeddings a token becomes, or -1.
    cut: whether the completion was longer than its budget.
    pictures: the row's images, in order.
  """

  arrays: dict[str, np.ndarray]
  cut: bool
  pictures: tuple[Picture, ...] = ()

  def __len__(self) -> int:
    return len(self.arrays['tokens'])

  @property
  def embeddings(self) -> int:
    """E: of all its images."""
    return sum(picture.embeddings for picture in self.pictures)


def encode_example(
  task: Task,
  example: Example,
  tokenizer: ChatTokenizer,
  limits: Budget,
  eyes: Eyes | None = None,
) -> Encoded:
  """Encodes prompt and completion for training.

  A completion over its budget is cut, and then does not teach the end of the turn.

  Raises:
    PromptTooLongError: as `encode_prompt`, and UserError as there.
  """
  prompt = encode_prompt(task, example, tokenizer, limits.prompt, eyes)
  completion = [*tokenizer.encode_plain(task.target(example)), tokenizer.eos_id]
  kept = completion[: limits.completion]
  ids = np.asarray(prompt + kept, np.int32)
  weights = np.zeros(len(ids) - 1, np.float32)
  weights[len(prompt) - 1 :] = 1
  arrays = {'tokens': ids[:-1], 'targets': ids[1:], 'weights': weights}
  if eyes is not None:
    arrays['slots'] = eyes.slots(ids[:-1])
  return Encoded(arrays, len(kept) < len(completion), pictures(task, example, eyes))


def _chat(prompt: Prompt, document_chars: int, tokenizer: ChatTokenizer) -> list[int]:
  system = [] if prompt.system is None else [{'role': 'system', 'content': prompt.system}]
  content: str | list[dict[str, str]] = prompt.text(document_chars)
  if prompt.images:
    content = [*[{'type': 'image'}] * len(prompt.images), {'type': 'text', 'text': content}]
  turn = {'role': 'user', 'content': content}
  return tokenizer.encode_chat([*system, *prompt.history, turn])

"""A user's own file: JSON lines, one conversation each.

  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  {"prompt": "...", "completion": "..."}                    strings, or lists of messages
  {"instruction": "...", "input": "...", "output": "..."}   `input` may be left out

Strings become a user's and an assistant's turn: every form goes through the base's chat
template. What is learned is what the model will have to write: the answers of the
assistant (or the last alone), each with the token that ends it. The tokens before an
answer are those that inference renders, whatever a template does to earlier turns.

  conversations = read(Path('my.jsonl'))
  encoded = encode(conversations, tokenizer, max_length=1024)
  shape = pipeline.batch_shape(encoded.rows, tokens_per_batch=2048)
"""

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.data.encode import Encoded
from lora_jax.data.rows import parse_line
from lora_jax.errors import UserError
from lora_jax.hub.tokenizer import ChatTokenizer

ROLES = ('system', 'user', 'assistant')
_FORMS = '{"messages": [{"role", "content"}, ...]} or {"prompt": ..., "completion": ...}'

Messages = tuple[Mapping[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Conversation:
  """One line of the file; the last turn is the assistant's.

  Attributes:
    where: file and line, for errors.
    id: the row's own 'id', or the number of its line.
    messages: turns, each with 'role' and 'content'.
    given: leading turns that are never learned, as those of a `prompt`.
    choices: the row's own 'choices', or none.
  """

  where: str
  id: str
  messages: Messages
  given: int = 0
  choices: tuple[str, ...] = ()

  @property
  def answer(self) -> str:
    """The last turn."""
    return self.messages[-1]['content']

  def learned(self, last_only: bool = False) -> list[int]:
    """Which turns are learned."""
    answers = [
      i
      for i, message in enumerate(self.messages)
      if message['role'] == 'assistant' and i >= self.given
    ]
    return answers[-1:] if last_only else answers


def read(path: Path) -> list[Conversation]:
  """Reads and checks a whole file.

  Raises:
    UserError: there is no file, it holds nothing, or a line is no conversation; with
      file and line, and what would be one.
  """
  if not path.is_file():
    what = 'is a directory' if path.is_dir() else 'is not there'
    raise UserError(f'{path} {what}; give a file of JSON lines, each {_FORMS}')
  conversations = []
  with path.open('rb') as lines:
    for number, line in enumerate(lines, start=1):
      if line.strip():
        where = f'{path}:{number}'
        record = parse_line(line, where)
        _check_text(line, record, where)
        conversations.append(_conversation(record, where, number))
  if not conversations:
    raise UserError(f'{path} is empty; give one conversation a line: {_FORMS}')
  return conversations


def keep_out(
  conversations: Sequence[Conversation], share: float, most: int, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
  """Draws the rows that watch the loss: (the others, them), each in the file's order."""
  count = min(int(share * len(conversations)), most)
  drawn = set(random.Random(seed).sample(range(len(conversations)), count))
  return (
    [row for i, row in enumerate(conversations) if i not in drawn],
    [row for i, row in enumerate(conversations) if i in drawn],
  )


@dataclasses.dataclass(frozen=True)
class EncodedFile:
  """Conversations as training rows.

  Attributes:
    rows: at most `max_length` tokens each.
    left_out: conversations whose last exchange alone is longer, or all whose answers are.
    shortened: conversations that lost their oldest turns to fit.
    split: conversations whose answers became a row each, since the template renders
      earlier turns otherwise than while they were answered.
  """

  rows: list[Encoded]
  left_out: int
  shortened: int
  split: int

  def notes(self, max_length: int) -> list[str]:
    """What a user should know, a sentence each."""
    found = []
    if self.left_out:
      found.append(
        f'{self.left_out} rows are left out: their last exchange alone is longer than '
        f'{max_length} tokens (--max_length)'
      )
    if self.shortened:
      found.append(
        f'{self.shortened} rows lose their oldest turns to fit in {max_length} tokens '
        '(--max_length)'
      )
    if self.split:
      found.append(
        f'{self.split} rows become one row an answer: the chat template changes earlier turns'
      )
    return found


def encode(
  conversations: Sequence[Conversation],
  tokenizer: ChatTokenizer,
  max_length: int,
  last_only: bool = False,
) -> EncodedFile:
  """Token ids with a weight of 1 on what is learned.

  What is too long loses its oldest turns, as a chat does at its context limit; what
  still is too long is left out whole, since half an answer teaches to end too late.

  Args:
    conversations: from `read`.
    tokenizer: the base's.
    max_length: the longest row, in tokens.
    last_only: learn the last answer of each alone.

  Raises:
    UserError: the template refuses a conversation.
  """
  rows, left_out, shortened, split = [], 0, 0, 0
  for conversation in conversations:
    try:
      learned = conversation.learned(last_only)
      found, dropped = None, False
      if len(learned) > 1:
        found, dropped, broken = _together(conversation.messages, learned, tokenizer, max_length)
        split += broken
      if found is None:
        found, dropped = _apart(conversation.messages, learned, tokenizer, max_length)
    except UserError as error:
      raise UserError(f'{conversation.where}: {error}') from error
    rows += found
    left_out += not found
    shortened += dropped and bool(found)
  return EncodedFile(rows, left_out, shortened, split)


def fit_prompt(
  messages: Sequence[Mapping[str, str]], tokenizer: ChatTokenizer, limit: int
) -> tuple[list[int], Messages] | None:
  """Ids of a chat up to where the answer begins, without as many of its oldest turns as needed.

  Args:
    messages: turns; the last is the user's.
    tokenizer: the base's.
    limit: tokens at most.

  Returns:
    The ids and the turns that are left; None where the last turn alone does not fit.

  Raises:
    UserError: the template refuses the messages.
  """
  kept: Messages | None = tuple(messages)
  while kept is not None:
    ids = tokenizer.encode_chat(kept)
    if len(ids) <= limit:
      return ids, kept
    kept = without_oldest(kept)
  return None


def without_oldest(messages: Messages) -> Messages | None:
  """The chat without its first exchange; the system's turn stays. None: there is but one."""
  start = int(messages[0]['role'] == 'system')
  for i in range(start + 1, len(messages)):
    if messages[i]['role'] == 'user':
      return messages[:start] + messages[i:]
  return None


def _together(messages, learned, tokenizer, max_length):
  """One row for all answers: (rows or None, whether turns were dropped, whether it cannot be)."""
  dropped = False
  while len(learned) > 1:
    row = _joint(messages, learned, tokenizer)
    if row is None:
      return None, False, True
    if len(row) < max_length:
      return [row], dropped, False
    shorter = without_oldest(messages)
    if shorter is None:
      break
    gone = len(messages) - len(shorter)
    messages, learned = shorter, [i - gone for i in learned if i - gone > 0]
    dropped = True
  # The last answer alone is a row like any other.
  rows, _ = _apart(messages, learned[-1:], tokenizer, max_length)
  return rows, True, False


def _joint(messages: Messages, learned: Sequence[int], tokenizer: ChatTokenizer) -> Encoded | None:
  """The whole chat with several answers learned, or None where inference renders it otherwise."""
  whole = tokenizer.encode_chat(messages[: learned[-1] + 1], add_generation_prompt=False)
  weights, end = np.zeros(len(whole), np.float32), 0
  for i in learned:
    prompt, content = tokenizer.encode_chat(messages[:i]), messages[i]['content']
    answers = [
      [*prompt, *tokenizer.encode_plain(text), tokenizer.eos_id]
      # Many templates strip what they put in.
      for text in (content, content.strip())
    ]
    ends = [len(ids) for ids in answers if whole[: len(ids)] == ids]
    if not ends:
      return None
    end = ends[0]
    weights[len(prompt) : end] = 1
  return _encoded(whole[:end], weights[:end])


def _apart(messages: Messages, learned: Sequence[int], tokenizer: ChatTokenizer, max_length: int):
  """A row for each answer: what inference renders, then the answer."""
  rows, dropped = [], False
  for i in learned:
    answer = [*tokenizer.encode_plain(messages[i]['content']), tokenizer.eos_id]
    fitted = fit_prompt(messages[:i], tokenizer, max_length - len(answer))
    if fitted is not None:
      prompt, kept = fitted
      dropped |= len(kept) < i
      weights = np.repeat(np.asarray([0, 1], np.float32), [len(prompt), len(answer)])
      rows.append(_encoded(prompt + answer, weights))
  return rows, dropped


def _encoded(ids: Sequence[int], weights: np.ndarray) -> Encoded:
  tokens = np.asarray(ids, np.int32)
  arrays = {'tokens': tokens[:-1], 'targets': tokens[1:], 'weights': weights[1:]}
  return Encoded(arrays, cut=False)


def _check_text(line: bytes, record: Any, where: str) -> None:
  """Refuses half of a surrogate pair, which JSON may spell and nothing can write down."""
  if b'\\ud' in line.lower():
    try:
      json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
      half = f'\\u{ord(error.object[error.start]):04x}'
      raise UserError(f'{where}: holds {half}, half of a character; write the whole') from None


def _conversation(record: Any, where: str, number: int) -> Conversation:
  if not isinstance(record, Mapping):
    raise UserError(f'{where}: expected {_FORMS}, found a {type(record).__name__}')
  if 'messages' in record:
    messages, given = _turns(record['messages'], 'messages', where), 0
  elif 'prompt' in record or 'completion' in record:
    prompt = _one_or_more(record, 'prompt', 'user', where)
    messages = prompt + _one_or_more(record, 'completion', 'assistant', where)
    given = len(prompt)
  elif 'instruction' in record:
    asked = [_text(record, 'instruction', where)]
    if record.get('input'):
      asked.append(_text(record, 'input', where))
    messages = (
      {'role': 'user', 'content': '\n\n'.join(asked)},
      {'role': 'assistant', 'content': _text(record, 'output', where)},
    )
    given = 1
  else:
    fields = ', '.join(map(repr, record)) or 'nothing'
    raise UserError(f'{where}: has {fields}; give {_FORMS}')
  _check_order(messages, where)
  row_id = record.get('id')
  choices = record.get('choices') or ()
  if not isinstance(choices, list | tuple) or not all(isinstance(c, str) and c for c in choices):
    raise UserError(f"{where}: 'choices' must be a list of strings")
  return Conversation(
    where, str(number) if row_id is None else str(row_id), messages, given, tuple(choices)
  )


def _one_or_more(record: Mapping[str, Any], field: str, role: str, where: str) -> Messages:
  """A field that is a text, as a turn of `role`, or a list of messages."""
  if isinstance(record.get(field), list):
    return _turns(record[field], field, where)
  return ({'role': role, 'content': _text(record, field, where)},)


def _turns(value: Any, field: str, where: str) -> Messages:
  if not isinstance(value, list) or not value:
    raise UserError(
      f'{where}: {field!r} must be a list of {{"role", "content"}}, not {_shown(value)}'
    )
  turns = []
  for i, turn in enumerate(value):
    at = f'{where}: {field}[{i}]'
    if not isinstance(turn, Mapping):
      raise UserError(f'{at} must be {{"role", "content"}}, not {_shown(turn)}')
    role = turn.get('role')
    if role not in ROLES:
      what = f'has role {_shown(role)}' if 'role' in turn else 'has no role'
      raise UserError(f'{at} {what}; roles are {", ".join(ROLES)}')
    content = turn.get('content')
    if not isinstance(content, str):
      what = f'is {_shown(content)}' if 'content' in turn else 'is missing'
      raise UserError(f'{at}: its content {what}; give a string')
    # An empty system turn has a use: templates put in their own where there is none.
    if not content.strip() and role != 'system':
      raise UserError(f'{at}: its content is empty; fill it in or leave the row out')
    turns.append({'role': role, 'content': content})
  return tuple(turns)


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
  value = record.get(field)
  if not isinstance(value, str):
    what = f'must be a string, not {_shown(value)}' if field in record else 'is missing'
    raise UserError(f'{where}: field {field!r} {what}; give {_FORMS}')
  if not value.strip():
    raise UserError(f'{where}: field {field!r} is empty; fill it in or leave the row out')
  return value


def _check_order(messages: Messages, where: str) -> None:
  roles = [message['role'] for message in messages]
  if roles[-1] != 'assistant':
    raise UserError(f"{where}: the last turn is the {roles[-1]}'s; end with one of the assistant")
  for i, role in enumerate(roles):
    if role == 'system' and i:
      raise UserError(f'{where}: turn {i + 1} is a system turn; only the first may be')
    if role == 'assistant' and (i == 0 or roles[i - 1] != 'user'):
      raise UserError(f'{where}: turn {i + 1} is an answer to no user turn; put the question first')


def _shown(value: Any) -> str:
  text = ' '.join(repr(value).split())
  return text if len(text) <= 40 else text[:37] + '...'

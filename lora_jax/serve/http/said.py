"""Answers in the form of OpenAI's interface: whole, or chunk by chunk."""

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from lora_jax.serve.answer import Answer
from lora_jax.serve.http.inbox import News


class Saying:
  """Says the answers to one request for some text."""

  _prefix, _whole, _chunk = 'cmpl', 'text_completion', 'text_completion'

  def __init__(self, model: str, each: int):
    """Gives it a name.

    Args:
      model: as it was asked for.
      each: how many answers in a row are to one prompt.
    """
    self._model, self._each = model, each
    self._id = f'{self._prefix}-{secrets.token_hex(12)}'
    self._created = int(time.time())

  def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
    """All at once, when they have ended."""
    choices = [
      {'index': i, **self._said(answer.text), 'logprobs': None, 'finish_reason': answer.finish}
      for i, answer in enumerate(answers)
    ]
    return {**self._head(self._whole), 'choices': choices, 'usage': self._usage(answers)}

  def opening(self, count: int) -> Iterator[dict[str, Any]]:
    """What comes before anything is said."""
    yield from ()

  def chunk(self, news: News) -> dict[str, Any]:
    """A piece of one of them."""
    return self._choice(news.index, self._piece(news.text), news.finish)

  def closing(self, answers: Sequence[Answer]) -> dict[str, Any]:
    """How many tokens there were, where that was asked for."""
    return {**self._head(self._chunk), 'choices': [], 'usage': self._usage(answers)}

  def _usage(self, answers: Sequence[Answer]) -> dict[str, int]:
    read = sum(len(answer.request.prompt) for answer in answers[:: self._each])
    said = sum(len(answer.ids) for answer in answers)
    return {'prompt_tokens': read, 'completion_tokens': said, 'total_tokens': read + said}

  def _choice(self, index: int, said: dict[str, Any], finish: str | None) -> dict[str, Any]:
    choice = {'index': index, **said, 'logprobs': None, 'finish_reason': finish}
    return {**self._head(self._chunk), 'choices': [choice]}

  def _head(self, kind: str) -> dict[str, Any]:
    return {'id': self._id, 'object': kind, 'created': self._created, 'model': self._model}

  def _said(self, text: str) -> dict[str, Any]:
    return {'text': text}

  def _piece(self, text: str) -> dict[str, Any]:
    return self._said(text)


class ChatSaying(Saying):
  """Says the answers to a chat."""

  _prefix, _whole, _chunk = 'chatcmpl', 'chat.completion', 'chat.completion.chunk'

  def opening(self, count: int) -> Iterator[dict[str, Any]]:
    for index in range(count):
      yield self._choice(index, {'delta': {'role': 'assistant', 'content': ''}}, None)

  def _said(self, text: str) -> dict[str, Any]:
    return {'message': {'role': 'assistant', 'content': text, 'refusal': None}}

  def _piece(self, text: str) -> dict[str, Any]:
    return {'delta': {'content': text} if text else {}}


def model_card(name: str, created: int, length: int, base: str | None = None) -> dict[str, Any]:
  """What the list of models says of a base, or of an adapter of `base`."""
  return {
    'id': name,
    'object': 'model',
    'created': created,
    'owned_by': 'lora_jax',
    'root': name,
    'parent': base,
    'max_model_len': length,
  }

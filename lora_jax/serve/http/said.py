"""Answers in the form of OpenAI's interface: whole, or chunk by chunk."""

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from lora_jax.hub.tokenizer import ChatTokenizer
from lora_jax.serve.answer import Answer
from lora_jax.serve.http.asked import Asked
from lora_jax.serve.http.inbox import News
from lora_jax.serve.http.likelihoods import ChatTeller, TextTeller


class Saying:
  """Says the answers to one request for some text."""

  _prefix, _whole, _chunk = 'cmpl', 'text_completion', 'text_completion'

  def __init__(self, asked: Asked, tokenizer: ChatTokenizer):
    """Gives it a name.

    Args:
      asked: the request.
      tokenizer: the base's.
    """
    self._asked, self._tokenizer = asked, tokenizer
    self._model, self._each = asked.model, asked.n or 1
    self._id = f'{self._prefix}-{secrets.token_hex(12)}'
    self._created = int(time.time())
    self._tellers: dict[int, TextTeller | ChatTeller] = {}
    self._begun: set[int] = set()

  def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
    """All at once, when they have ended."""
    choices = [
      {
        'index': i,
        **self._said(self._before(i, answer) + answer.text),
        'logprobs': self._logprobs(i, answer),
        'finish_reason': answer.finish,
      }
      for i, answer in enumerate(answers)
    ]
    return {**self._head(self._whole), 'choices': choices, 'usage': self._usage(answers)}

  def opening(self, count: int) -> Iterator[dict[str, Any]]:
    """What comes before anything is said."""
    yield from ()

  def chunk(self, news: News) -> dict[str, Any]:
    """A piece of one of them."""
    answer = news.answer
    before = '' if news.index in self._begun else self._before(news.index, answer)
    self._begun.add(news.index)
    logprobs = self._logprobs(news.index, answer)
    return self._choice(news.index, self._piece(before + news.text), news.finish, logprobs)

  def closing(self, answers: Sequence[Answer]) -> dict[str, Any]:
    """How many tokens there were, where that was asked for."""
    return {**self._head(self._chunk), 'choices': [], 'usage': self._usage(answers)}

  def _usage(self, answers: Sequence[Answer]) -> dict[str, int]:
    read = sum(len(answer.request.prompt) for answer in answers[:: self._each])
    said = sum(len(answer.ids) for answer in answers)
    return {'prompt_tokens': read, 'completion_tokens': said, 'total_tokens': read + said}

  def _choice(
    self,
    index: int,
    said: dict[str, Any],
    finish: str | None,
    logprobs: dict[str, Any] | None = None,
  ) -> dict[str, Any]:
    choice = {'index': index, **said, 'logprobs': logprobs, 'finish_reason': finish}
    return {**self._head(self._chunk), 'choices': [choice]}

  def _head(self, kind: str) -> dict[str, Any]:
    return {'id': self._id, 'object': kind, 'created': self._created, 'model': self._model}

  def _before(self, index: int, answer: Answer) -> str:
    """The text of the prompt, where that is echoed."""
    if not answer.request.echo:
      return ''
    asked = self._asked.echoed(index // self._each)
    if asked is None:
      return self._tokenizer.decode(answer.request.prompt, skip_special=False)
    return asked

  def _logprobs(self, index: int, answer: Answer) -> dict[str, Any] | None:
    """Of the tokens since the last time, where they are asked for."""
    if answer.request.likeliest is None:
      return None
    if index not in self._tellers:
      self._tellers[index] = self._teller(index, answer)
    return self._tellers[index].tell(answer)

  def _teller(self, index: int, answer: Answer) -> TextTeller | ChatTeller:
    before = self._before(index, answer) if answer.request.echo else None
    return TextTeller(self._tokenizer, before)

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

  def _teller(self, index: int, answer: Answer) -> TextTeller | ChatTeller:
    return ChatTeller(self._tokenizer)

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

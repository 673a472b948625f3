"""Log probabilities in the words of OpenAI's interface.

A token is told as what it says behind another, since some tokenizers leave out a space before
what stands first; one that is part of a character says U+FFFD. What ends a turn is told too.
"""

import functools
from collections.abc import Sequence
from typing import Any

from lora_jax.hub.tokenizer import ChatTokenizer
from lora_jax.serve.answer import Answer
from lora_jax.serve.likelihood import Likelihood
from lora_jax.text_stream import Decoder, TextStream


class TextTeller:
  """Tells of an answer to a text, all at once or as it comes."""

  def __init__(self, tokenizer: ChatTokenizer, before: str | None = None):
    """Has told nothing yet.

    Args:
      tokenizer: the base's.
      before: the prompt's text, where that is echoed and its tokens are told of too.
    """
    self._tokenizer, self._before = tokenizer, before
    self._owes_prompt = before is not None
    self._told = 0
    # An answer's text is without what is special.
    self._offsets = _Offsets(tokenizer, len(before or ''))

  def tell(self, answer: Answer) -> dict[str, Any]:
    """Of the tokens that have come since the last time; what has come may be ahead of its text."""
    ids: list[int] = []
    told: list[Likelihood | None] = []
    offsets: list[int] = []
    more = answer.likelihoods[self._told :]
    self._told += len(more)
    if self._before is not None and self._owes_prompt:
      self._owes_prompt = False
      ids += answer.request.prompt
      # Before the first there is nothing that it could be likely after.
      told += [None, *answer.of_prompt]
      offsets += self._of_prompt(ids, self._before)
    end = len(self._before or '') + len(answer.text)
    for one in more:
      ids.append(one.token)
      told.append(one)
      offsets.append(min(self._offsets.next(one.token), end))
    return {
      'tokens': [_text(token, self._tokenizer) for token in ids],
      'token_logprobs': [one and one.log_prob for one in told],
      'top_logprobs': [one and _top(one, self._tokenizer) for one in told],
      'text_offset': offsets,
    }

  def _of_prompt(self, ids: Sequence[int], before: str) -> list[int]:
    # What begins a text may be a token of ours, and none of what was asked.
    begun = ids[0] == self._tokenizer.bos_id and not before.startswith(
      _text(ids[0], self._tokenizer)
    )
    offsets = _Offsets(_Everything(self._tokenizer))
    return [0] * begun + [min(offsets.next(token), len(before)) for token in ids[begun:]]


class ChatTeller:
  """Tells of an answer in a chat."""

  def __init__(self, tokenizer: ChatTokenizer):
    """Has told nothing yet."""
    self._tokenizer = tokenizer
    self._told = 0

  def tell(self, answer: Answer) -> dict[str, Any]:
    """As `TextTeller.tell`."""
    more = answer.likelihoods[self._told :]
    self._told += len(more)
    content = [
      {
        **self._one(told.token, told.log_prob),
        'top_logprobs': [self._one(*top) for top in told.top],
      }
      for told in more
    ]
    return {'content': content, 'refusal': None}

  def _one(self, token: int, log_prob: float) -> dict[str, Any]:
    text = _text(token, self._tokenizer)
    spelled = None if '\ufffd' in text else [*text.encode()]
    return {'token': text, 'logprob': log_prob, 'bytes': spelled}


def _top(told: Likelihood, tokenizer: ChatTokenizer) -> dict[str, float]:
  """The likeliest and the token itself, by text; of those that say the same, the likelier."""
  found: dict[str, float] = {}
  for token, log_prob in (*told.top, (told.token, told.log_prob)):
    text = _text(token, tokenizer)
    found[text] = max(log_prob, found.get(text, log_prob))
  return found


@functools.lru_cache(maxsize=2**16)
def _text(token: int, tokenizer: ChatTokenizer) -> str:
  first = tokenizer.encode_plain('a')
  decode = lambda ids: tokenizer.decode(ids, skip_special=False)
  return decode([*first, token])[len(decode(first)) :]


class _Everything:
  """Decodes what is special too."""

  def __init__(self, tokenizer: ChatTokenizer):
    self._tokenizer = tokenizer

  def decode(self, ids: Sequence[int]) -> str:
    return self._tokenizer.decode(ids, skip_special=False)


class _Offsets:
  """Where tokens begin in the text that they make, one after the other."""

  def __init__(self, decoder: Decoder, start: int = 0):
    self._stream, self._at = TextStream(decoder), start

  def next(self, token: int) -> int:
    """Of one more."""
    begin = self._at
    self._at += len(self._stream.push(token))
    return begin

"""A request, and the answer to it as it comes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np

from lora_jax.hub.tokenizer import ChatTokenizer
from lora_jax.sampling import GREEDY, Sampling
from lora_jax.serve.library import Listing
from lora_jax.serve.likelihood import Likelihood
from lora_jax.serve.looking import Shown
from lora_jax.text_stream import TextStream, Until

# How an answer ended: at the end of the turn or before a stop string; with its last token;
# because nobody wants it any more; because of an error.
Finish: TypeAlias = Literal['stop', 'length', 'cancelled', 'failed']


@dataclasses.dataclass(frozen=True)
class Request:
  """What is asked.

  Attributes:
    prompt: token ids.
    adapter: by name; '': none.
    max_tokens: the longest answer; None: as long as there is room for.
    sampling: how tokens are chosen. What they are depends on no other request.
    stop: strings that end the answer, and are not in it.
    likeliest: how many of the likeliest tokens are told beside each token's likelihood; None:
      no likelihoods are told.
    echo: whether those of the prompt are told too; the answer may then be of no tokens.
    images: those that the prompt has a token for each embedding of, in order.
  """

  prompt: Sequence[int]
  adapter: str = ''
  max_tokens: int | None = None
  sampling: Sampling = GREEDY
  stop: Sequence[str] = ()
  likeliest: int | None = None
  echo: bool = False
  images: Sequence[Shown] = ()


class Answer:
  """What has been said to a request so far. The engine's thread alone changes it.

  Attributes:
    request: what was asked.
    seen: values_ED of its images until they are read, or None where it has none.
    listing: the adapter that it names, or None.
    cost: to what length its prompt is padded.
    limit: tokens that it may have.
    ids: its tokens; one that ends the turn is not among them.
    text: what they say, up to a stop string. While it goes on, what is no whole character
      or may become a stop string is missing.
    finish: how it ended; None: it goes on.
    error: what failed.
    likelihoods: of its tokens, where they are asked for; of one that ends the turn too.
    of_prompt: those of the prompt's tokens from the second on, where they are asked for.
  """

  def __init__(
    self,
    request: Request,
    listing: Listing | None,
    cost: int,
    limit: int,
    tokenizer: ChatTokenizer,
    deliver: Callable[['Answer', str], None],
    seen: np.ndarray | None = None,
  ):
    """Starts empty; `deliver` as in `Engine.submit`."""
    self.seen = seen
    self.request, self.listing, self.cost, self.limit = request, listing, cost, limit
    self.ids: list[int] = []
    self.text = ''
    self.finish: Finish | None = None
    self.error = ''
    self.likelihoods: list[Likelihood] = []
    self.of_prompt: list[Likelihood] = []
    self._eos_id = tokenizer.eos_id
    self._stream, self._until = TextStream(tokenizer), Until(request.stop)
    self._deliver = deliver

  def skip(self) -> None:
    """Ends it before its first token, since none is wanted."""
    self._end('length', '')

  def push(self, token_id: int) -> None:
    """Takes the next token, with which it may end."""
    if token_id == self._eos_id:
      return self._end('stop', self._rest())
    self.ids.append(token_id)
    piece = self._until.push(self._stream.push(token_id))
    if self._until.met:
      return self._end('stop', piece)
    if len(self.ids) == self.limit:
      return self._end('length', piece + self._rest())
    if piece:
      self.text += piece
      self._deliver(self, piece)
    return None

  def cancel(self) -> None:
    """Ends it, because nobody wants it."""
    self._end('cancelled', '')

  def fail(self, error: str) -> None:
    """Ends it, because of an error."""
    self.error = error
    self._end('failed', '')

  def _rest(self) -> str:
    piece = self._until.push(self._stream.rest())
    return piece if self._until.met else piece + self._until.rest()

  def _end(self, finish: Finish, piece: str) -> None:
    self.finish = 'stop' if self._until.met else finish
    self.text += piece
    self._deliver(self, piece)

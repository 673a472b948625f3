"""A conversation with a base or its adapter, the answer streamed as it comes.

  answerer = Answerer(model, tokenizer, context=2048, max_new_tokens=256)
  voice = answerer.voice(params)
  chat = Chat(answerer)
  for text in chat.ask('Which organ makes bile?', voice):
    print(text, end='', flush=True)

The prompt runs once, padded to one of few lengths; then each token is a step whose cache
is updated in place. Every turn renders the whole chat anew, as training rows are, so that
what the model sees does not depend on how it came about.
"""

import dataclasses
import functools
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.data.messages import Messages, fit_prompt
from lora_jax.errors import UserError
from lora_jax.head import head_kernel, logits
from lora_jax.hub.tokenizer import ChatTokenizer
from lora_jax.kernels import Kernel
from lora_jax.sampling import GREEDY, Draw, Sampling, choose
from lora_jax.text_stream import TextStream
from lora_jax.transformer import NOWHERE, KeyValues, Transformer

# Prompts are padded to this times a power of two: each length is a program to compile.
_SHORTEST = 128


@dataclasses.dataclass(frozen=True)
class Voice:
  """Parameters to answer with, adapters attached or not, and their head laid out once."""

  params: Mapping[str, Any]
  head: Kernel


class Answerer:
  """Continues token ids one at a time."""

  def __init__(
    self,
    model: Transformer,
    tokenizer: ChatTokenizer,
    context: int,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
  ):
    """Compiles nothing yet.

    Args:
      model: the Transformer.
      tokenizer: the base's.
      context: tokens of prompt and answer together.
      max_new_tokens: the longest answer; at most half of the context.
      sampling: how tokens are chosen.
    """
    self._model = model
    self.tokenizer = tokenizer
    self.max_new_tokens = min(max_new_tokens, context // 2)
    self.prompt_limit = context - self.max_new_tokens
    self._sampling = sampling
    self._key = jax.random.key(sampling.seed)

  def voice(self, params: Mapping[str, Any]) -> Voice:
    """Lays out what does not change from token to token."""
    return Voice(params, jax.jit(head_kernel, static_argnums=0)(self._model, params))

  def ids(self, voice: Voice, prompt: list[int]) -> Iterator[int]:
    """Generates token ids up to the end of the turn, which is not among them."""
    self._key, key = jax.random.split(self._key)
    held = self._sampling
    draw = Draw(key, held.temperature, held.top_p, held.top_k)
    tokens_1T = np.zeros((1, self._padded(len(prompt))), np.int32)
    tokens_1T[0, : len(prompt)] = prompt
    length = np.int32(len(prompt))
    token, prompt_kv = _prefill(self._model, voice.params, voice.head, tokens_1T, length, draw)
    own_kv = KeyValues.empty(self._model.config, 1, self.max_new_tokens, self._model.dtype)
    for step in range(self.max_new_tokens):
      token_id = int(token)
      if token_id == self.tokenizer.eos_id:
        return
      yield token_id
      if step + 1 < self.max_new_tokens:
        token, own_kv = _decode(
          self._model, voice.params, voice.head, prompt_kv, own_kv, token, length, step, draw
        )

  def _padded(self, length: int) -> int:
    padded = _SHORTEST
    while padded < length:
      padded *= 2
    return padded


class Chat:
  """The turns so far, of which the oldest go where the context ends."""

  def __init__(self, answerer: Answerer, system: str | None = None):
    """Starts a conversation; `system` None leaves the template's own default."""
    self._answerer = answerer
    self._system = system
    self.dropped = 0
    self.reset()

  def reset(self) -> None:
    """Forgets all turns but the system's."""
    system = self._system
    self.messages: Messages = () if system is None else ({'role': 'system', 'content': system},)

  def ask(self, text: str, voice: Voice) -> Generator[str]:
    """Adds a turn of the user and streams the answer, which becomes a turn as far as it got.

    `dropped` says how many of the oldest turns had to go. Where the answer is abandoned
    before its first token, the question is forgotten too.

    Raises:
      UserError: the turn alone is longer than the context, or the template refuses it.
    """
    asked = (*self.messages, {'role': 'user', 'content': text})
    limit = self._answerer.prompt_limit
    fitted = fit_prompt(asked, self._answerer.tokenizer, limit)
    if fitted is None:
      raise UserError(f'this turn alone is longer than {limit} tokens; say it in fewer words')
    prompt, kept = fitted
    self.dropped = len(asked) - len(kept)
    stream, said = TextStream(self._answerer.tokenizer), False
    try:
      for token_id in self._answerer.ids(voice, prompt):
        said = True
        piece = stream.push(token_id)
        if piece:
          yield piece
      said = True
      rest = stream.rest()
      if rest:
        yield rest
    finally:
      if said:
        self.messages = (*kept, {'role': 'assistant', 'content': stream.text})


@functools.partial(jax.jit, static_argnames='model')
def _prefill(
  model: Transformer,
  params: Mapping[str, Any],
  head: Kernel,
  tokens_1T: jax.Array,
  length: jax.Array,
  draw: Draw,
) -> tuple[jax.Array, KeyValues]:
  """The token after a prompt padded on the right, and the prompt's keys and values."""
  prompt_kv: Any
  hidden_1TD, prompt_kv = model.apply({'params': params}, tokens_1T)
  last_1D = jax.lax.dynamic_index_in_dim(hidden_1TD[0], length - 1)
  return choose(logits(model, last_1D, head)[0], jnp.int32(0), draw), prompt_kv


@functools.partial(jax.jit, static_argnames='model', donate_argnames='own_kv')
def _decode(
  model: Transformer,
  params: Mapping[str, Any],
  head: Kernel,
  prompt_kv: KeyValues,
  own_kv: KeyValues,
  token: jax.Array,
  length: jax.Array,
  step: jax.Array,
  draw: Draw,
) -> tuple[jax.Array, KeyValues]:
  """The token after `token`, the answer's number `step`."""
  slots_T = jnp.arange(prompt_kv.k_LBKSH.shape[3])
  prompt_1T = jnp.where(slots_T < length, slots_T, NOWHERE)[None]
  own_S = jnp.arange(own_kv.k_LBKSH.shape[3])
  own_1S = jnp.where(own_S < step, length + own_S, NOWHERE)[None]
  new_kv: Any
  hidden_11D, new_kv = model.apply(
    {'params': params},
    token[None, None],
    (length + step)[None, None],
    past=((prompt_kv, prompt_1T), (own_kv, own_1S)),
  )
  logits_V = logits(model, hidden_11D[0], head)[0]
  return choose(logits_V, step + 1, draw), own_kv.write(new_kv, step)

"""Byte-level BPE with a chat template, from GGUF metadata or with no merges at all.

    tokenizer = from_gguf(gguf.open_file(path))
    ids = tokenizer.encode_chat([{'role': 'user', 'content': 'Which organ makes bile?'}])
    text = tokenizer.decode(generated_ids)

Text in a dataset row is data, and may hold something that looks like a special
token. `encode_chat` never lets it become one; `encode` does, and is meant for text
that is trusted, such as a rendered chat in a test.
"""

import datetime
import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.sandbox
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lora_jax.errors import UserError
from lora_jax.hub.gguf import GgufFile

Messages = Sequence[Mapping[str, str]]

# Token types of GGUF (llama.cpp, enum llama_token_type).
_CONTROL, _USER_DEFINED = 3, 4

_LONE_SURROGATE = re.compile('[\ud800-\udfff]')
_PRIVATE_USE = range(0xE000, 0xF900)


class ChatTokenizer:
  """Turns text and chats into token ids, and back.

  Attributes:
    vocab_size: number of tokens.
    eos_id: the token that ends a turn.
    pad_id: the token to pad with; may equal `eos_id`.
    bos_id: the token that begins a text, or None. No method adds it.
    special_tokens: text of each special token -> its id.
  """

  def __init__(
    self,
    *,
    tokens: Sequence[str],
    merges: Sequence[tuple[str, str]],
    special_ids: Collection[int],
    user_defined_ids: Collection[int] = (),
    chat_template: str,
    eos_id: int,
    pad_id: int,
    bos_id: int | None = None,
  ):
    """Builds the tokenizer.

    Args:
      tokens: text of every token, in the byte-level alphabet of GPT-2.
      merges: pairs of tokens in order of priority.
      special_ids: ids that only a template or a model may produce.
      user_defined_ids: ids that are found in any text before BPE, even in data.
      chat_template: Jinja source, as Hugging Face's tokenizers have it.
      eos_id: the token that ends a turn.
      pad_id: the token to pad with.
      bos_id: the token that begins a text, or None.
    """
    self.vocab_size = len(tokens)
    self.eos_id = eos_id
    self.pad_id = pad_id
    self.bos_id = bos_id
    self.special_tokens = {tokens[i]: i for i in special_ids}
    self._chat_template = chat_template
    self._template_names = {
      'bos_token': '' if bos_id is None else tokens[bos_id],
      'eos_token': tokens[eos_id],
      'pad_token': tokens[pad_id],
    }
    vocab = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab=vocab, merges=list(merges))
    user_defined = [AddedToken(tokens[i], normalized=False) for i in user_defined_ids]
    # Two tokenizers over one model, since the switch that ignores special tokens is
    # mutable state, not safe between threads and lost in a pickle.
    self._plain = _bpe(model, user_defined)
    self._full = _bpe(model, user_defined)
    self._full.add_special_tokens(
      [AddedToken(token, normalized=False, special=True) for token in self.special_tokens]
    )

  def render(self, messages: Messages, add_generation_prompt: bool = True) -> str:
    """The chat as text.

    Args:
      messages: turns, each with the strings 'role' and 'content'.
      add_generation_prompt: whether to end with the opening of an assistant turn.

    Raises:
      UserError: the template refuses the messages.
    """
    try:
      return _compile(self._chat_template).render(
        messages=messages, add_generation_prompt=add_generation_prompt, **self._template_names
      )
    except jinja2.TemplateError as error:
      raise UserError(f'the chat template refuses these messages: {_one_line(error)}') from error

  def encode(self, text: str) -> list[int]:
    """Ids of trusted text: special tokens written out in it become those tokens."""
    return self._full.encode(_whole(text), add_special_tokens=False).ids

  def encode_plain(self, text: str) -> list[int]:
    """Ids of untrusted text: none of them is special, whatever the text says."""
    return self._plain.encode(_whole(text), add_special_tokens=False).ids

  def encode_chat(self, messages: Messages, add_generation_prompt: bool = True) -> list[int]:
    """Ids of a chat in which only the template may put special tokens.

    Use this for anything that comes from a dataset or a client: a row cannot end
    its turn or open another. It equals `encode(render(...))` when no message holds
    the text of a special token.

    Raises:
      UserError: the template refuses the messages.
    """
    names = sorted(self.special_tokens, key=len, reverse=True)
    special = re.compile('|'.join(map(re.escape, names)) or r'(?!)')
    everything = '\n'.join(value for message in messages for value in message.values())
    if not special.search(everything):
      return self.encode(self.render(messages, add_generation_prompt))

    # The text of specials in messages travels through the template in disguise, so
    # that what is found afterwards is the template's own.
    used = set(everything)
    mark = next(chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    disguise = lambda found: f'{mark}{self.special_tokens[found[0]]}{mark}'
    masked = [
      {key: special.sub(disguise, value) for key, value in message.items()} for message in messages
    ]
    text = self.render(masked, add_generation_prompt)
    by_id = {str(i): token for token, i in self.special_tokens.items()}
    reveal = lambda part: re.sub(f'{mark}([0-9]+){mark}', lambda found: by_id[found[1]], part)
    ids, start = [], 0
    for found in special.finditer(text):
      ids += self.encode_plain(reveal(text[start : found.start()]))
      ids.append(self.special_tokens[found[0]])
      start = found.end()
    return ids + self.encode_plain(reveal(text[start:]))

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
    return self._full.decode([int(i) for i in ids], skip_special_tokens=skip_special)

  def offsets(self, text: str) -> list[tuple[int, int]]:
    """Start and end character in `text` of each token of `encode_plain(text)`.

    Tokens that share one character, as parts of an emoji, all span it. A character
    without a token (in SmolLM2 a few control characters, as in its published form) is
    left out of the ids, and the offsets after it in its word lie too early.
    """
    return self._plain.encode(_whole(text), add_special_tokens=False).offsets

  def fit(self, text: str, max_tokens: int) -> int:
    """How many leading characters of `text` take at most `max_tokens` tokens.

    `len(encode_plain(text[:fit(text, n)])) <= n` always holds. Text that stands
    around the cut can move a count by a token or two: count the whole chat again.
    """
    offsets = self.offsets(text)
    if len(offsets) <= max_tokens:
      return len(text)
    # The first token left out may begin inside a character that is half covered.
    end = offsets[max(max_tokens, 0)][0]
    # Without the text after it, the last piece may split otherwise (whitespace).
    while end and len(self.encode_plain(text[:end])) > max_tokens:
      end -= 1
    return end


def from_gguf(file: GgufFile) -> ChatTokenizer:
  """Builds the tokenizer that a GGUF file describes in its metadata.

  Raises:
    UserError: it is not byte-level BPE with the pre-tokenizer `smollm`, or it has
      no chat template.
  """
  kind = file.require('tokenizer.ggml.model', str)
  if kind != 'gpt2':
    raise UserError(
      f'{file.path}: tokenizer model {kind!r} is not supported; give a file with byte-level BPE '
      "('gpt2')"
    )
  pre_tokenizer = file.require('tokenizer.ggml.pre', str, 'default')
  if pre_tokenizer != 'smollm':
    raise UserError(
      f"{file.path}: pre-tokenizer {pre_tokenizer!r} is not supported; give a file with 'smollm' "
      '(the SmolLM and SmolLM2 families)'
    )
  template = file.require('tokenizer.chat_template', str, '')
  if not template:
    raise UserError(f'{file.path}: has no chat template; give an instruct model')
  tokens = file.require('tokenizer.ggml.tokens', list)
  types = file.require('tokenizer.ggml.token_type', list)
  merges = [tuple(merge.split(' ')) for merge in file.require('tokenizer.ggml.merges', list)]
  text_end = file.require('tokenizer.ggml.eos_token_id', int)
  turn_end = file.require('tokenizer.ggml.eot_token_id', int, text_end)
  bos_id = file.metadata.get('tokenizer.ggml.bos_token_id')
  pad_id = file.require('tokenizer.ggml.padding_token_id', int, text_end)
  if len(types) != len(tokens):
    raise UserError(
      f'{file.path}: has {len(tokens)} tokens but {len(types)} token types; convert it again'
    )
  outside = [i for i in (turn_end, pad_id, bos_id) if i is not None and i >= len(tokens)]
  if outside:
    raise UserError(
      f'{file.path}: names token {outside[0]} of {len(tokens)}; convert the model again'
    )
  try:
    _compile(template)
    return ChatTokenizer(
      tokens=tokens,
      merges=merges,
      special_ids=[i for i, kind in enumerate(types) if kind == _CONTROL],
      user_defined_ids=[i for i, kind in enumerate(types) if kind == _USER_DEFINED],
      chat_template=template,
      eos_id=turn_end,
      pad_id=pad_id,
      bos_id=bos_id,
    )
  except jinja2.TemplateError as error:
    raise UserError(
      f'{file.path}: its chat template does not parse ({_one_line(error)}); give another file'
    ) from error
  # `tokenizers` raises a bare Exception when a merge names an unknown token.
  except Exception as error:
    raise UserError(
      f'{file.path}: its vocabulary is not usable ({_one_line(error)}); convert the model again'
    ) from error


def _bpe(model: models.BPE, user_defined: Sequence[AddedToken]) -> Tokenizer:
  """The pre-tokenizer `smollm`: single digits, then GPT-2's words, as bytes."""
  tokenizer = Tokenizer(model)
  digits = pre_tokenizers.Digits(individual_digits=True)
  words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_tokens(list(user_defined))
  return tokenizer


def _whole(text: str) -> str:
  """Half a surrogate pair, which JSON allows, is not text that can be encoded."""
  return _LONE_SURROGATE.sub('\ufffd', text)


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split())


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
  """A chat template with the same environment as in Hugging Face transformers."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
  )

  def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

  # Jinja's own filter escapes HTML, which a prompt is not.
  def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

  environment.filters['tojson'] = tojson
  environment.globals['raise_exception'] = raise_exception
  environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
  return environment.from_string(source)

"""The tokenizer that a GGUF file describes in its metadata.

    tokenizer = from_gguf(gguf.open_file(path))

Two kinds exist there. 'gpt2' is byte-level BPE with merges, and names how text is split
before: that is code in llama.cpp (src/llama-vocab.cpp), of which the splits of our
families are here. 'llama' is SentencePiece's BPE, which merges by score and falls back
to bytes. What differs from llama.cpp: Qwen's text is normalised (NFC), as in its
published tokenizer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.errors import UserError, one_line
from lora_jax.hub import tokenizer_json
from lora_jax.hub.chat_template import PLAIN, ChatTemplate
from lora_jax.hub.gguf import GgufFile
from lora_jax.hub.tokenizer import ChatTokenizer

# Token types of GGUF (llama.cpp, enum llama_token_type).
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6

_SPACE = '\u2581'


def from_gguf(file: GgufFile) -> ChatTokenizer:
  """Builds the tokenizer of `file`; one without a chat template gets `PLAIN`.

  Raises:
    UserError: it is of a kind or has a pre-tokenizer that is not known, or its parts
      do not fit together.
  """
  kind = file.require('tokenizer.ggml.model', str)
  if kind not in _KINDS:
    raise UserError(
      f'{file.path}: tokenizer model {kind!r} is not supported; give a file with '
      + ' or '.join(map(repr, _KINDS))
    )
  tokens = _items(file, 'tokens', str)
  types = _items(file, 'token_type', int)
  if len(types) != len(tokens):
    raise UserError(
      f'{file.path}: has {len(tokens)} tokens but {len(types)} token types; convert it again'
    )
  ids = _named_ids(file, len(tokens))
  begins_with_bos = file.metadata.get('tokenizer.ggml.add_bos_token', kind == 'llama')
  source = file.require('tokenizer.chat_template', str, '') or PLAIN
  names = {f'{name}_token': tokens[i] for name, i in ids.items() if name != 'eot'}
  template = ChatTemplate(source, {**names, 'begins_with_bos': begins_with_bos and 'bos' in ids})
  template.check(str(file.path))

  ordinary = {i for i, kind in enumerate(types) if kind == _USER_DEFINED}
  special = {i for i, kind in enumerate(types) if kind == _CONTROL} | set(ids.values())
  added = {tokens[i]: i for i in ordinary | special}
  turn_end = template.turn_end(added)
  # Data must not spell out a turn, however the file types the tokens that make one.
  special |= {added[token] for token in template.turn_tokens(added)}
  eos_id = ids.get('eot', ids['eos']) if turn_end is None else added[turn_end]
  special.add(eos_id)
  data = _KINDS[kind](file, tokens, types, special, ordinary - special)
  try:
    full, plain, inner = tokenizer_json.build(data, {tokens[i] for i in special})
  # `tokenizers` raises a bare Exception when a merge names an unknown token.
  except Exception as error:
    raise UserError(
      f'{file.path}: its vocabulary is not usable ({one_line(error)}); convert the model again'
    ) from error
  return ChatTokenizer(
    full,
    plain,
    template,
    eos_id=eos_id,
    pad_id=ids.get('pad', ids['eos']),
    bos_id=ids.get('bos'),
    inner=inner,
  )


def _items(file: GgufFile, name: str, kind: type) -> list[Any]:
  """A list of the vocabulary; the items of a list are all of one type in GGUF."""
  key = f'tokenizer.ggml.{name}'
  items = file.require(key, list)
  if items and type(items[0]) is not kind:
    raise UserError(f'{file.path}: {key} does not hold {kind.__name__}; convert the model again')
  return items


def _named_ids(file: GgufFile, num_tokens: int) -> dict[str, int]:
  """The ids that the file has a name for, by the names that templates use."""
  keys = {'bos': 'bos', 'eos': 'eos', 'eot': 'eot', 'pad': 'padding', 'unk': 'unknown'}
  ids = {}
  for name, key in keys.items():
    key = f'tokenizer.ggml.{key}_token_id'
    if name != 'eos' and file.metadata.get(key) is None:
      continue
    ids[name] = file.require(key, int)
    if not 0 <= ids[name] < num_tokens:
      raise UserError(
        f'{file.path}: {key} names token {ids[name]} of {num_tokens}; convert the model again'
      )
  return ids


# Byte-level BPE.


def _contractions_and_words(digits: str) -> dict[str, Any]:
  """The split of Llama 3 and Qwen 2, which differ in how many digits stay together."""
  pattern = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + digits
    + r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
  )
  split = {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}
  return {'type': 'Sequence', 'pretokenizers': [split, {**_WORDS, 'use_regex': False}]}


_WORDS = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
_DIGITS = {'type': 'Digits', 'individual_digits': True}
_SMOLLM = {'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [_DIGITS, _WORDS]}}
_GPT2 = {'pre_tokenizer': _WORDS}
_LLAMA3 = {'pre_tokenizer': _contractions_and_words(r'\p{N}{1,3}'), 'ignore_merges': True}
_QWEN2 = {'pre_tokenizer': _contractions_and_words(r'\p{N}'), 'normalizer': {'type': 'NFC'}}

# tokenizer.ggml.pre -> what it stands for. 'default' is what a converter writes that
# does not know the tokenizer; GPT-2's words are the usual ones.
_PRE_TOKENIZERS: Mapping[str, dict[str, Any]] = {
  'smollm': _SMOLLM,
  'gpt-2': _GPT2,
  'gpt2': _GPT2,
  'default': _GPT2,
  'llama-bpe': _LLAMA3,
  'llama3': _LLAMA3,
  'llama-v3': _LLAMA3,
  'smaug-bpe': {**_LLAMA3, 'ignore_merges': False},
  'qwen2': _QWEN2,
}


def _byte_level(file, tokens, types, special, ordinary) -> dict[str, Any]:
  name = file.require('tokenizer.ggml.pre', str, 'default')
  if name not in _PRE_TOKENIZERS:
    raise UserError(
      f'{file.path}: pre-tokenizer {name!r} is not supported; give a file with '
      + ', '.join(map(repr, _PRE_TOKENIZERS))
      + ", or the model's directory from the Hugging Face hub"
    )
  merges = _items(file, 'merges', str)
  return tokenizer_json.byte_level(tokens, merges, special, ordinary, **_PRE_TOKENIZERS[name])


# SentencePiece.


def _sentencepiece(file, tokens, types, special, ordinary) -> dict[str, Any]:
  scores = _items(file, 'scores', float)
  if len(scores) != len(tokens):
    raise UserError(
      f'{file.path}: has {len(tokens)} tokens but {len(scores)} scores; convert it again'
    )
  prefix = file.require('tokenizer.ggml.add_space_prefix', bool, True)
  normalizers: list[Any] = [{'type': 'Prepend', 'prepend': _SPACE}] if prefix else []
  normalizers.append({'type': 'Replace', 'pattern': {'String': ' '}, 'content': _SPACE})
  decoders: list[Any] = [
    {'type': 'Replace', 'pattern': {'String': _SPACE}, 'content': ' '},
    {'type': 'ByteFallback'},
    {'type': 'Fuse'},
  ]
  if prefix:
    decoders.append({'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0})
  unknown = file.metadata.get('tokenizer.ggml.unknown_token_id')
  return {
    'normalizer': {'type': 'Sequence', 'normalizers': normalizers},
    'pre_tokenizer': None,
    'decoder': {'type': 'Sequence', 'decoders': decoders},
    'added_tokens': tokenizer_json.added_tokens(tokens, special, ordinary),
    'model': {
      'type': 'BPE',
      'vocab': {token: i for i, token in enumerate(tokens)},
      'merges': merges_by_score(tokens, scores, types),
      'unk_token': None if unknown is None else tokens[unknown],
      'fuse_unk': True,
      'byte_fallback': _BYTE in types,
    },
  }


def merges_by_score(
  tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
  """SentencePiece's vocabulary as merges in order of priority.

  It merges the neighbours whose union has the best score (Kudo and Richardson 2018);
  so every way of cutting a token in two is a merge, and its score is its priority. Of
  equal ones, as runs of spaces may be, the leftmost come first: the longest left parts.
  """
  ids = {token: i for i, token in enumerate(tokens)}
  found = []
  for token, score, kind in zip(tokens, scores, types, strict=True):
    if kind != _NORMAL:
      continue
    for cut in range(1, len(token)):
      left, right = token[:cut], token[cut:]
      if left in ids and right in ids:
        found.append((-score, -cut, left, right))
  found.sort(key=lambda merge: merge[:2])
  return [(left, right) for _, _, left, right in found]


_KINDS = {'gpt2': _byte_level, 'llama': _sentencepiece}

"""A tokenizer.json as the tokenizers of a `ChatTokenizer`.

    full, plain, inner = build(json.loads(text), special={'<s>', '</s>'})

The format is that of Hugging Face's `tokenizers`. Of its models BPE is taken, which all
families of bases here have.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from lora_jax.errors import UserError

_MODEL_OPTIONS = (
  'continuing_subword_prefix',
  'end_of_word_suffix',
  'fuse_unk',
  'byte_fallback',
  'ignore_merges',
)
_FLAGS = ('single_word', 'lstrip', 'rstrip', 'normalized')


def check(data: Mapping[str, Any], where: str) -> None:
  """Raises `UserError` for a kind of tokenizer that `build` does not take.

  Args:
    data: as `build`.
    where: the file, for the message.
  """
  model = data['model']
  kind = model.get('type', 'BPE')
  if kind != 'BPE':
    raise UserError(
      f'{where}: its model is {kind!r}, which is not supported; give a base with a BPE tokenizer'
    )
  if model.get('ignore_merges') and '"ByteLevel"' not in json.dumps(data.get('pre_tokenizer')):
    raise UserError(
      f'{where}: model.ignore_merges is supported for byte-level tokenizers only; '
      'give a base with another tokenizer'
    )


def build(
  data: Mapping[str, Any], special: Collection[str]
) -> tuple[Tokenizer, Tokenizer, Tokenizer]:
  """Builds the tokenizers over one vocabulary.

  Args:
    data: the parsed file: 'model' with 'vocab' and 'merges', 'added_tokens', and the
      normalizer, pre_tokenizer and decoder.
    special: text of the added tokens that only a template or a model may produce.

  Returns:
    `full`, which finds special tokens in text; `plain`, which never gives one; `inner`,
    which is `plain` for text that does not stand at the beginning (the same object
    where that makes no difference).

  Raises:
    Exception: as `tokenizers` has it, where the data is not what the format promises.
  """
  model = data['model']
  added = data.get('added_tokens') or []
  # All ids stand in the vocabulary, so that none depends on the order of adding.
  vocab = {entry['content']: entry['id'] for entry in added} | model['vocab']
  special = frozenset(special)
  # No text may grow into a special token that it does not spell out, as it could where
  # a normaliser rewrites it.
  merges = [
    (left, right)
    for left, right in map(_pair, model['merges'])
    if special.isdisjoint((left, right, left + right))
  ]
  # Whole words are looked up in the vocabulary, and the unknown token must not be one.
  unknown = None if model.get('ignore_merges') else model.get('unk_token')
  options = {name: model[name] for name in _MODEL_OPTIONS if model.get(name) is not None}

  def tokenizer(shell: Tokenizer, vocab: Mapping[str, int], tokens: Sequence[Any]) -> Tokenizer:
    shell.model = models.BPE(
      vocab=_without_holes(vocab), merges=merges, unk_token=unknown, **options
    )
    # All at once: each call builds the search for them anew.
    shell.add_special_tokens(
      [_added(entry, True) for entry in tokens if entry['content'] in special]
    )
    shell.add_tokens([_added(entry, False) for entry in tokens if entry['content'] not in special])
    return shell

  ordinary = [entry for entry in added if entry['content'] not in special]
  text_vocab = {token: i for token, i in vocab.items() if token not in special or token == unknown}
  full = tokenizer(_shell(data), vocab, added)
  plain = tokenizer(_shell(data), text_vocab, ordinary)
  continued = _never_first(data.get('pre_tokenizer'))
  if continued == data.get('pre_tokenizer'):
    return full, plain, plain
  inner = tokenizer(_shell({**data, 'pre_tokenizer': continued}), text_vocab, ordinary)
  return full, plain, inner


def byte_level(
  tokens: Sequence[str],
  merges: Sequence[Any],
  special: Collection[int],
  ordinary: Collection[int] = (),
  **parts: Any,
) -> dict[str, Any]:
  """A byte-level BPE in the format of tokenizer.json.

  Args:
    tokens: text of every token; those that come of merges in GPT-2's alphabet of bytes.
    merges: pairs of tokens in order of priority, as pairs or split by a space.
    special: ids of special tokens.
    ordinary: ids of the other tokens that are found in any text before BPE.
    **parts: 'normalizer', 'pre_tokenizer' (default: GPT-2's words) and options of the
      model.
  """
  words = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
  return {
    'normalizer': parts.pop('normalizer', None),
    'pre_tokenizer': parts.pop('pre_tokenizer', words),
    'decoder': words,
    'added_tokens': added_tokens(tokens, special, ordinary),
    'model': {
      'type': 'BPE',
      'vocab': {token: i for i, token in enumerate(tokens)},
      'merges': merges,
      **parts,
    },
  }


def added_tokens(
  tokens: Sequence[str], special: Collection[int], ordinary: Collection[int]
) -> list[dict[str, Any]]:
  """The entry 'added_tokens' for those ids of `tokens`."""
  kinds = dict.fromkeys(ordinary, False) | dict.fromkeys(special, True)
  return [{'id': i, 'content': tokens[i], 'special': kinds[i]} for i in sorted(kinds)]


def _shell(data: Mapping[str, Any]) -> Tokenizer:
  """All of a tokenizer but its vocabulary; nothing that cuts, pads or adds tokens."""
  kept = {name: data.get(name) for name in ('normalizer', 'pre_tokenizer', 'decoder')}
  empty = {'type': 'BPE', 'vocab': {}, 'merges': []}
  rest = {'version': '1.0', 'truncation': None, 'padding': None, 'post_processor': None}
  return Tokenizer.from_str(json.dumps({**rest, 'added_tokens': [], **kept, 'model': empty}))


def _added(entry: Mapping[str, Any], special: bool) -> AddedToken:
  flags = {name: entry.get(name, False) for name in _FLAGS}
  if special:
    # It stands in text as it is written, or not at all.
    flags['normalized'] = False
  return AddedToken(entry['content'], special=special, **flags)


def _pair(merge: Any) -> tuple[str, str]:
  left, right = merge.split(' ') if isinstance(merge, str) else merge
  return left, right


def _without_holes(vocab: Mapping[str, int]) -> dict[str, int]:
  """Fills unused ids, which a pickled tokenizer would warn of, with tokens that no text gives.

  BPE begins with single characters and only merges lead to longer tokens. Where whole
  words are looked up instead, words are bytes in an alphabet that has no NUL.
  """
  unused = set(range(max(vocab.values(), default=-1) + 1)) - set(vocab.values())
  return {**vocab, **{f'\x00unused {i}': i for i in sorted(unused)}}


def _never_first(part: Any) -> Any:
  """A pre-tokenizer without the space that it sets before the beginning of a text."""
  if isinstance(part, list):
    return [_never_first(item) for item in part]
  if not isinstance(part, dict):
    return part
  part = {key: _never_first(value) for key, value in part.items()}
  if part.get('type') == 'Metaspace' and part.get('prepend_scheme') == 'first':
    part.pop('add_prefix_space', None)
    part['prepend_scheme'] = 'never'
  return part

"""Small tokenizers in the forms that the families publish, as directories and as JSON.

Each is a tokenizer.json in the layout of one family, over a vocabulary learned from a
few sentences: byte-level ones as in Llama 3 and Qwen 2, SentencePiece-like ones as in
Llama 2, Mistral and Gemma.
"""

import functools
import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXT = [
  'The liver makes bile, which the gallbladder keeps until it is wanted.',
  "It's 2024 and we'll count: 10, 100, 1000; they've got 12345 of them.",
  'def add(x, y):\n  return x + y  # the sum of both\n\n',
  'Der Würfel fällt, naïve Straße, 日本語の文, and the <b>rest</b> of the words.',
  '<|im_start|> <s> </s> [INST] end of turn start of turn',
]
SPACE = '\u2581'
BYTES = [f'<0x{byte:02X}>' for byte in range(256)]

CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Forms in which a space, or nothing, stands between a special token and text.
INST = (
  "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
  "{{ ' ' + m['content'] + eos_token }}{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
  '{% endif %}{% endfor %}'
)
TURNS = (
  "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\\n' }}"
  "{{ m['content'] + '<end_of_turn>\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


@functools.cache
def learned(bytes_only):
  """Vocabulary and merges of a BPE, over bytes or over characters."""
  tokenizer = Tokenizer(models.BPE())
  if bytes_only:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
  else:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme='never')
    alphabet = [SPACE]
  trainer = trainers.BpeTrainer(
    vocab_size=600, initial_alphabet=sorted(alphabet), show_progress=False
  )
  tokenizer.train_from_iterator(TEXT, trainer)
  model = json.loads(tokenizer.to_str())['model']
  return sorted(model['vocab'], key=model['vocab'].get), model['merges']


def _flags(i, content, special, **changes):
  flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
  return {'id': i, 'content': content, 'special': special, **flags, **changes}


def byte_level(digits, normalizer=None, ignore_merges=False):
  """As Llama 3 and Qwen 2: added tokens come after the vocabulary."""
  tokens, merges = learned(bytes_only=True)
  pattern = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r'| ?[^\s\p{L}\p{N}]+'
    r'[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
  )
  words = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
  split = {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}
  names = [('<|endoftext|>', True), ('<|im_start|>', True), ('<|im_end|>', True), ('<tool>', False)]
  return {
    'version': '1.0',
    'truncation': {'max_length': 5, 'stride': 0, 'strategy': 'LongestFirst', 'direction': 'Right'},
    'padding': None,
    'added_tokens': [_flags(len(tokens) + i, *name) for i, name in enumerate(names)],
    'normalizer': normalizer,
    'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [split, words]},
    'post_processor': words,
    'decoder': words,
    'model': {
      'type': 'BPE',
      'vocab': {token: i for i, token in enumerate(tokens)},
      'merges': merges,
      'ignore_merges': ignore_merges,
    },
  }


def sentencepiece(names, normalizers=(), pre_tokenizer=None, strip=True):
  """As Llama 2, Mistral and Gemma: special tokens, bytes, then what was learned."""
  pieces, merges = learned(bytes_only=False)
  # Special tokens that were learned too have merges that lead to them, as in Llama 2.
  first = [*(name for name, *_ in names), *BYTES]
  tokens = [*first, *(token for token in pieces if token not in first)]
  decoders = [
    {'type': 'Replace', 'pattern': {'String': SPACE}, 'content': ' '},
    {'type': 'ByteFallback'},
    {'type': 'Fuse'},
  ]
  if strip:
    decoders.append({'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0})
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': [
      _flags(i, name, special, **(flags[0] if flags else {}))
      for i, (name, special, *flags) in enumerate(names)
    ],
    'normalizer': {'type': 'Sequence', 'normalizers': list(normalizers)} if normalizers else None,
    'pre_tokenizer': pre_tokenizer,
    'post_processor': None,
    'decoder': {'type': 'Sequence', 'decoders': decoders},
    'model': {
      'type': 'BPE',
      'unk_token': '<unk>',
      'fuse_unk': True,
      'byte_fallback': True,
      'vocab': {token: i for i, token in enumerate(tokens)},
      'merges': merges,
    },
  }


_REPLACE = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE}
_PREPEND = {'type': 'Prepend', 'prepend': SPACE}
_FIRST = {'type': 'Metaspace', 'replacement': SPACE, 'prepend_scheme': 'first', 'split': False}
_LLAMA2 = [('<unk>', True), ('<s>', True), ('</s>', True)]
# Mistral's [INST] is a token of its own; here one that eats the spaces around it too.
_MISTRAL = [*_LLAMA2, ('[INST]', True), ('[/INST]', True, {'lstrip': True, 'rstrip': True})]
# The tokens of a turn are not flagged as special here, and newlines are tokens.
_GEMMA = [('<pad>', True), ('<eos>', True), ('<bos>', True), ('<unk>', True)]
_GEMMA += [('<start_of_turn>', False), ('<end_of_turn>', False), ('\n', False), ('\n\n', False)]

FORMS = {
  'llama3': (
    byte_level(r'\p{N}{1,3}', ignore_merges=True),
    CHATML,
    '<|im_start|>',
    '<|endoftext|>',
  ),
  'qwen2': (byte_level(r'\p{N}', {'type': 'NFC'}), CHATML, None, '<|endoftext|>'),
  'llama2': (sentencepiece(_LLAMA2, [_PREPEND, _REPLACE]), INST, '<s>', '</s>'),
  'mistral': (sentencepiece(_MISTRAL, pre_tokenizer=_FIRST), INST, '<s>', '</s>'),
  'gemma': (sentencepiece(_GEMMA, [_REPLACE], strip=False), TURNS, '<bos>', '<eos>'),
}


def write(directory: Path, form: str, config=None, data=None) -> Path:
  """Writes a form as a directory; `config` and `data` change entries of its two files."""
  tokenizer, template, bos, eos = FORMS[form]
  directory.mkdir(exist_ok=True)
  named = {'bos_token': bos, 'eos_token': eos, 'chat_template': template}
  named |= {'tokenizer_class': 'PreTrainedTokenizerFast', **(config or {})}
  files = {'tokenizer.json': tokenizer | (data or {}), 'tokenizer_config.json': named}
  for name, content in files.items():
    content = {
      key: value for key, value in content.items() if value is not None or key == 'bos_token'
    }
    (directory / name).write_text(json.dumps(content))
  return directory

import itertools
import pickle
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
import tiny_tokenizers
from gguf import TokenType
from texts import random_chat, random_text
from tokenizers import pre_tokenizers

from lora_jax.config import CACHE
from lora_jax.errors import UserError
from lora_jax.hub import bases, gguf, tokenizer_hf, tokenizer_save
from lora_jax.hub.tokenizer_gguf import from_gguf


@pytest.fixture(scope='module')
def base_file():
  bases.load('smollm2-135m-instruct')
  return gguf.open_file(Path(CACHE).expanduser() / 'SmolLM2-135M-Instruct.Q4_1.gguf')


@pytest.fixture(scope='module', params=['tiny', pytest.param('base', marks=pytest.mark.base)])
def chat_tokenizer(request):
  if request.param == 'tiny':
    return bases.load('tiny').tokenizer
  return from_gguf(request.getfixturevalue('base_file'))


def from_written(tmp_path, **changes):
  return from_gguf(gguf.open_file(tiny_gguf.write(tmp_path / 'a.gguf', **changes)))


# Against other implementations.


GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
SPLITS = {
  'smollm': (r'\p{N}|\P{N}+', GPT2_WORDS),
  'gpt-2': (GPT2_WORDS,),
  'llama-bpe': (LLAMA3_WORDS,),
  'qwen2': (LLAMA3_WORDS.replace('{1,3}', ''),),
}


def textbook_encode(text, tokens, merges, pre='smollm'):
  """Byte-level BPE from its definition, with llama.cpp's splits."""
  regex = pytest.importorskip('regex')
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in printable]
  alphabet = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
  ids = {token: i for i, token in enumerate(tokens)}
  ranks = {tuple(merge.split(' ')): i for i, merge in enumerate(merges)}
  words = [text]
  for split in SPLITS[pre]:
    words = [part for word in words for part in regex.findall(split, word)]
  found = []
  for word in words:
    symbols = [alphabet[b] for b in word.encode() if alphabet[b] in ids]
    if pre == 'llama-bpe' and ''.join(symbols) in ids:
      symbols = [''.join(symbols)]
    while len(symbols) > 1:
      pairs = list(itertools.pairwise(symbols))
      best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
      if best not in ranks:
        break
      merged, i = [], 0
      while i < len(symbols):
        step = 2 if tuple(symbols[i : i + 2]) == best else 1
        merged.append(''.join(symbols[i : i + step]))
        i += step
      symbols = merged
    found += [ids[symbol] for symbol in symbols]
  return found


@pytest.mark.parametrize('pre', SPLITS)
def test_splits_follow_their_definition(tmp_path, pre):
  learned, merges = tiny_tokenizers.learned(bytes_only=True)
  # A whole word that no merges lead to is found by Llama 3 alone.
  tokens = [*tiny_gguf.SPECIALS, *learned, 'Ġlambda']
  merges = [' '.join(merge) for merge in merges]
  ours = from_written(
    tmp_path,
    tokenizer__ggml__pre=pre,
    tokenizer__ggml__tokens=tokens,
    tokenizer__ggml__token_type=[3] * 3 + [1] * (len(tokens) - 3),
    tokenizer__ggml__merges=merges,
  )
  rng = np.random.default_rng(0)
  for _ in range(40):
    text = random_text(rng)
    if pre == 'qwen2':
      text = unicodedata.normalize('NFC', text)
    assert ours.encode_plain(text) == textbook_encode(text, tokens, merges, pre), repr(text)
  text = ' lambda 1234567'
  assert ours.encode_plain(text) == textbook_encode(text, tokens, merges, pre)
  assert (tokens.index('Ġlambda') in ours.encode_plain(text)) == (pre == 'llama-bpe')


def textbook_sentencepiece(text, tokens, scores, prefix):
  """SentencePiece's BPE from its definition: the neighbours whose union scores best."""
  best = dict(list(zip(tokens, scores, strict=True))[259:])
  symbols = list((('\u2581' if prefix and text else '') + text).replace(' ', '\u2581'))
  while True:
    pairs = [
      (-best[left + right], i)
      for i, (left, right) in enumerate(itertools.pairwise(symbols))
      if left + right in best
    ]
    if not pairs:
      break
    at = min(pairs)[1]
    symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
  ids = {token: i for i, token in enumerate(tokens)}
  found = []
  for symbol in symbols:
    missing = [ids[f'<0x{byte:02X}>'] for byte in symbol.encode()]
    found += [ids[symbol]] if symbol in ids else missing
  return found


def sentencepiece_file(**changes):
  """Metadata of a SentencePiece vocabulary; the order of learning is the score."""
  learned, _ = tiny_tokenizers.learned(bytes_only=False)
  names = ['<unk>', '<s>', '</s>']
  first = [*names, *tiny_tokenizers.BYTES]
  tokens = [*first, *(token for token in learned if token not in first)]
  scores = [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)]
  # As in Mistral's vocabulary, where runs of spaces all score the same.
  runs = ['\u2581' * length for length in (2, 3, 4, 5, 6)]
  tokens, scores = tokens + runs, scores + [-1e9] * len(runs)
  return {
    'tokenizer__ggml__model': 'llama',
    'tokenizer__ggml__pre': 'default',
    'tokenizer__ggml__tokens': tokens,
    'tokenizer__ggml__scores': scores,
    'tokenizer__ggml__token_type': [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
    'tokenizer__ggml__merges': None,
    'tokenizer__ggml__unknown_token_id': 0,
    'tokenizer__ggml__bos_token_id': 1,
    'tokenizer__ggml__eos_token_id': 2,
    'tokenizer__ggml__padding_token_id': None,
    'tokenizer__chat_template': tiny_tokenizers.INST,
  } | changes


@pytest.mark.parametrize('prefix', [True, False])
def test_sentencepiece_follows_its_definition(tmp_path, prefix):
  metadata = sentencepiece_file(tokenizer__ggml__add_space_prefix=prefix)
  ours = from_written(tmp_path, **metadata)
  tokens, scores = metadata['tokenizer__ggml__tokens'], metadata['tokenizer__ggml__scores']
  rng = np.random.default_rng(1)
  for _ in range(40):
    text = random_text(rng, 15) + ' ' * int(rng.integers(12)) + '</s>'
    expected = textbook_sentencepiece(text, tokens, scores, prefix)
    assert ours.encode_plain(text) == expected, repr(text)
    decoded = ours.decode(expected)
    assert decoded == text.replace('\u2581', ' ')
  assert ours.eos_id == ours.special_tokens['</s>']


@pytest.mark.filterwarnings('default')
def test_sentencepiece_as_transformers_reads_it(tmp_path):
  transformers = pytest.importorskip('transformers')
  ours = from_written(tmp_path, **sentencepiece_file())
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file='a.gguf')
  rng = np.random.default_rng(2)
  for _ in range(40):
    text = random_text(rng, 15)
    assert ours.encode_plain(text) == theirs(text, add_special_tokens=False)['input_ids']


@pytest.mark.base
def test_ids_follow_the_definition(base_file):
  ours = from_gguf(base_file)
  tokens = base_file.metadata['tokenizer.ggml.tokens']
  merges = base_file.metadata['tokenizer.ggml.merges']
  rng = np.random.default_rng(0)
  for _ in range(60):
    text = random_text(rng)
    assert ours.encode_plain(text) == textbook_encode(text, tokens, merges), repr(text)


@pytest.fixture(scope='module')
def theirs(base_file):
  transformers = pytest.importorskip('transformers')
  return transformers.AutoTokenizer.from_pretrained(
    base_file.path.parent, gguf_file=base_file.path.name
  )


@pytest.mark.base
@pytest.mark.slow
@pytest.mark.filterwarnings('default')
class TestAgainstTransformers:
  """Hugging Face's tokenizer, built by transformers from the same file.

  Its GGUF reader leaves out the split into single digits that the published
  SmolLM2 tokenizer and llama.cpp have. No merge holds a digit, so it differs only
  where several spaces stand before a number.
  """

  def test_ids(self, base_file, theirs):
    ours = from_gguf(base_file)
    rng = np.random.default_rng(1)
    for _ in range(200):
      text = ''.join(
        c for c in random_text(rng) if c.isascii() or unicodedata.category(c)[0] != 'N'
      )
      text = re.sub(r'\s+(?=[0-9])', ' ', text)
      assert ours.encode(text) == theirs(text)['input_ids'], repr(text)

  def test_ids_with_the_published_split(self, base_file, theirs):
    ours = from_gguf(base_file)
    reference = pickle.loads(pickle.dumps(theirs))
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
      [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
      ]
    )
    rng = np.random.default_rng(2)
    for _ in range(200):
      text = random_text(rng)
      assert ours.encode(text) == reference(text)['input_ids'], repr(text)
      chat = random_chat(rng)
      expected = reference.apply_chat_template(chat, add_generation_prompt=True)['input_ids']
      assert ours.encode_chat(chat) == expected

  def test_rendered_chats(self, base_file, theirs):
    ours = from_gguf(base_file)
    rng = np.random.default_rng(3)
    for i in range(100):
      chat, prompt = random_chat(rng), bool(i % 2)
      expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
      assert ours.render(chat, prompt) == expected

  def test_decoding_and_named_tokens(self, base_file, theirs):
    ours = from_gguf(base_file)
    rng = np.random.default_rng(4)
    for _ in range(100):
      ids = rng.integers(0, ours.vocab_size, 30).tolist()
      for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (
      theirs.bos_token_id,
      theirs.eos_token_id,
      theirs.pad_token_id,
    )
    assert ours.vocab_size == len(theirs)


@pytest.mark.base
def test_tiny_chat_has_the_form_of_the_base(base_file):
  tiny, base = bases.load('tiny').tokenizer, from_gguf(base_file)
  rng = np.random.default_rng(11)
  for i in range(20):
    chat = [
      {'role': 'system', 'content': 'short'},
      {'role': 'user', 'content': random_text(rng, 5)},
    ]
    assert tiny.render(chat, bool(i % 2)) == base.render(chat, bool(i % 2))


# From a file.


def test_user_defined_tokens_are_found_in_any_text(tmp_path):
  ours = from_written(tmp_path)
  user_defined = tiny_gguf.TOKENS.index('[user]')
  assert tiny_gguf.TYPES[user_defined] == TokenType.USER_DEFINED
  for encode in (ours.encode, ours.encode_plain):
    assert encode('x[user]y').count(user_defined) == 1
  assert ours.decode(ours.encode_plain('x[user]y')) == 'x[user]y'


def test_a_turn_ends_where_the_template_ends_it(tmp_path):
  assert from_written(tmp_path, tokenizer__ggml__eos_token_id=1).eos_id == 2
  silent = '{% for m in messages %}{{ m.content }}{% endfor %}'
  ends = lambda **changes: from_written(tmp_path, tokenizer__chat_template=silent, **changes).eos_id
  assert ends() == 2
  assert ends(tokenizer__ggml__eot_token_id=1) == 1


def test_the_end_of_text_that_a_template_writes_is_the_file_s(tmp_path):
  template = "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}{{ eos_token }}"
  ours = from_written(tmp_path, tokenizer__chat_template=template, tokenizer__ggml__eos_token_id=1)
  assert ours.render([{'role': 'user', 'content': 'a'}]) == 'a<|im_end|><|im_start|>'
  assert ours.eos_id == 2


@pytest.mark.parametrize('adds_bos', [True, False])
def test_a_base_without_a_template_gets_a_plain_one(tmp_path, adds_bos):
  ours = from_written(
    tmp_path, tokenizer__chat_template=None, tokenizer__ggml__add_bos_token=adds_bos
  )
  chat = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
  bos = '<|im_start|>' * adds_bos
  expected = f'{bos}### user\na\n\n### assistant\nb<|im_end|>\n\n'
  assert ours.render(chat, False) == expected
  assert ours.render(chat[:1]) == f'{bos}### user\na\n\n### assistant\n'
  assert ours.eos_id == 2
  tokenizer_save.save(tmp_path, ours, max_length=128)
  again = tokenizer_hf.from_directory(tmp_path, ours.vocab_size)
  assert again.encode_chat(chat, False) == ours.encode_chat(chat, False)


def test_a_turn_s_tokens_are_special_however_they_are_typed(tmp_path):
  types = [*tiny_gguf.TYPES]
  types[1] = types[2] = TokenType.USER_DEFINED
  ours = from_written(tmp_path, tokenizer__ggml__token_type=[int(kind) for kind in types])
  assert {'<|im_start|>', '<|im_end|>'} <= ours.special_tokens.keys()
  assert not {1, 2} & set(ours.encode_plain('<|im_start|><|im_end|>'))


def test_end_of_turn_and_padding_have_defaults(tmp_path):
  assert from_written(tmp_path, tokenizer__ggml__padding_token_id=None).pad_id == 2
  assert from_written(tmp_path, tokenizer__ggml__bos_token_id=None).bos_id is None


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'tokenizer__ggml__model': 'bert'}, "tokenizer model 'bert' is not supported"),
    ({'tokenizer__ggml__pre': 'falcon'}, "pre-tokenizer 'falcon' is not supported; .*'smollm'"),
    ({'tokenizer__ggml__model': 'llama'}, r'tokenizer\.ggml\.scores'),
    ({'tokenizer__ggml__model': 'llama', 'tokenizer__ggml__scores': [0.0]}, 'tokens but 1 scores'),
    ({'tokenizer__chat_template': '{% for %}'}, 'chat template does not parse'),
    ({'tokenizer__ggml__merges': ['zz yy']}, 'vocabulary is not usable'),
    ({'tokenizer__ggml__merges': ['a b c']}, 'vocabulary is not usable'),
    ({'tokenizer__ggml__tokens': None}, r'tokenizer\.ggml\.tokens'),
    ({'tokenizer__ggml__tokens': [1, 2]}, r'tokenizer\.ggml\.tokens does not hold str'),
    ({'tokenizer__ggml__merges': [0.5]}, r'tokenizer\.ggml\.merges does not hold str'),
    ({'tokenizer__ggml__token_type': [1, 2]}, '262 tokens but 2 token types'),
    ({'tokenizer__ggml__eos_token_id': 5000}, 'names token 5000 of 262'),
  ],
)
def test_tokenizers_that_cannot_be_built_are_named(tmp_path, changes, message):
  with pytest.raises(UserError, match=message) as error:
    from_written(tmp_path, **changes)
  assert '\n' not in str(error.value)
  assert str(tmp_path / 'a.gguf') in str(error.value)


def test_a_template_may_refuse_messages(tmp_path):
  template = "{{ raise_exception('roles must\nalternate') }}"
  ours = from_written(tmp_path, tokenizer__chat_template=template)
  with pytest.raises(UserError, match='refuses these messages: roles must alternate'):
    ours.render([{'role': 'user', 'content': 'a'}])


@pytest.mark.parametrize(
  'reach', ["''.__class__.__mro__", 'messages.append(1)', 'cycler.__init__.__globals__']
)
def test_templates_run_in_a_sandbox(tmp_path, reach):
  ours = from_written(tmp_path, tokenizer__chat_template='{{ ' + reach + ' }}')
  chat = [{'role': 'user', 'content': 'a'}]
  with pytest.raises(UserError, match=r'unsafe|undefined'):
    ours.render(chat)
  assert chat == [{'role': 'user', 'content': 'a'}]


def test_what_templates_expect_is_there(tmp_path):
  template = (
    "{{ bos_token }}{% for m in messages %}{% if m['content'] == '<&>' %}{% break %}{% endif %}"
    "{{ m | tojson }}{% endfor %}{{ strftime_now('%Y') | length }}"
  )
  ours = from_written(tmp_path, tokenizer__chat_template=template)
  chat = [{'role': 'user', 'content': '<b>é'}, {'role': 'user', 'content': '<&>'}]
  assert ours.render(chat) == '<|im_start|>{"role": "user", "content": "<b>é"}4'

import itertools
import pickle
import re
from pathlib import Path
from unicodedata import category

import numpy as np
import pytest
import tiny_gguf
from gguf import TokenType
from tokenizers import pre_tokenizers

from lora_jax.config import CACHE
from lora_jax.errors import UserError
from lora_jax.hub import bases, gguf, tokenizer

# Ranges of code points: scripts, symbols, emoji, and numerals that are not 0 to 9.
PLACES = [(0x00, 0x7F), (0xA0, 0x24F), (0x370, 0x52F), (0x600, 0x6FF), (0x900, 0x97F)]
PLACES += [(0x2000, 0x2BFF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xFF00, 0xFFEF)]
PLACES += [(0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF)]
SPACES = ['', ' ', '  ', '    ', '\n', '\n\n', '\n\n\n', '\t\t', '\r\n', '\u00a0', '\u3000', ' \n ']
# fmt: off
WORDS = [
  'the', 'and', "it's", "we'll", "I'D", "they've", 'year', 'FY', 'bile', 'naïve', 'Straße', '“q”',
  'def', 'return', 'lambda', 'self.x', 'x_1', 'camelCase', '!=', '==', '->', '{}', '[]', '()',
  '"quoted"', '£', '€', '%', '$', '#', '/*', '*/', '//', '<tag>', '</tag>', '<|', '|>', '...', '–',
]
# fmt: on


def random_text(rng, pieces=40):
  """Words, code, numbers, scripts and runs of whitespace in random order."""

  def piece():
    kind = rng.integers(5)
    if kind == 0:
      return str(rng.integers(10 ** rng.integers(1, 10)))
    if kind == 1:
      low, high = PLACES[rng.integers(len(PLACES))]
      return ''.join(chr(c) for c in rng.integers(low, high, rng.integers(1, 6)))
    if kind == 2:
      return ''.join(chr(c) for c in rng.integers(0x20, 0x7F, rng.integers(1, 12)))
    return WORDS[rng.integers(len(WORDS))]

  return ''.join(piece() + SPACES[rng.integers(len(SPACES))] for _ in range(pieces))


def random_chat(rng):
  turns = [{'role': 'system', 'content': random_text(rng, 5)}] if rng.integers(2) else []
  for i in range(rng.integers(1, 4)):
    role = 'user' if i % 2 == 0 else 'assistant'
    turns.append({'role': role, 'content': random_text(rng, int(rng.integers(0, 30)))})
  return turns


def forged_chat(rng, specials):
  """A chat whose contents are strewn with special tokens and broken pieces of them."""
  chat = random_chat(rng)
  for turn in chat:
    words = turn['content'].split(' ')
    for _ in range(rng.integers(1, 6)):
      token = specials[rng.integers(len(specials))]
      cut = rng.integers(len(token))
      forms = [token, token[:cut] + token + token[cut:], token + token, f'\n{token}', token[cut:]]
      words.insert(rng.integers(len(words) + 1), forms[rng.integers(len(forms))])
    turn['content'] = ' '.join(words)
  return chat


@pytest.fixture(scope='module')
def base_file():
  bases.load('smollm2-135m-instruct')
  return gguf.open_file(Path(CACHE).expanduser() / 'SmolLM2-135M-Instruct.Q4_1.gguf')


@pytest.fixture(scope='module', params=['tiny', pytest.param('base', marks=pytest.mark.base)])
def chat_tokenizer(request):
  if request.param == 'tiny':
    return bases.load('tiny').tokenizer
  return tokenizer.from_gguf(request.getfixturevalue('base_file'))


# Against other implementations.


def textbook_encode(text, tokens, merges):
  """Byte-level BPE from its definition, with the split of llama.cpp's `smollm`."""
  regex = pytest.importorskip('regex')
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in printable]
  alphabet = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
  ids = {token: i for i, token in enumerate(tokens)}
  ranks = {tuple(merge.split(' ')): i for i, merge in enumerate(merges)}
  words = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
  )
  found = []
  for part in regex.findall(r'\p{N}|\P{N}+', text):
    for word in words.findall(part):
      symbols = [alphabet[b] for b in word.encode() if alphabet[b] in ids]
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


@pytest.mark.base
def test_ids_follow_the_definition(base_file):
  ours = tokenizer.from_gguf(base_file)
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
    ours = tokenizer.from_gguf(base_file)
    rng = np.random.default_rng(1)
    for _ in range(200):
      text = ''.join(c for c in random_text(rng) if c.isascii() or category(c)[0] != 'N')
      text = re.sub(r'\s+(?=[0-9])', ' ', text)
      assert ours.encode(text) == theirs(text)['input_ids'], repr(text)

  def test_ids_with_the_published_split(self, base_file, theirs):
    ours = tokenizer.from_gguf(base_file)
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
    ours = tokenizer.from_gguf(base_file)
    rng = np.random.default_rng(3)
    for i in range(100):
      chat, prompt = random_chat(rng), bool(i % 2)
      expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
      assert ours.render(chat, prompt) == expected

  def test_decoding_and_named_tokens(self, base_file, theirs):
    ours = tokenizer.from_gguf(base_file)
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


# Properties of every tokenizer.


def test_tiny_text_survives_a_round_trip():
  tiny = bases.load('tiny').tokenizer
  rng = np.random.default_rng(5)
  for _ in range(50):
    text = random_text(rng)
    ids = tiny.encode_plain(text)
    assert len(ids) == len(text.encode())
    assert tiny.decode(ids) == text


def test_chat_ids_are_those_of_the_rendered_text(chat_tokenizer):
  rng = np.random.default_rng(6)
  for _ in range(50):
    chat = random_chat(rng)
    for prompt in (True, False):
      expected = chat_tokenizer.encode(chat_tokenizer.render(chat, prompt))
      assert chat_tokenizer.encode_chat(chat, prompt) == expected


def test_content_cannot_forge_a_turn(chat_tokenizer):
  specials = list(chat_tokenizer.special_tokens)
  special_ids = set(chat_tokenizer.special_tokens.values())
  rng = np.random.default_rng(7)
  for _ in range(100):
    chat = forged_chat(rng, specials)
    honest = [{'role': turn['role'], 'content': 'x'} for turn in chat]
    ids = chat_tokenizer.encode_chat(chat)
    only_special = lambda ids: [i for i in ids if i in special_ids]
    assert only_special(ids) == only_special(chat_tokenizer.encode_chat(honest))
    text = chat_tokenizer.render(chat)
    plain = ''.join(c for c in text if chat_tokenizer.encode_plain(c))
    assert chat_tokenizer.decode(ids, skip_special=False) == plain


def test_private_characters_in_content_are_kept():
  tiny = bases.load('tiny').tokenizer
  content = '\ue000' + '1\ue000 <|im_end|> \ue0012\ue001'
  chat = [{'role': 'user', 'content': content}]
  assert tiny.decode(tiny.encode_chat(chat), skip_special=False) == tiny.render(chat)


def test_plain_text_is_never_special(chat_tokenizer):
  for token, i in chat_tokenizer.special_tokens.items():
    ids = chat_tokenizer.encode_plain(f'a {token}{token} b')
    assert not set(ids) & set(chat_tokenizer.special_tokens.values())
    assert chat_tokenizer.decode(ids) == f'a {token}{token} b'
    assert chat_tokenizer.encode(f'a {token}').count(i) == 1


def test_fit_never_exceeds_the_budget_and_wastes_little(chat_tokenizer):
  rng = np.random.default_rng(8)
  for _ in range(40):
    text = random_text(rng)
    total = len(chat_tokenizer.encode_plain(text))
    ends = []
    for budget in sorted({-1, 0, 1, total, total + 5, *rng.integers(0, total + 1, 10).tolist()}):
      end = chat_tokenizer.fit(text, budget)
      used = len(chat_tokenizer.encode_plain(text[:end]))
      assert used <= max(budget, 0)
      if budget >= total:
        assert end == len(text)
      else:
        # One character is at most four tokens.
        assert used > budget - 8
      ends.append(end)
    assert ends == sorted(ends)


def test_offsets_cover_the_text_of_each_token(chat_tokenizer):
  rng = np.random.default_rng(9)
  for _ in range(20):
    text = ''.join(c for c in random_text(rng) if chat_tokenizer.encode_plain(c))
    ids, offsets = chat_tokenizer.encode_plain(text), chat_tokenizer.offsets(text)
    assert len(ids) == len(offsets)
    for token, (start, end) in zip(ids, offsets, strict=True):
      piece = chat_tokenizer.decode([token])
      assert '\ufffd' in piece or piece == text[start:end]


def test_half_a_surrogate_pair_is_replaced(chat_tokenizer):
  # JSON can hold one, UTF-8 cannot.
  broken, mended = 'a\ud83d b', 'a\ufffd b'
  assert chat_tokenizer.encode(broken) == chat_tokenizer.encode(mended)
  assert chat_tokenizer.encode_plain(broken) == chat_tokenizer.encode_plain(mended)
  assert chat_tokenizer.offsets(broken) == chat_tokenizer.offsets(mended)
  chat = lambda text: [{'role': 'user', 'content': text}]
  assert chat_tokenizer.encode_chat(chat(broken)) == chat_tokenizer.encode_chat(chat(mended))


def test_pickles(chat_tokenizer):
  copy = pickle.loads(pickle.dumps(chat_tokenizer))
  rng = np.random.default_rng(10)
  chat = forged_chat(rng, list(chat_tokenizer.special_tokens))
  assert copy.encode_chat(chat) == chat_tokenizer.encode_chat(chat)
  assert copy.eos_id == chat_tokenizer.eos_id


def test_tiny_chat_has_the_form_of_the_base(base_file):
  tiny, base = bases.load('tiny').tokenizer, tokenizer.from_gguf(base_file)
  rng = np.random.default_rng(11)
  for i in range(20):
    chat = [
      {'role': 'system', 'content': 'short'},
      {'role': 'user', 'content': random_text(rng, 5)},
    ]
    assert tiny.render(chat, bool(i % 2)) == base.render(chat, bool(i % 2))


# From a file.


def from_written(tmp_path, **changes):
  return tokenizer.from_gguf(gguf.open_file(tiny_gguf.write(tmp_path / 'a.gguf', **changes)))


def test_user_defined_tokens_are_found_in_any_text(tmp_path):
  ours = from_written(tmp_path)
  user_defined = tiny_gguf.TOKENS.index('[user]')
  assert tiny_gguf.TYPES[user_defined] == TokenType.USER_DEFINED
  for encode in (ours.encode, ours.encode_plain):
    assert encode('x[user]y').count(user_defined) == 1
  assert ours.decode(ours.encode_plain('x[user]y')) == 'x[user]y'


def test_end_of_turn_is_preferred_to_end_of_text(tmp_path):
  assert from_written(tmp_path).eos_id == 2
  assert from_written(tmp_path, tokenizer__ggml__eot_token_id=1).eos_id == 1
  assert from_written(tmp_path, tokenizer__ggml__padding_token_id=None).pad_id == 2
  assert from_written(tmp_path, tokenizer__ggml__bos_token_id=None).bos_id is None


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'tokenizer__ggml__model': 'llama'}, "tokenizer model 'llama' is not supported"),
    ({'tokenizer__ggml__pre': 'llama-bpe'}, "pre-tokenizer 'llama-bpe' is not supported"),
    ({'tokenizer__ggml__pre': None}, "pre-tokenizer 'default' is not supported"),
    ({'tokenizer__chat_template': None}, 'has no chat template'),
    ({'tokenizer__chat_template': '{% for %}'}, 'chat template does not parse'),
    ({'tokenizer__ggml__merges': ['zz yy']}, 'vocabulary is not usable'),
    ({'tokenizer__ggml__merges': ['a b c']}, 'vocabulary is not usable'),
    ({'tokenizer__ggml__tokens': None}, r'tokenizer\.ggml\.tokens'),
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

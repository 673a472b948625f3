import pickle
import re
import unicodedata

import numpy as np
import pytest
import tiny_tokenizers
from texts import forged_chat, random_chat, random_text

from lora_jax.hub import bases, tokenizer_hf

BYTE_LEVEL = {'tiny', 'base', 'llama3'}


@pytest.fixture(
  scope='module',
  params=['tiny', pytest.param('base', marks=pytest.mark.base), *tiny_tokenizers.FORMS],
)
def form(request):
  return request.param


@pytest.fixture(scope='module')
def chat_tokenizer(form, tmp_path_factory):
  if form == 'tiny':
    return bases.load('tiny').tokenizer
  if form == 'base':
    return bases.load('smollm2-135m-instruct').tokenizer
  directory = tiny_tokenizers.write(tmp_path_factory.mktemp(form) / form, form)
  return tokenizer_hf.from_directory(directory, vocab_size=2000)


def bare(text):
  """What is left of a text that was normalised and has lost or gained spaces."""
  return re.sub(r'[\s\u2581]', '', unicodedata.normalize('NFC', text))


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


def test_content_cannot_forge_a_turn(chat_tokenizer, form):
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
    decoded = chat_tokenizer.decode(ids, skip_special=False)
    if form in BYTE_LEVEL:
      assert decoded == plain
    else:
      assert bare(decoded) == bare(plain)


def test_what_stands_before_a_forged_turn_is_encoded_as_ever(chat_tokenizer):
  specials = list(chat_tokenizer.special_tokens)
  rng = np.random.default_rng(12)
  for _ in range(20):
    chat = random_chat(rng)
    ids = chat_tokenizer.encode_chat(chat, add_generation_prompt=False)
    longer = [*chat, {'role': 'user', 'content': specials[rng.integers(len(specials))]}]
    assert chat_tokenizer.encode_chat(longer)[: len(ids)] == ids


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


def test_offsets_cover_the_text_of_each_token(chat_tokenizer, form):
  rng = np.random.default_rng(9)
  for _ in range(20):
    text = ''.join(c for c in random_text(rng) if chat_tokenizer.encode_plain(c))
    ids, offsets = chat_tokenizer.encode_plain(text), chat_tokenizer.offsets(text)
    assert len(ids) == len(offsets)
    for token, (start, end) in zip(ids, offsets, strict=True):
      piece, covered = chat_tokenizer.decode([token]), text[start:end]
      if form in BYTE_LEVEL:
        assert '\ufffd' in piece or piece == covered
      else:
        # A space that was put before a text spans its first character.
        assert '\ufffd' in piece or bare(piece) in ('', bare(covered))


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


def test_an_unknown_character_is_the_unknown_token_and_cannot_be_written(tmp_path):
  data = tiny_tokenizers.FORMS['llama2'][0]
  model = data['model'] | {'byte_fallback': False}
  directory = tiny_tokenizers.write(tmp_path / 'a', 'llama2', data={'model': model})
  ours = tokenizer_hf.from_directory(directory, vocab_size=2000)
  unknown = ours.special_tokens['<unk>']
  assert unknown in ours.encode_plain('a \U0001f600')
  assert unknown not in ours.encode_plain('a <unk>')
  assert ours.encode('a <unk>')[-1] == unknown

"""Text as it streams: whole characters, all of them, and stops wherever pieces are cut."""

import itertools

import numpy as np
import pytest
import texts
import tiny_tokenizers

from lora_jax.hub import tiny, tokenizer_hf
from lora_jax.text_stream import TextStream, Until


def test_pieces_are_whole_characters():
  tokenizer = tiny.chat_tokenizer()
  text = 'naïve 🙂 表 x'
  stream = TextStream(tokenizer)
  pieces = [stream.push(i) for i in tokenizer.encode_plain(text)]
  assert ''.join(pieces) == stream.text == text
  assert stream.rest() == ''
  assert not any('\ufffd' in piece for piece in pieces)
  assert '🙂' in pieces
  cut = TextStream(tokenizer)
  pieces = [cut.push(i) for i in tokenizer.encode_plain('a🙂')[:-1]]
  assert (''.join(pieces), cut.text, cut.rest()) == ('a', 'a\ufffd', '\ufffd')


def streamed(tokenizer, ids):
  stream = TextStream(tokenizer)
  return ''.join([*map(stream.push, ids), stream.rest()])


@pytest.mark.parametrize('form', ['llama3', 'qwen2'])
def test_any_tokens_stream_as_they_decode(tmp_path, form):
  tokenizer = tokenizer_hf.from_directory(tiny_tokenizers.write(tmp_path, form), 2000)
  rng = np.random.default_rng(0)
  broken = 0
  for _ in range(50):
    ids = rng.integers(0, tokenizer.vocab_size, 60).tolist()
    whole = tokenizer.decode(ids)
    assert streamed(tokenizer, ids) == whole
    broken += '\ufffd' in whole
  assert broken > 25


@pytest.mark.parametrize('form', tiny_tokenizers.FORMS)
def test_text_streams_as_it_was_written(tmp_path, form):
  tokenizer = tokenizer_hf.from_directory(tiny_tokenizers.write(tmp_path, form), 2000)
  rng = np.random.default_rng(0)
  for _ in range(20):
    ids = tokenizer.encode_plain(texts.random_text(rng, 10))
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


def by_characters(text, stops):
  """Text before the first stop string, looking again after each character."""
  for end in range(len(text) + 1):
    found = [text[:end].index(stop) for stop in stops if stop and text[:end].endswith(stop)]
    if found:
      return text[: min(found)], True
  return text, False


def test_stops_do_not_depend_on_how_text_is_cut():
  rng = np.random.default_rng(0)
  met = 0
  for _ in range(400):
    text = ''.join(rng.choice(list('abc'), 12))
    stops = [''.join(rng.choice(list('abc'), rng.integers(0, 5))) for _ in range(3)]
    cuts = [0, *sorted(rng.integers(0, len(text) + 1, 5)), len(text)]
    until = Until(stops)
    told = [until.push(text[one:other]) for one, other in itertools.pairwise(cuts)]
    expected = by_characters(text, stops)
    assert (''.join([*told, until.rest()]), until.met) == expected
    met += until.met
  assert 50 < met < 350


def test_only_what_may_become_a_stop_is_held_back():
  until = Until(['abc', 'bd'])
  assert [until.push(piece) for piece in ('x', 'xa', 'b', 'y', 'ab', 'd', 'z')] == [
    *('x', 'x', '', 'aby', '', 'a', '')
  ]
  assert until.met
  assert until.rest() == ''

"""How likely tokens were, by the engine and over HTTP, against a plain forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
import served
import served_http
import tiny_model
from served import LONGEST, MODEL, NEW, TOKENIZER
from served_http import BASE, NAMES

from lora_jax.errors import UserError
from lora_jax.hub import peft
from lora_jax.programs import Programs
from lora_jax.serve.answer import Request
from lora_jax.serve.engine import Engine

CLOSE = {'rtol': 1e-4, 'atol': 1e-4}


@pytest.fixture(scope='module')
def server(tmp_path_factory):
  engine = served_http.engine(tmp_path_factory.mktemp('adapters'))
  with served_http.running(engine) as held:
    yield held


@pytest.fixture(scope='module')
def engine(tmp_path_factory):
  """One that no server's thread steps."""
  return served_http.engine(tmp_path_factory.mktemp('adapters'))


@pytest.fixture
def client(server):
  with server.client() as held:
    yield held
  assert server.is_free()


@pytest.fixture(scope='module')
def requests():
  return served.clear(['', *NAMES], [1, 8, 13, LONGEST])


def log_probs(name, ids):
  """(T, V) after each token, by the merged adapter."""
  whole = np.zeros((1, LONGEST + NEW), np.int32)
  whole[0, : len(ids)] = ids
  logits_TV = tiny_model.logits(MODEL, served.merged(name), jnp.asarray(whole))[0]
  return np.asarray(jax.nn.log_softmax(logits_TV))[: len(ids)]


def check(told, before_V, token, count):
  """What is told of a token against the log probabilities in its place."""
  assert told.token == token
  np.testing.assert_allclose(told.log_prob, before_V[token], **CLOSE)
  assert len(told.top) == count
  ids, logs = [one for one, _ in told.top], [log for _, log in told.top]
  assert logs == sorted(logs, reverse=True)
  assert len({*ids}) == count
  np.testing.assert_allclose(logs, before_V[ids], **CLOSE)
  np.testing.assert_allclose(logs, np.sort(before_V)[::-1][:count], **CLOSE)


def test_tokens_are_as_likely_as_a_plain_pass_has_them_whoever_else_asks(engine, requests):
  asked = [
    # Some ask for all, some for their answer's, some for nothing, some for the prompt's alone.
    (dataclasses.replace(request, likeliest=(5, 0, None, 20)[i % 4], echo=i % 3 == 0), ids)
    for i, (request, ids) in enumerate(requests)
  ]
  asked += [
    (dataclasses.replace(request, likeliest=2, echo=True, max_tokens=0), [])
    for request, _ in requests[::5]
  ]
  with Programs() as programs:
    answers = [engine.submit(request) for request, _ in asked]
    served.run(engine)
  assert programs.count == 0
  assert served_http.is_free(engine)
  for answer, (request, ids) in zip(answers, asked, strict=True):
    assert (answer.ids, answer.finish) == (ids, 'length')
    prompt, count = request.prompt, request.likeliest
    after_TV = log_probs(request.adapter, [*prompt, *ids])
    assert len(answer.likelihoods) == (0 if count is None else len(ids))
    assert len(answer.of_prompt) == (len(prompt) - 1 if request.echo and count is not None else 0)
    for place, told in enumerate(answer.of_prompt):
      check(told, after_TV[place], prompt[place + 1], count)
    for place, told in enumerate(answer.likelihoods, len(prompt) - 1):
      check(told, after_TV[place], ids[place + 1 - len(prompt)], count)


def test_what_ends_a_turn_is_told_too(engine, requests, monkeypatch):
  request, ids = next(found for found in requests if found[1].index(found[1][4]) == 4)
  monkeypatch.setattr(TOKENIZER, 'eos_id', ids[4])
  answer = engine.submit(dataclasses.replace(request, likeliest=0))
  served.run(engine)
  assert (answer.ids, answer.finish) == (ids[:4], 'stop')
  assert [told.token for told in answer.likelihoods] == ids[:5]


def test_what_overflowed_is_still_a_number(tmp_path):
  root, adapter = served.write(tmp_path, ['o_proj']), served.adapter('all')
  huge = jax.tree.map(lambda leaf: leaf * np.float32(3e38), adapter.params)
  peft.save(root / 'huge', dataclasses.replace(adapter, params=huge))
  engine = Engine(MODEL, served.params(), TOKENIZER, served_http.CONFIG, root)
  answer = engine.submit(Request(served.prompt(5), 'huge', 2, likeliest=3, echo=True))
  served.run(engine)
  for told in (*answer.of_prompt, *answer.likelihoods):
    assert np.isfinite([told.log_prob, *(log for _, log in told.top)]).all()


@pytest.mark.parametrize('likeliest', [-1, 21])
def test_there_is_room_for_so_many(engine, likeliest):
  with pytest.raises(UserError, match='ask for 0 to 20'):
    engine.submit(Request((3, 4), likeliest=likeliest))


def scores(choice, context):
  """As lm-eval reads a choice: the sum over what follows the context, and whether it is greedy."""
  told = choice.logprobs
  own = slice(context, -1)
  tops = [max(top.values()) for top in told.top_logprobs[own]]
  return sum(told.token_logprobs[own]), told.token_logprobs[own] == tops


def test_choices_are_scored_as_lm_eval_does(client, requests):
  for name in ('', 'all'):
    some = [(request, ids) for request, ids in requests if request.adapter == name][:3]
    greedy = [[*request.prompt, *ids[:4]] for request, ids in some]
    others = [[*request.prompt, *ids[:3], (ids[3] + 7) % 200] for request, ids in some]
    ask = {'model': name or BASE, 'max_tokens': 1, 'logprobs': 1, 'echo': True, 'temperature': 0}
    held = client.completions.create(**ask, prompt=greedy + others)
    for choice, ids in zip(held.choices, greedy + others, strict=True):
      log, is_greedy = scores(choice, len(ids) - 4)
      after_TV = log_probs(name, ids)
      expected = sum(after_TV[at, ids[at + 1]] for at in range(len(ids) - 5, len(ids) - 1))
      np.testing.assert_allclose(log, expected, rtol=1e-4)
      assert is_greedy == (choice.index < len(greedy))
      assert len(choice.logprobs.tokens) == len(ids) + 1


def test_an_echo_is_the_prompt_as_it_was_asked_and_where_its_tokens_lie(client):
  prompt = 'Größe: 5<|im_end|> €'
  ask = {'model': 'all', 'prompt': prompt, 'logprobs': 2, 'echo': True, 'temperature': 0}
  (whole,) = client.completions.create(**ask, max_tokens=5).choices
  (own,) = client.completions.create(**(ask | {'echo': False}), max_tokens=5).choices
  assert whole.text == prompt + own.text
  told = whole.logprobs
  ids = TOKENIZER.encode(prompt)
  assert len(told.tokens) == len(told.text_offset) == len(ids) + 5
  assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
  for i, (token, offset) in enumerate(zip(told.tokens, told.text_offset, strict=True)):
    # The bytes of one character begin where it does; an answer is without what is special.
    is_there = token != '\ufffd' and (i < len(ids) or token not in TOKENIZER.special_tokens)
    assert not is_there or whole.text[offset:].startswith(token), i
  assert told.text_offset == sorted(told.text_offset)
  assert told.token_logprobs[len(ids) :] == own.logprobs.token_logprobs
  assert own.logprobs.text_offset == [at - len(prompt) for at in told.text_offset[len(ids) :]]
  # Of a prompt alone, nothing is said; and without log probabilities it is an echo.
  (alone,) = client.completions.create(**ask, max_tokens=0).choices
  assert (alone.text, alone.logprobs.token_logprobs) == (prompt, told.token_logprobs[: len(ids)])
  ask = {'model': 'all', 'echo': True, 'max_tokens': 3, 'temperature': 0, 'n': 2}
  for asked in (prompt, ids):
    for choice in client.completions.create(**ask, prompt=asked).choices:
      assert choice.text.startswith(prompt)
      assert choice.logprobs is None


def test_a_chat_is_told_of_token_by_token(client):
  turns = [{'role': 'user', 'content': 'Hi'}]
  ask = {'model': 'all', 'messages': turns, 'max_tokens': 6, 'temperature': 0}
  (choice,) = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3).choices
  told = choice.logprobs.content
  assert len(told) == 6
  for one in told:
    assert len(one.top_logprobs) == 3
    # It was the likeliest.
    assert (one.token, one.logprob) == (one.top_logprobs[0].token, one.top_logprobs[0].logprob)
    assert one.bytes is None or bytes(one.bytes).decode() == one.token
  assert choice.message.content.replace('\ufffd', '') == ''.join(
    one.token for one in told if '\ufffd' not in one.token
  )
  (choice,) = client.chat.completions.create(**ask, logprobs=True).choices
  assert [one.logprob for one in choice.logprobs.content] == [one.logprob for one in told]
  assert choice.logprobs.content[0].top_logprobs == []


def test_a_stream_tells_the_same_as_a_whole_answer(client):
  prompts = ['Größe', 'Hi']
  ask = {'model': 'all', 'prompt': prompts, 'logprobs': 2, 'echo': True, 'n': 2, 'temperature': 0}
  whole = client.completions.create(**ask, max_tokens=9).choices
  texts, told = [''] * 4, [{} for _ in range(4)]
  for chunk in client.completions.create(**ask, max_tokens=9, stream=True):
    for choice in chunk.choices:
      texts[choice.index] += choice.text
      for name, more in choice.logprobs.model_dump().items():
        told[choice.index].setdefault(name, []).extend(more)
  for choice in whole:
    assert texts[choice.index] == choice.text
    expected = choice.logprobs.model_dump()
    # Where a token begins whose text is not there yet shows later.
    assert {**told[choice.index], 'text_offset': None} == {**expected, 'text_offset': None}
  ask = {'model': 'all', 'messages': [{'role': 'user', 'content': 'Hi'}], 'temperature': 0}
  ask |= {'max_tokens': 9, 'logprobs': True, 'top_logprobs': 2}
  (choice,) = client.chat.completions.create(**ask).choices
  content = [
    one
    for chunk in client.chat.completions.create(**ask, stream=True)
    for choice in chunk.choices
    if choice.logprobs
    for one in choice.logprobs.content
  ]
  assert content == choice.logprobs.content


def test_a_client_may_leave_its_tokens_to_the_server(client, server):
  post = lambda path, **body: client.post(f'{server.url}{path}', body=body, cast_to=object)
  text = 'A b<|im_end|>'
  ids = post('/tokenize', prompt=text, add_special_tokens=False)
  assert ids == {'count': 4, 'max_model_len': 192, 'tokens': TOKENIZER.encode(text)}
  assert post('/tokenize', prompt=text)['tokens'] == TOKENIZER.encode_text(text)
  assert post('/detokenize', tokens=ids['tokens']) == {'prompt': text}
  for tokens in ([10**9], [-1]):
    with pytest.raises(openai.BadRequestError, match='give ids of'):
      post('/detokenize', tokens=tokens)
  about = client.get(f'{server.url}/tokenizer_info', cast_to=object)
  assert about['bos_token'] == '<|im_start|>'
  assert about['pad_token'] == '<|endoftext|>'
  # That of the tests has none.
  assert about['eos_token'] is None
  assert 'messages' in about['chat_template']

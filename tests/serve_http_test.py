"""A server and the clients that people have: answers, adapters that come and go, and abuse."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import httpx2
import openai
import pytest
import served
import served_http
from served import TOKENIZER
from served_http import BASE, CONFIG, CORRUPT, KEY, NAMES, SPARE
from starlette.testclient import TestClient

from lora_jax.errors import UserError
from lora_jax.serve.http.app import build
from lora_jax.serve.http.gate import Limits
from lora_jax.serve.runner import Runner

TURNS = [{'role': 'user', 'content': 'Hi'}]
GREEDY = {'temperature': 0.0}


@pytest.fixture(scope='module')
def server(tmp_path_factory):
  engine = served_http.engine(tmp_path_factory.mktemp('adapters'))
  with served_http.running(engine, body=20_000) as held:
    yield held


@pytest.fixture
def client(server):
  with server.client() as held:
    yield held
  assert server.is_free()


@pytest.fixture
def raw(server):
  """For what no well-behaved client sends."""
  headers = {'Authorization': f'Bearer {KEY}'}
  with httpx2.Client(base_url=server.url, headers=headers, timeout=60) as held:
    yield held
  assert server.is_free()


@pytest.fixture(scope='module')
def known():
  """Requests for every adapter and none, and their answers: (name, prompt, text)."""
  pairs = served.clear(['', *NAMES, SPARE], [3, 9])
  return [(one.adapter or BASE, [*one.prompt], TOKENIZER.decode(ids)) for one, ids in pairs]


@pytest.fixture
def slow(server, monkeypatch):
  """Steps that take their time, so that an answer lasts seconds."""
  step = server.engine.step
  monkeypatch.setattr(server.engine, 'step', lambda: (time.sleep(0.02), step()))


def as_sent(body, size=None):
  """A request for a text as it goes over the wire; `size` is what it says its length is."""
  said = json.dumps(body)
  head = ('POST /v1/completions HTTP/1.1', 'Host: x', f'Authorization: Bearer {KEY}')
  head += ('Content-Type: application/json', f'Content-Length: {size or len(said)}')
  return '\r\n'.join((*head, '', said)).encode()


def chunks(stream):
  return [chunk.choices[0] for chunk in stream if chunk.choices]


def test_texts_are_gone_on_with_as_the_merged_adapter_would(client, known):
  for name, prompt, text in known:
    if name != SPARE:
      held = client.completions.create(model=name, prompt=prompt, max_tokens=served.NEW, **GREEDY)
      (choice,) = held.choices
      assert (choice.text, choice.finish_reason, held.model) == (text, 'length', name)
      usage = held.usage
      assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), served.NEW)


def test_a_chat_is_answered_whole_or_as_a_stream(client):
  ask = {'model': 'all', 'messages': TURNS, 'max_tokens': 12, **GREEDY}
  whole = client.chat.completions.create(**ask)
  (choice,) = whole.choices
  assert (choice.message.role, choice.finish_reason) == ('assistant', 'length')
  ids = TOKENIZER.encode_chat(TURNS)
  text = client.completions.create(model='all', prompt=ids, max_tokens=12, **GREEDY)
  assert choice.message.content == text.choices[0].text
  options = {'include_usage': True}
  stream = [*client.chat.completions.create(**ask, stream=True, stream_options=options)]
  assert len({chunk.id for chunk in stream}) == 1
  assert stream[-1].usage == whole.usage
  assert all(chunk.usage is None for chunk in stream[:-1])
  assert stream[0].choices[0].delta.role == 'assistant'
  said = chunks(stream)
  assert ''.join(one.delta.content or '' for one in said) == choice.message.content
  assert [one.finish_reason for one in said if one.finish_reason] == ['length']
  # An answer goes back as it came.
  again = [*TURNS, choice.message, *TURNS]
  client.chat.completions.create(model='all', messages=again, max_tokens=2)


def test_a_stream_is_events_that_end_with_done(raw):
  ask = {'model': BASE, 'prompt': 'Hi', 'max_tokens': 3, 'stream': True}
  held = raw.post('/v1/completions', json=ask)
  assert held.headers['content-type'].startswith('text/event-stream')
  *events, done, rest = held.text.split('\n\n')
  assert (done, rest) == ('data: [DONE]', '')
  assert all(json.loads(event.removeprefix('data: '))['choices'] for event in events)


def test_several_prompts_and_several_answers_to_each(client, known):
  (_, one, said), (_, other, told) = [case for case in known if case[0] == BASE][:2]
  ask = {'model': BASE, 'prompt': [one, other], 'n': 2, 'max_tokens': served.NEW, **GREEDY}
  held = client.completions.create(**ask)
  assert [(choice.index, choice.text) for choice in held.choices] == [
    (0, said), (1, said), (2, told), (3, told),
  ]  # fmt: skip
  read, said_of = len(one) + len(other), 4 * served.NEW
  assert (held.usage.prompt_tokens, held.usage.completion_tokens) == (read, said_of)
  texts = dict.fromkeys(range(4), '')
  for choice in chunks(client.completions.create(**ask, stream=True)):
    texts[choice.index] += choice.text
  assert [*texts.values()] == [said, said, told, told]


def test_stop_strings_and_seeds(client, known):
  _, prompt, text = known[0]
  stop = text[len(text) // 2 :][:2]
  ask = {'model': BASE, 'prompt': prompt, 'max_tokens': served.NEW}
  held = client.completions.create(**ask, stop=[stop], **GREEDY).choices[0]
  assert (held.text, held.finish_reason) == (text[: text.index(stop)], 'stop')
  drawn = [client.completions.create(**ask, seed=seed).choices[0].text for seed in (1, 1, 2)]
  assert drawn[0] == drawn[1] != drawn[2]
  assert client.completions.create(**ask).choices[0].text not in (drawn[0], text)


def test_models_are_the_base_and_its_adapters(client):
  held = client.models.list().data
  assert [model.id for model in held] == [BASE, *sorted(NAMES)]
  assert client.models.retrieve('all').parent == BASE
  with pytest.raises(openai.NotFoundError):
    client.models.retrieve('nope')


def test_adapters_are_used_loaded_and_unloaded_at_the_same_time(server, known):
  async def ask(client, name, prompt):
    ask = {'model': name, 'prompt': prompt, 'max_tokens': served.NEW, **GREEDY}
    held = await client.completions.create(**ask)
    return held.choices[0].text

  async def come_and_go(client):
    cases = [(prompt, text) for name, prompt, text in known if name == SPARE]
    for turn in range(4):
      name = f'guest-{turn}'
      body = {'lora_name': name, 'lora_path': SPARE}
      said = await client.post('/load_lora_adapter', body=body, cast_to=str)
      assert said.startswith('Success')
      with pytest.raises(openai.BadRequestError, match='already'):
        await client.post('/load_lora_adapter', body=body, cast_to=str)
      for prompt, text in cases:
        assert await ask(client, name, prompt) == text
      await client.post('/unload_lora_adapter', body={'lora_name': name}, cast_to=str)
      with pytest.raises(openai.NotFoundError, match='no adapter'):
        await ask(client, name, prompt)

  async def all_at_once():
    async with server.client(openai.AsyncOpenAI) as client:
      cases = [case for case in known if case[0] != SPARE] * 4
      asking = [ask(client, name, prompt) for name, prompt, _ in cases]
      *texts, _ = await asyncio.gather(*asking, come_and_go(client))
      assert texts == [text for *_, text in cases]

  asyncio.run(all_at_once())
  assert server.is_free()


@pytest.mark.usefixtures('slow')
def test_who_leaves_frees_a_row_and_a_slot(server, client, raw):
  ask = {'model': 'all', 'prompt': [5, 6], 'max_tokens': CONFIG.length - 2}
  cancelled = ('lora_jax_answers_total', 'cancelled')
  count = lambda: served_http.measured(raw.get('/metrics').text).get(cancelled, 0)
  before = count()
  stream = client.completions.create(**ask, stream=True)
  next(iter(stream))
  assert server.engine.counts.slots_in_use == 1
  stream.close()
  assert server.is_free()
  # The same for one who waits for a whole answer, and for one who waits for a row.
  with socket.create_connection(('127.0.0.1', server.port)) as sock:
    sock.sendall(as_sent(ask | {'n': CONFIG.rows + 2}))
    while server.engine.counts.waiting != 2:
      time.sleep(0.01)
    assert server.engine.counts.seated == CONFIG.rows
  assert server.is_free()
  assert count() == before + 1 + CONFIG.rows + 2


def test_what_is_wrong_is_said_with_its_status(server, raw):
  text, load, unload = '/v1/completions', '/v1/load_lora_adapter', '/v1/unload_lora_adapter'
  ask = {'model': BASE, 'prompt': [5, 6], 'max_tokens': 2}
  image = [{'type': 'image_url', 'image_url': {'url': 'data:image/png;base64,AAAA'}}]
  chat = {'model': BASE, 'messages': [{'role': 'user', 'content': image}]}
  named = lambda path: {'lora_name': 'x', 'lora_path': path}
  cases = [
    (text, ask | {'prompt': [5] * CONFIG.length}, 400, 'there is room for'),
    (text, ask | {'max_tokens': CONFIG.length}, 400, 'there is room for'),
    (text, ask | {'prompt': [10**9]}, 400, 'tokens that are not in'),
    (text, ask | {'prompt': ''}, 400, 'prompt is empty'),
    (text, ask | {'model': 'nope'}, 404, "no adapter 'nope'"),
    (text, ask | {'model': '../../etc/passwd'}, 404, 'no adapter'),
    (text, ask | {'suffix': 'x'}, 400, 'suffix is not supported'),
    ('/v1/chat/completions', chat, 400, 'images are not taken'),
    (text, ask | {'prompt': 'x' * 30_000}, 413, '20000 bytes'),
    (load, named('../../etc/passwd'), 400, 'no adapter'),
    (load, named('/etc/passwd'), 400, 'no adapter'),
    (load, named('nowhere'), 400, 'no adapter'),
    (load, named(CORRUPT), 400, 'cut short'),
    (load, {'lora_name': 'x'}, 400, 'lora_path'),
    (load, {'lora_name': BASE, 'lora_path': SPARE}, 400, 'is the base'),
    (unload, {'lora_name': 'nope'}, 404, "no adapter 'nope'"),
    (unload, {'lora_name': BASE}, 404, 'no adapter'),
    ('/v1/embeddings', ask, 404, 'Not Found'),
  ]
  for path, body, status, says in cases:
    held = raw.post(path, json=body)
    message = held.json()['error']['message']
    assert (held.status_code, '\n' in message) == (status, False), message
    assert says in message
  headers = {'Content-Type': 'application/json'}
  for content in (b'{"model": ', b'', b'null', b'\xff\x00', b'[' * 5000):
    assert raw.post(text, content=content, headers=headers).status_code == 400
  assert raw.get(text).status_code == 405
  assert raw.post(text, json=ask, headers={'Authorization': 'Bearer no'}).status_code == 401
  assert raw.post(text, json=ask).status_code == 200
  assert 'x' not in server.engine.library.names


def test_what_is_no_request_at_all_harms_nobody(server, raw):
  cut = as_sent({'model': BASE, 'prompt': [5]})[:-5]
  for said in (b'\x00\xff' * 50, b'GET / HTTP/9\r\n\r\n', cut):
    with socket.create_connection(('127.0.0.1', server.port)) as sock:
      sock.sendall(said)
  # 100 MB are neither read into memory nor waited for.
  with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', server.port)) as sock:
    sock.sendall(as_sent({}, size=10**8))
    sock.sendall(b'x' * 10**6)
    assert sock.recv(100).startswith(b'HTTP/1.1 413')
  assert raw.get('/health').json() == {'status': 'ok'}
  ask = {'model': 'all', 'prompt': [5], 'max_tokens': 2}
  assert raw.post('/v1/completions', json=ask).status_code == 200


@pytest.mark.usefixtures('slow')
def test_a_client_that_reads_slowly_holds_up_nobody(server, raw):
  with socket.create_connection(('127.0.0.1', server.port)) as sock:
    sock.sendall(as_sent({'model': BASE, 'prompt': [5], 'max_tokens': 150, 'stream': True}))
    ask = {'model': 'all', 'prompt': [5], 'max_tokens': 2}
    assert raw.post('/v1/completions', json=ask).status_code == 200
    # It reads nothing, and the engine is done with it all the same.
    assert server.is_free()
    said = b''
    while b'[DONE]' not in said:
      said += sock.recv(1000)


def test_metrics_say_what_was_done(server, client, raw):
  before = served_http.measured(raw.get('/metrics').text)
  client.completions.create(model='all', prompt=[5, 6, 7], max_tokens=4)
  with pytest.raises(openai.NotFoundError):
    client.completions.create(model='nope', prompt=[5])
  after = served_http.measured(raw.get('/metrics').text)
  more = lambda *key: (
    after[f'lora_jax_{key[0]}', *key[1:]] - before.get((f'lora_jax_{key[0]}', *key[1:]), 0)
  )
  assert more('http_requests_total', '/v1/completions', '200') == 1
  assert more('http_requests_total', '/v1/completions', '404') == 1
  assert more('answers_total', 'length') == 1
  assert (more('prompt_tokens_total'), more('generation_tokens_total')) == (3, 4)
  assert more('time_to_first_text_seconds_count') == more('request_seconds_count') == 1
  assert after['lora_jax_rows_free',] == CONFIG.rows
  assert after['lora_jax_adapters_listed',] == len(NAMES)


@contextlib.contextmanager
def app_of(engine, **limits):
  """The application without a socket, and its runner."""
  with Runner(engine) as runner:
    app = build(runner, engine, TOKENIZER, BASE, Limits(**limits))
    with TestClient(app, raise_server_exceptions=False) as asking:
      yield asking


def test_a_full_queue_is_said_and_when_to_ask_again(server):
  ask = {'model': BASE, 'prompt': [5], 'max_tokens': 2}
  with app_of(server.engine, queue=2) as asking:
    held = asking.post('/v1/completions', json=ask | {'n': CONFIG.rows + 3})
    assert held.status_code == 503
    assert int(held.headers['Retry-After']) >= 1
    assert asking.post('/v1/completions', json=ask | {'n': CONFIG.rows + 2}).status_code == 200
    # Places are given back, also by what was refused later.
    assert asking.post('/v1/completions', json=ask | {'prompt': [-1]}).status_code == 400
    assert asking.post('/v1/completions', json=ask | {'n': CONFIG.rows + 2}).status_code == 200


@pytest.mark.parametrize('steps', [0, 20])
def test_an_engine_that_breaks_is_told_to_all(server, monkeypatch, steps):
  """Steps that it takes before; with some, a stream has begun."""
  ask, left = {'model': BASE, 'prompt': [5], 'max_tokens': 100}, [*range(steps)]
  step = server.engine.step

  def breaks():
    if not left:
      raise RuntimeError('the device is gone')
    left.pop()
    step()

  runner = Runner(server.engine).__enter__()
  app = build(runner, server.engine, TOKENIZER, BASE, Limits())
  with TestClient(app, raise_server_exceptions=False) as asking:
    assert asking.get('/health').status_code == 200
    monkeypatch.setattr(server.engine, 'step', breaks)
    held = asking.post('/v1/completions', json=ask | {'stream': True})
    assert held.status_code == (200 if steps else 500)
    *_, last, _ = ['', held.text, ''] if not steps else held.text.split('\n\n')
    assert 'the device is gone' in json.loads(last.removeprefix('data: '))['error']['message']
    assert asking.post('/v1/completions', json=ask).status_code == 500
    assert asking.get('/health').status_code == 503
  with pytest.raises(RuntimeError, match='the device is gone'):
    runner.close()
  assert server.is_free()


def test_a_server_that_fails_says_so_in_the_same_form(server, monkeypatch):
  def fails(*_):
    raise RuntimeError('a secret of ours')

  with app_of(server.engine) as asking:
    monkeypatch.setattr(server.engine, 'prepare', fails)
    ask = {'model': BASE, 'prompt': [5]}
    held = asking.post('/v1/completions', json=ask)
    assert held.status_code == 500
    assert held.json()['error']['type'] == 'server_error'
    assert 'secret' not in held.text


def test_the_end_waits_for_answers(server, monkeypatch):
  step = server.engine.step
  monkeypatch.setattr(server.engine, 'step', lambda: (time.sleep(0.005), step()))
  began, texts = threading.Event(), []

  def ask(held):
    with held.client() as client:
      ask = {'model': 'all', 'prompt': [5], 'max_tokens': 100, 'stream': True}
      for choice in chunks(client.completions.create(**ask)):
        began.set()
        texts.append(choice.text)
        texts.extend(filter(None, [choice.finish_reason]))

  with served_http.running(server.engine) as held:
    thread = threading.Thread(target=ask, args=(held,))
    thread.start()
    assert began.wait(60)
    held.server.should_exit = True
  thread.join()
  assert texts[-1] == 'length'
  assert server.is_free()


def test_no_adapter_is_called_as_the_base(server):
  with Runner(server.engine) as runner, pytest.raises(UserError, match='rename its directory'):
    build(runner, server.engine, TOKENIZER, 'all', Limits())

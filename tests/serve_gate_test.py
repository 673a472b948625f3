"""Who is let through to an application: keys, rates, and bodies that may be too large."""

import asyncio
import json

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from lora_jax.errors import UserError
from lora_jax.serve.http.gate import Gate, Limits, Rate

JSON = {'Content-Type': 'application/json'}


async def echo(request):
  return JSONResponse(await request.json() if request.method == 'POST' else 'here')


def client(**limits):
  routes = [Route('/', echo, methods=['GET', 'POST']), Route('/health', echo)]
  return TestClient(Gate(Starlette(routes=routes), Limits(**limits)))


def error(response, status):
  assert response.status_code == status
  (held,) = response.json().values()
  assert held.keys() == {'message', 'type', 'param', 'code'}
  assert '\n' not in held['message']
  return held


def test_a_key_that_is_known_lets_through():
  with client(keys=('first', 'second')) as asking:
    bearer = lambda key: {'Authorization': f'Bearer {key}'}
    for key in ('first', 'second'):
      assert asking.get('/', headers=bearer(key)).status_code == 200
    wrong = [bearer('third'), bearer(''), bearer('firs'), bearer('first second'), {}]
    wrong += [{'Authorization': 'first'}, {'Authorization': 'Basic first'}]
    for headers in (*wrong, {'Authorization': b'Bearer \xff'}):
      held = asking.get('/', headers=headers)
      assert error(held, 401)['code'] == 'invalid_api_key'
      assert held.headers['WWW-Authenticate'] == 'Bearer'
      assert 'first' not in held.text
      assert asking.get('/nowhere', headers=headers).status_code == 401
    assert asking.get('/health').status_code == 200


def test_without_keys_anyone_is_let_through():
  with client() as asking:
    assert asking.get('/').json() == 'here'


def test_a_body_has_so_many_bytes_however_it_comes():
  body = json.dumps('x' * 98).encode()
  with client(body=100) as asking:
    whole = asking.post('/', content=body, headers=JSON)
    assert whole.json() == 'x' * 98
    assert error(asking.post('/', content=body + b' ', headers=JSON), 413)['code']
    # A length that is told is not waited for; one that is told wrong is counted.
    told = JSON | {'Content-Length': str(10**12)}
    assert asking.post('/', content=b'1', headers=told).status_code == 413
    assert asking.post('/', content=b'1', headers=JSON | {'Content-Length': '-5'}).json() == 1
    endless = JSON | {'Content-Length': '9' * 5000}
    assert asking.post('/', content=b'1', headers=endless).status_code == 413


def test_an_endless_body_is_read_no_further_than_allowed():
  taken, sent = [], []

  async def receive():
    taken.append(1)
    return {'type': 'http.request', 'body': b'x' * 10, 'more_body': True}

  async def send(message):
    sent.append(message)

  scope = {'type': 'http', 'method': 'POST', 'path': '/', 'headers': [], 'client': ('a', 1)}
  asyncio.run(Gate(Starlette(), Limits(body=95))(scope, receive, send))
  assert sent[0]['status'] == 413
  assert len(taken) == 10


@pytest.mark.parametrize(('leaves', 'status'), [(True, None), (False, 408)])
def test_a_body_that_never_ends_is_waited_for_only_so_long(leaves, status):
  sent = []
  messages = [{'type': 'http.request', 'body': b'{', 'more_body': True}]
  messages += [{'type': 'http.disconnect'}] if leaves else []

  async def receive():
    return messages.pop(0) if messages else await asyncio.sleep(60)

  async def send(message):
    sent.append(message)

  scope = {'type': 'http', 'method': 'POST', 'path': '/', 'headers': [], 'client': None}
  asyncio.run(Gate(Starlette(), Limits(seconds=0.05))(scope, receive, send))
  assert (sent[0]['status'] if sent else None) == status


def test_what_a_web_page_could_post_unasked_is_refused():
  with client() as asking:
    for kind in ('text/plain', 'application/x-www-form-urlencoded', None):
      headers = {'Content-Type': kind} if kind else {}
      error(asking.post('/', content=b'{}', headers=headers), 415)
    headers = {'Content-Type': 'Application/JSON; charset=utf-8'}
    assert asking.post('/', content=b'{}', headers=headers).json() == {}


def test_a_rate_is_so_many_at_once_and_then_one_at_a_time():
  now = 100.0
  rate = Rate(6, lambda: now)
  assert [rate.take('a') for _ in range(6)] == [0.0] * 6
  assert rate.take('a') == pytest.approx(10)
  assert rate.take('b') == 0.0
  now += 9
  assert rate.take('a') == pytest.approx(1)
  now += 1
  assert rate.take('a') == 0.0
  assert rate.take('a') == pytest.approx(10)
  # Over an hour it is six a minute, and the six that were there at the start.
  taken = 0
  for _ in range(3600):
    now += 1
    taken += rate.take('c') == 0.0
  assert taken == 6 + 3600 // 10 - 1


def test_those_who_rest_are_forgotten():
  now = 0.0
  rate = Rate(60, lambda: now)
  for who in range(25_000):
    now += 0.01
    assert rate.take(str(who)) == 0.0
  assert len(rate._rested) <= 10_000


def test_who_asks_too_often_hears_when_to_ask_again():
  with client(keys=('a', 'b'), rate=2) as asking:
    ask = lambda key: asking.get('/', headers={'Authorization': f'Bearer {key}'})
    assert [ask('a').status_code for _ in range(2)] == [200] * 2
    held = ask('a')
    assert error(held, 429)['type'] == 'rate_limit_error'
    assert 28 <= int(held.headers['Retry-After']) <= 30
    assert ask('b').status_code == 200
    assert asking.get('/health').status_code == 200
    # A key that nobody has is no one's rate.
    assert ask('c').status_code == 401


@pytest.mark.parametrize(
  ('limits', 'says'),
  [
    ({'body': 0}, 'max_body is 0'),
    ({'rate': -1}, 'rate is -1'),
    ({'queue': -1}, 'queue is -1'),
    ({'keys': ('',)}, 'API key is empty'),
    ({'keys': ('a b\n',)}, 'no header can carry'),
    ({'keys': ('schlüssel',)}, 'no header can carry'),
  ],
)
def test_limits_under_which_nothing_could_be_asked(limits, says):
  with pytest.raises(UserError, match=says):
    Limits(**limits)


def test_a_body_that_was_read_is_followed_by_what_comes_after():
  seen = []

  async def app(scope, receive, send):
    request = Request(scope, receive)
    seen.append(await request.body())
    seen.append(await receive())

  messages = [
    {'type': 'http.request', 'body': b'[1', 'more_body': True},
    {'type': 'http.request', 'body': b']', 'more_body': False},
    {'type': 'http.disconnect'},
  ]

  async def receive():
    return messages.pop(0)

  headers = [(b'content-type', b'application/json')]
  scope = {'type': 'http', 'method': 'POST', 'path': '/', 'headers': headers, 'client': ('a', 1)}
  asyncio.run(Gate(app, Limits())(scope, receive, None))
  assert seen == [b'[1]', {'type': 'http.disconnect'}]

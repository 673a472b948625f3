"""Who may ask, how often, and how much a request may hold; it knows nothing of what is asked."""

import asyncio
import dataclasses
import hashlib
import hmac
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_jax.errors import UserError
from lora_jax.serve.http.refusal import RefusalError, later

# Whoever looks whether the server lives has no key.
OPEN = ('/health',)
# Addresses whose rates are kept; then those that have asked little are forgotten.
_ADDRESSES = 10_000


@dataclasses.dataclass(frozen=True)
class Limits:
  """What is asked of requests.

  Attributes:
    keys: one of them comes with each; none: anyone may ask.
    body: bytes that one may have.
    rate: how many a minute of one key, or, where there are none, of one address; 0: any
      number.
    queue: answers that may wait for a row.
    seconds: in which a request has to arrive.

  Raises:
    UserError: nothing could ever be asked.
  """

  keys: tuple[str, ...] = ()
  body: int = 2**20
  rate: int = 0
  queue: int = 256
  seconds: float = 30.0

  def __post_init__(self):
    if self.body < 1:
      raise UserError(f'max_body is {self.body}; give at least 1 byte')
    for name in ('rate', 'queue'):
      if getattr(self, name) < 0:
        raise UserError(f'{name} is {getattr(self, name)}; give a number from 0')
    if not all(key.isascii() and key.isprintable() and key.strip() == key for key in self.keys):
      raise UserError('an API key has characters that no header can carry; give plain ASCII')
    if '' in self.keys:
      raise UserError('an API key is empty; give one, or none at all')


class Rate:
  """So many a minute of each, and as many at once after a minute of rest."""

  def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic):
    """Nobody has asked yet.

    Args:
      rate: how many a minute; 0: any number.
      clock: seconds.
    """
    self._rate, self._clock = rate, clock
    # Who -> when all that they may ask at once is theirs again.
    self._rested: dict[str, float] = {}

  def take(self, who: str) -> float:
    """Counts one, if it may be: the seconds until it may, 0.0 if it is counted."""
    if not self._rate:
      return 0.0
    now, each = self._clock(), 60 / self._rate
    rested = max(self._rested.get(who, now), now) + each
    over = rested - now - 60
    if over > 1e-9:
      return over
    if len(self._rested) >= _ADDRESSES:
      self._rested = {one: when for one, when in self._rested.items() if when > now}
    self._rested[who] = rested
    return 0.0


class Gate:
  """Lets through to an application what keeps to the limits, with its body read."""

  def __init__(self, app: ASGIApp, limits: Limits):
    """Stands before `app`."""
    self._app, self._limits = app, limits
    self._rate = Rate(limits.rate)
    self._digests = [_digest(key.encode()) for key in limits.keys]

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """As ASGI has it."""
    if scope['type'] == 'http' and scope['path'] not in OPEN:
      try:
        self._check(scope)
        receive = await self._read(scope, receive)
      except RefusalError as refusal:
        return await refusal.response(scope, receive, send)
      except _GoneError:
        return None
    return await self._app(scope, receive, send)

  def _check(self, scope: Scope) -> None:
    host, _ = scope.get('client') or ('', 0)
    who = self._key(Headers(scope=scope)) if self._digests else host
    seconds = self._rate.take(who)
    if seconds:
      message = f'more than {self._limits.rate} requests a minute; ask again later'
      raise later(429, message, seconds, 'rate_limit_exceeded')

  def _key(self, headers: Headers) -> str:
    """The digest of the key that came."""
    scheme, _, key = headers.get('authorization', '').partition(' ')
    given = _digest(key.strip().encode())
    # All are compared, and each to its end: time tells nothing.
    found = [hmac.compare_digest(given, held) for held in self._digests]
    if scheme.lower() != 'bearer' or not any(found):
      raise RefusalError(
        401,
        'no API key that is known here; send one as "Authorization: Bearer KEY"',
        code='invalid_api_key',
        headers={'WWW-Authenticate': 'Bearer'},
      )
    return given

  async def _read(self, scope: Scope, receive: Receive) -> Receive:
    """Takes a body in, and gives it again."""
    headers, most = Headers(scope=scope), self._limits.body
    large = RefusalError(413, f'a request may have {most} bytes', code='request_too_large')
    told = headers.get('content-length', '')
    # Python takes no number of thousands of digits.
    if told.isdecimal() and (len(told) > 18 or int(told) > most):
      raise large
    body, more = bytearray(), True
    try:
      async with asyncio.timeout(self._limits.seconds):
        while more:
          message = await receive()
          if message['type'] == 'http.disconnect':
            raise _GoneError
          body += message.get('body', b'')
          more = message.get('more_body', False)
          if len(body) > most:
            raise large
    except TimeoutError:
      raise RefusalError(
        408, f'the request took more than {self._limits.seconds} seconds'
      ) from None
    # A web page may have a browser post anything else to a server of its user's.
    kind = headers.get('content-type', '').partition(';')[0].strip().lower()
    if body and kind != 'application/json':
      raise RefusalError(415, 'send JSON, with "Content-Type: application/json"')
    whole: list[Message] = [{'type': 'http.request', 'body': bytes(body), 'more_body': False}]

    async def again() -> Message:
      return whole.pop() if whole else await receive()

    return again


class _GoneError(Exception):
  """Whoever asked has left."""


def _digest(key: bytes) -> str:
  return hashlib.sha256(key).hexdigest()

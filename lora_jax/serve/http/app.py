"""The application: what is asked goes to the runner, and its answers back.

with Runner(engine) as runner:
  app = build(runner, engine, tokenizer, 'smollm2-135m-instruct', Limits(keys=('secret',)))
  uvicorn.run(app)
"""

import asyncio
import concurrent.futures
import contextlib
import json
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lora_jax.errors import UserError
from lora_jax.hub.tokenizer import ChatTokenizer
from lora_jax.serve.engine import Engine
from lora_jax.serve.http import asked, said
from lora_jax.serve.http.gate import Gate, Limits
from lora_jax.serve.http.inbox import Inbox, News
from lora_jax.serve.http.metrics import Counted, Metrics, Stopwatch
from lora_jax.serve.http.refusal import RefusalError, later
from lora_jax.serve.library import UnknownAdapterError
from lora_jax.serve.runner import Runner, StoppedError

# When whoever finds no place may ask again: about an answer's time.
_RETRY_SECONDS = 2.0


def build(
  runner: Runner, engine: Engine, tokenizer: ChatTokenizer, base: str, limits: Limits
) -> Starlette:
  """Makes the application.

  Args:
    runner: of `engine`; it runs as long as the application does.
    engine: whose adapters are listed and whose counts are told.
    tokenizer: the base's.
    base: what requests call the base.
    limits: what is asked of requests.

  Raises:
    UserError: an adapter is called as the base is.
  """
  if base in engine.library.names:
    raise UserError(f'an adapter is called {base!r}, as the base is; rename its directory')
  desk = Desk(runner, engine, tokenizer, base, limits.queue)
  routes = [
    Route('/health', desk.health),
    Route('/metrics', desk.report),
    Route('/v1/models', desk.models),
    Route('/v1/models/{name:path}', desk.model),
    Route('/v1/completions', Answering(desk, asked.Text, said.Saying), methods=['POST']),
    Route('/v1/chat/completions', Answering(desk, asked.Chat, said.ChatSaying), methods=['POST']),
    Route('/v1/load_lora_adapter', desk.load, methods=['POST']),
    Route('/v1/unload_lora_adapter', desk.unload, methods=['POST']),
    Route('/tokenize', desk.tokenize, methods=['POST']),
    Route('/detokenize', desk.detokenize, methods=['POST']),
    Route('/tokenizer_info', desk.tokenizer_info),
  ]
  return Starlette(
    routes=routes,
    middleware=[
      Middleware(Counted, metrics=desk.metrics, paths={route.path for route in routes}),
      Middleware(Gate, limits=limits),
    ],
    exception_handlers=dict.fromkeys((RefusalError, UserError, HTTPException, Exception), _say),
  )


class Desk:
  """What all requests share.

  Attributes:
    runner: answers.
    tokenizer: the base's.
    metrics: what is counted.
    looker: looks at images, or None.
    lookers: the thread in which it does.
  """

  def __init__(
    self, runner: Runner, engine: Engine, tokenizer: ChatTokenizer, base: str, queue: int
  ):
    """As `build`; `queue` is how many answers may wait for a row."""
    self.runner, self.tokenizer, self.metrics = runner, tokenizer, Metrics(engine)
    self.looker = engine.looker
    self.lookers = concurrent.futures.ThreadPoolExecutor(1, 'images')
    self._engine, self._base = engine, base
    self._room = engine.config.rows + queue
    self._open = 0
    self._created = int(time.time())

  def adapter(self, model: str) -> str:
    """The adapter that a model's name means; '': the base."""
    return '' if model == self._base else model

  @contextlib.contextmanager
  def place(self, count: int) -> Iterator[None]:
    """Keeps places for so many answers, as long as they are open.

    Raises:
      RefusalError: there are not so many; or nothing is answered any more.
    """
    self._check_alive(500)
    if self._open + count > self._room:
      raise later(503, 'too many requests wait; ask again later', _RETRY_SECONDS, 'overloaded')
    self._open += count
    try:
      yield
    finally:
      self._open -= count

  async def health(self, _: Request) -> Response:
    """Whether requests are answered."""
    self._check_alive(503)
    return JSONResponse({'status': 'ok'})

  async def report(self, _: Request) -> Response:
    """What is counted."""
    return Response(self.metrics.text(), media_type='text/plain; version=0.0.4; charset=utf-8')

  async def models(self, _: Request) -> Response:
    """The base and its adapters."""
    cards = [self._card(self._base), *map(self._card, self._engine.library.names)]
    return JSONResponse({'object': 'list', 'data': cards})

  async def model(self, request: Request) -> Response:
    """One of them."""
    name = request.path_params['name']
    if self.adapter(name):
      self._engine.library.find(name)
    return JSONResponse(self._card(name))

  async def load(self, request: Request) -> Response:
    """Lists an adapter of the directory, under a name."""
    body = asked.parse(asked.Load, await request.body())
    if body.lora_name == self._base:
      raise UserError(f'{body.lora_name!r} is the base; give the adapter another name')
    await asyncio.to_thread(self._engine.library.add, body.lora_name, body.lora_path)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added")

  async def unload(self, request: Request) -> Response:
    """Lists an adapter no longer."""
    body = asked.parse(asked.Unload, await request.body())
    await asyncio.to_thread(self.runner.unload, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed")

  async def tokenize(self, request: Request) -> Response:
    """The tokens of a text, as vLLM has it."""
    body = asked.parse(asked.Spell, await request.body())
    encode = (
      self.tokenizer.encode if body.add_special_tokens is False else self.tokenizer.encode_text
    )
    ids = await asyncio.to_thread(encode, body.prompt)
    length = self._engine.config.length
    return JSONResponse({'count': len(ids), 'max_model_len': length, 'tokens': ids})

  async def detokenize(self, request: Request) -> Response:
    """The text of tokens, as vLLM has it."""
    body = asked.parse(asked.Read, await request.body())
    last = self.tokenizer.vocab_size - 1
    if not all(0 <= token <= last for token in body.tokens):
      raise RefusalError(400, f'tokens: give ids of 0-{last}', param='tokens')
    return JSONResponse({'prompt': self.tokenizer.decode(body.tokens, skip_special=False)})

  async def tokenizer_info(self, _: Request) -> Response:
    """What a client has to know of the tokenizer, as vLLM has it."""
    names = {token: text for text, token in self.tokenizer.special_tokens.items()}
    ids = {'bos': self.tokenizer.bos_id, 'eos': self.tokenizer.eos_id, 'pad': self.tokenizer.pad_id}
    return JSONResponse(
      {f'{name}_token': None if i is None else names.get(i) for name, i in ids.items()}
      | {'chat_template': self.tokenizer.template.standalone()}
    )

  def _card(self, name: str) -> dict[str, Any]:
    base = self._base if self.adapter(name) else None
    return said.model_card(name, self._created, self._engine.config.length, base)

  def _check_alive(self, status: int) -> None:
    if self.runner.error is not None:
      raise RefusalError(status, f'the engine stopped: {self.runner.error}')


class Answering:
  """An endpoint that answers. It is ASGI's own form, since it ends when the client leaves."""

  def __init__(self, desk: Desk, form: type[asked.Asked], saying: type[said.Saying]):
    """Reads requests as `form`, and answers as `saying`."""
    self._desk, self._form, self._saying = desk, form, saying

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """As ASGI has it."""
    body = asked.parse(self._form, await Request(scope, receive).body())
    inbox = Inbox(self._desk.runner)
    try:
      with self._desk.place(body.count), contextlib.closing(inbox):
        await _unless_gone(receive, self._answer(body, inbox, scope, receive, send))
    finally:
      for answer in inbox.answers:
        self._desk.metrics.count_answer(answer.finish or 'cancelled')

  async def _answer(
    self, body: asked.Asked, inbox: Inbox, scope: Scope, receive: Receive, send: Send
  ) -> None:
    watch = self._desk.metrics.stopwatch()
    adapter = self._desk.adapter(body.model)
    requests = body.requests(self._desk.tokenizer, adapter, self._desk.looker)
    # Reading a chat takes time, and so does an adapter.
    if body.has_images:
      # So do images, and those who send none are not to wait for a thread because of them.
      loop = asyncio.get_running_loop()
      await loop.run_in_executor(self._desk.lookers, inbox.submit, requests)
    else:
      await asyncio.to_thread(inbox.submit, requests)
    # What fails before anything is said still has a status of its own.
    first = await _heard(inbox, watch)
    saying = self._saying(body, self._desk.tokenizer)
    if body.stream:
      stream = _events(saying, body, inbox, first, watch)
      headers = {'Cache-Control': 'no-cache', 'X-Accel-Buffering': 'no'}
      # Its own way of being sent would wait for the client's leaving a second time.
      await StreamingResponse(stream, 200, headers, 'text/event-stream').stream_response(send)
      return
    while inbox.expects:
      await _heard(inbox, watch)
    # What is told of many tokens takes time too.
    content = await asyncio.to_thread(saying.whole, inbox.answers)
    watch.ended()
    await JSONResponse(content)(scope, receive, send)


async def _events(
  saying: said.Saying, body: asked.Asked, inbox: Inbox, first: list[News], watch: Stopwatch
) -> AsyncIterator[str]:
  """A stream's events: what was heard first, and the rest as it comes."""
  # Where the last of them says how many tokens there were, the others say that they do not.
  also = {'usage': None} if body.with_usage else {}
  event = lambda chunk: f'data: {json.dumps(chunk, ensure_ascii=False)}\n\n'
  for chunk in saying.opening(body.count):
    yield event(chunk | also)
  heard = first
  while heard:
    for news in heard:
      yield event(saying.chunk(news) | also)
    try:
      heard = await _heard(inbox, watch) if inbox.expects else []
    except RefusalError as refusal:
      yield event(refusal.content)
      return
  watch.ended()
  if body.with_usage:
    yield event(saying.closing(inbox.answers))
  yield 'data: [DONE]\n\n'


async def _heard(inbox: Inbox, watch: Stopwatch) -> list[News]:
  """The inbox's news.

  Raises:
    RefusalError: an answer failed.
  """
  heard = await inbox.news()
  for news in heard:
    if news.finish == 'failed':
      raise RefusalError(500, news.answer.error)
  watch.began()
  return heard


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
  """Does some work, and gives it up when the client leaves."""

  async def leaves() -> None:
    while (await receive())['type'] != 'http.disconnect':
      pass

  tasks = working, leaving = asyncio.create_task(work), asyncio.create_task(leaves())
  try:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    if working.done():
      working.result()
  finally:
    leaving.cancel()
    working.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _say(_: Request, error: Exception) -> Response:
  return _refusal(error).response


def _refusal(error: Exception) -> RefusalError:
  """What is said of an error."""
  match error:
    case RefusalError():
      return error
    case UnknownAdapterError():
      return RefusalError(404, str(error), param='model', code='model_not_found')
    case UserError():
      return RefusalError(503 if isinstance(error, StoppedError) else 400, str(error))
    case HTTPException():
      return RefusalError(error.status_code, error.detail, headers=error.headers)
  return RefusalError(500, f'the server failed: {type(error).__name__}')

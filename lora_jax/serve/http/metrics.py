"""What a server counts, for Prometheus: requests and answers, and what its engine counts."""

import time
from collections.abc import Collection, Iterator

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_jax.serve.answer import Finish
from lora_jax.serve.engine import Engine

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
# What an engine is at, and what it has done: field of its counts -> name and meaning.
_GAUGES = {
  'waiting': ('requests_waiting', 'Answers that wait for a row.'),
  'seated': ('requests_running', 'Rows in which one is answered.'),
  'free_rows': ('rows_free', 'Rows in which none is.'),
  'slots_in_use': ('adapter_slots_in_use', 'Adapter slots that are being answered with.'),
}
_COUNTERS = {
  'prompt_tokens': ('prompt_tokens', 'Tokens read.'),
  'answer_tokens': ('generation_tokens', 'Tokens said.'),
  'loads': ('adapter_loads', 'Adapters written to a slot of the device.'),
}


class Metrics:
  """A registry of its own, so that several servers may live in one process."""

  def __init__(self, engine: Engine):
    """All counts are 0, but for the engine's."""
    self._registry = prometheus.CollectorRegistry()
    self._registry.register(_EngineCounts(engine))
    self._requests = prometheus.Counter(
      'lora_jax_http_requests',
      'Requests by path and status; 0: the client left.',
      ['path', 'status'],
      registry=self._registry,
    )
    self._answers = prometheus.Counter(
      'lora_jax_answers', 'Answers by how they ended.', ['finish'], registry=self._registry
    )
    self._first, self._whole = (
      prometheus.Histogram(f'lora_jax_{name}', text, buckets=_SECONDS, registry=self._registry)
      for name, text in (
        ('time_to_first_text_seconds', 'From a request to the first text of its answer.'),
        ('request_seconds', 'From a request to the end of its answer.'),
      )
    )

  def text(self) -> bytes:
    """All of them, as Prometheus reads it."""
    return prometheus.generate_latest(self._registry)

  def count_request(self, path: str, status: int) -> None:
    """A request was answered or refused."""
    self._requests.labels(path, status).inc()

  def count_answer(self, finish: Finish) -> None:
    """An answer ended."""
    self._answers.labels(finish).inc()

  def stopwatch(self) -> 'Stopwatch':
    """Times a request from now on."""
    return Stopwatch(self._first, self._whole)


class Stopwatch:
  """Times one request."""

  def __init__(self, first: prometheus.Histogram, whole: prometheus.Histogram):
    """Starts; the two are told of times."""
    self._first, self._whole = first, whole
    self._start = time.monotonic()
    self._began = False

  def began(self) -> None:
    """There is text; only the first time counts."""
    if not self._began:
      self._began = True
      self._first.observe(time.monotonic() - self._start)

  def ended(self) -> None:
    """The answer is whole."""
    self._whole.observe(time.monotonic() - self._start)


class Counted:
  """Counts the requests to an application by path and status."""

  def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]):
    """Stands before `app`; a path that is not among `paths` is counted as 'other'."""
    self._app, self._metrics, self._paths = app, metrics, paths

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """As ASGI has it."""
    if scope['type'] != 'http':
      return await self._app(scope, receive, send)
    status = 0

    async def noted(message: Message) -> None:
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
      await send(message)

    try:
      return await self._app(scope, receive, noted)
    except Exception:
      # Whoever stands before this says so.
      status = status or 500
      raise
    finally:
      path = scope['path'] if scope['path'] in self._paths else 'other'
      self._metrics.count_request(path, status)


class _EngineCounts(Collector):
  def __init__(self, engine: Engine):
    self._engine = engine

  def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
    counts = self._engine.counts
    for field, (name, text) in _GAUGES.items():
      yield GaugeMetricFamily(f'lora_jax_{name}', text, getattr(counts, field))
    for field, (name, text) in _COUNTERS.items():
      yield CounterMetricFamily(f'lora_jax_{name}', text, getattr(counts, field))
    yield GaugeMetricFamily(
      'lora_jax_adapters_listed', 'Adapters that may be asked for.', len(self._engine.library.names)
    )
    yield GaugeMetricFamily(
      'lora_jax_adapters_host_bytes', 'Of adapters in host memory.', self._engine.library.nbytes
    )

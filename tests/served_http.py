"""A server over the small base of `served`, in this process: real sockets, real clients."""

import contextlib
import dataclasses
import shutil
import socket
import threading
import time

import openai
import prometheus_client.parser
import served
import uvicorn
from served import MODEL, TOKENIZER

from lora_jax.hub.peft_tensors import WEIGHTS
from lora_jax.serve.config import ServeConfig
from lora_jax.serve.engine import Engine
from lora_jax.serve.http.app import build
from lora_jax.serve.http.gate import Limits
from lora_jax.serve.runner import Runner

CONFIG = ServeConfig(rows=4, length=192, shortest=192, slots=2, rank=8, host_bytes=100_000)
BASE, KEY = 'small', 'secret'
NAMES = ['o_proj', 'all', 'rslora']
# They lie there, but are on no list until they are loaded; the last has no end.
SPARE, CORRUPT = 'fused', 'corrupt'


def engine(root):
  served.write(root, [*NAMES, SPARE])
  shutil.copytree(root / SPARE, root / CORRUPT)
  weights = root / CORRUPT / WEIGHTS
  weights.write_bytes(weights.read_bytes()[:-100])
  held = Engine(MODEL, served.params(), TOKENIZER, CONFIG, root)
  for name in (SPARE, CORRUPT):
    held.unload(name)
  held.warm_up()
  return held


def is_free(engine):
  """Whether nothing is answered, nor any adapter in use."""
  at = (engine.busy, engine.counts.free_rows, engine.counts.slots_in_use)
  return at == (False, engine.config.rows, 0)


@dataclasses.dataclass
class Served:
  """A server that runs.

  Attributes:
    engine: behind it.
    port: of this machine.
    server: uvicorn's.
  """

  engine: Engine
  port: int
  server: uvicorn.Server

  @property
  def url(self):
    return f'http://127.0.0.1:{self.port}'

  def client(self, kind=openai.OpenAI, **more):
    return kind(base_url=f'{self.url}/v1', api_key=KEY, max_retries=0, timeout=60, **more)

  def is_free(self):
    """Whether, within seconds, nobody waits or sits, and no slot is in use."""
    end = time.monotonic() + 20
    while not is_free(self.engine) and time.monotonic() < end:
      time.sleep(0.01)
    return is_free(self.engine)


@contextlib.contextmanager
def running(engine, tokenizer=TOKENIZER, **limits):
  """Serves an engine until the end of the block, and then drains."""
  with Runner(engine) as runner, socket.create_server(('127.0.0.1', 0)) as sock:
    app = build(runner, engine, tokenizer, BASE, Limits(keys=(KEY,), **limits))
    settings = uvicorn.Config(app, http='h11', ws='none', log_level='critical', access_log=False)
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    try:
      yield Served(engine, sock.getsockname()[1], server)
    finally:
      server.should_exit = True
      thread.join()


def measured(text):
  """Name and labels -> value, of what Prometheus would read."""
  families = prometheus_client.parser.text_string_to_metric_families(text)
  return {
    (sample.name, *sample.labels.values()): sample.value
    for family in families
    for sample in family.samples
  }

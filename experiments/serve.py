"""Serves a base and adapters over it to clients of OpenAI's interface.

  python -m experiments.serve --base=smollm2-135m-instruct --adapters=DIR
  curl localhost:8000/v1/models

DIR holds a directory in PEFT's format for each adapter, by whose name requests ask for it
(`model`). Ctrl-C or SIGTERM: no more is taken, and what was asked is answered before it ends.
"""

import importlib.util
import os
import signal
import socket
import sys
from pathlib import Path

from absl import flags

from experiments import _flags, _launcher
from lora_jax.errors import UserError
from lora_jax.presets import Settings

_PACKAGES = ('prometheus_client', 'pydantic', 'starlette', 'uvicorn')
_KEYS_VARIABLE = 'LORA_JAX_API_KEYS'

_ADAPTERS = flags.DEFINE_string('adapters', None, 'Directory of adapters; none: the base alone.')
_HOST = flags.DEFINE_string('host', '127.0.0.1', 'Address to listen on; 0.0.0.0: all.')
_PORT = flags.DEFINE_integer('port', 8000, '0: one that is free.', 0, 65535)
_ROWS = flags.DEFINE_integer('rows', 16, 'Requests that are answered at the same time.')
_LENGTH = flags.DEFINE_integer('max_length', 1024, 'Tokens of a prompt and its answer together.')
_SLOTS = flags.DEFINE_integer('slots', 16, 'Adapters on the device.')
_RANK = flags.DEFINE_integer('max_rank', 16, 'The largest of an adapter.')
_TARGETS = flags.DEFINE_string('targets', 'all', 'Modules that an adapter may adapt.')
_DORA = flags.DEFINE_bool('dora', False, 'Take adapters with magnitudes.')
_HOST_MB = flags.DEFINE_integer('host_mb', 1024, 'Of adapters in host memory, for a slot.', 0)
_API_KEY = flags.DEFINE_multi_string(
  'api_key', [], f'One that requests may come with; repeat for more. Also: {_KEYS_VARIABLE}=A,B.'
)
_API_KEY_FILE = flags.DEFINE_string('api_key_file', None, 'Of more keys, one a line.')
_BODY = flags.DEFINE_integer('max_body', 2**20, 'Bytes of a request.')
_QUEUE = flags.DEFINE_integer('max_queue', 256, 'Answers that wait for a row; then 503.')
_RATE = flags.DEFINE_integer('rate', 0, 'Requests a minute of a key or address; 0: any number.')
_DRAIN = flags.DEFINE_integer('drain_seconds', 60, 'How long the end waits for answers.', 0)
_flags.define_base(Settings().base)


def main() -> None:
  """Checks everything that can be checked, then serves until a signal."""
  if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
    raise UserError(f'serving needs {", ".join(missing)}: pip install -e .[serve]')
  if _ADAPTERS.value is not None and not Path(_ADAPTERS.value).expanduser().is_dir():
    raise UserError(f'--adapters={_ADAPTERS.value}: no such directory; give one of adapters')
  # They take seconds to import, and a mistake above should not.
  import uvicorn

  from lora_jax.hub import bases
  from lora_jax.serve.config import ServeConfig
  from lora_jax.serve.engine import Engine
  from lora_jax.serve.http.app import build
  from lora_jax.serve.http.gate import Limits
  from lora_jax.serve.runner import Runner

  _launcher.imported()
  limits = Limits(_keys(), _BODY.value, _RATE.value, _QUEUE.value)
  config = ServeConfig(
    rows=_ROWS.value,
    length=_LENGTH.value,
    slots=_SLOTS.value,
    rank=_RANK.value,
    targets=_TARGETS.value,
    dora=_DORA.value,
    host_bytes=_HOST_MB.value * 2**20,
  )
  settings = _flags.changed(Settings())
  bases.check_name(settings.base)
  _flags.check_targets([config.targets])
  with _bound() as sock:
    base = _flags.load_base(settings.base)
    if config.length > base.config.max_length:
      raise UserError(
        f'--max_length={config.length}: the base has {base.config.max_length} tokens at most'
      )
    model, params = _flags.put_on_device(base, settings.train)
    adapters = None if _ADAPTERS.value is None else Path(_ADAPTERS.value).expanduser()
    engine = Engine(model, params, base.tokenizer, config, adapters, base.images)
    if engine.library.left_out:
      print(
        f'left out of --adapters, since they are links to what lies elsewhere: '
        f'{", ".join(engine.library.left_out)}; copy them there',
        file=sys.stderr,
      )
    engine.warm_up()
    with Runner(engine) as runner:
      app = build(runner, engine, base.tokenizer, base.name, limits)
      server = uvicorn.Server(
        uvicorn.Config(
          app,
          http='h11',
          ws='none',
          log_level='warning',
          access_log=False,
          timeout_graceful_shutdown=_DRAIN.value,
        )
      )
      # It raises a signal again for whoever had it before, when all is done: it is its own.
      for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, server.handle_exit)
      sock.listen()
      host, port, *_ = sock.getsockname()
      print(
        f'serving {base.name} and {len(engine.library.names)} adapters at '
        f'http://{f"[{host}]" if ":" in host else host}:{port}'
        f'{"" if limits.keys else ", to anyone who asks: there is no --api_key"}',
        file=sys.stderr,
        flush=True,
      )
      server.run([sock])


def _keys() -> tuple[str, ...]:
  """All API keys, wherever they were given."""
  keys = [*_API_KEY.value, *filter(None, os.environ.get(_KEYS_VARIABLE, '').split(','))]
  if _API_KEY_FILE.value is not None:
    lines = Path(_API_KEY_FILE.value).expanduser().read_text(encoding='utf-8').splitlines()
    found = [*filter(None, map(str.strip, lines))]
    if not found:
      raise UserError(f'--api_key_file={_API_KEY_FILE.value}: holds no key; give one a line')
    keys += found
  return tuple(keys)


def _bound() -> socket.socket:
  """A socket that has the address, so that one that is taken shows before a base is loaded."""
  address = f'--host={_HOST.value} --port={_PORT.value}'
  try:
    found = socket.getaddrinfo(_HOST.value, _PORT.value, type=socket.SOCK_STREAM)
    family, kind, protocol, _, at = found[0]
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(at)
  except OSError as error:
    raise UserError(f'{address}: {error}; give another') from error
  return sock


if __name__ == '__main__':
  _launcher.run(main)

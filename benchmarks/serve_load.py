"""Many clients at once on one server, some of whom leave in the middle of their answer.

  python -m benchmarks.serve_load                             200 clients, half of whom leave
  python -m benchmarks.serve_load --base=smollm2-135m-instruct --rows=8 --clients=32

It starts `experiments.serve` with random adapters over a base. A client asks for a stream
from the base or one of the adapters, as its turn has it; one that leaves closes its
connection after its first text. While they ask, others send what is none of a request. In the
end no row and no slot may be in use, and the server ends in order when it is told to.
"""

import asyncio
import collections
import contextlib
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import jax
import numpy as np
import prometheus_client.parser
from absl import app, flags, logging

from launch import local
from lora_jax import lora
from lora_jax.errors import UserError, exit_on_user_error
from lora_jax.hub import bases, peft

_RANK = 4
# Each is sent once for every forty clients: path, body or its size, and the status it must have.
_ABUSE: Sequence[tuple[str, bytes | int, int]] = (
  ('/v1/completions', b'{"model": ', 400),
  ('/v1/completions', b'{"model": "nobody", "prompt": "x"}', 404),
  ('/v1/completions', b'{"model": "adapter-0", "prompt": "' + b'x' * 500_000 + b'"}', 400),
  ('/v1/completions', 100_000_000, 413),
  ('/v1/load_lora_adapter', b'{"lora_name": "x", "lora_path": "../../etc/passwd"}', 400),
  ('/v1/load_lora_adapter', b'{"lora_name": "x", "lora_path": "corrupt"}', 400),
)


def write_adapters(root: Path, params: Any, count: int) -> list[str]:
  """Random adapters on `o_proj` and `fc2`, and one that is damaged; the names of the former."""
  names = [f'adapter-{i}' for i in range(count)]
  paths = lora.resolve('o_proj,fc2', params)
  for i, name in enumerate(names):
    rng = np.random.default_rng(i)
    fresh = lora.init(jax.random.key(i), params, paths, _RANK)
    noise = lambda leaf, rng=rng: 0.02 * rng.standard_normal(leaf.shape).astype(np.float32)
    peft.save(root / name, peft.uniform(jax.tree.map(noise, fresh), _RANK, 2.0 * _RANK))
  return names


@contextlib.contextmanager
def server(base: str, adapters: Path, rows: int, slots: int) -> Iterator[str]:
  """A server in a process of its own: its address. It has to end in order."""
  command = [
    sys.executable, '-m', 'experiments.serve', f'--base={base}', f'--adapters={adapters}',
    '--port=0', f'--rows={rows}', f'--slots={slots}', f'--max_rank={_RANK}', '--max_length=512',
    '--max_queue=1000',
  ]  # fmt: skip
  with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=local.ROOT) as process:
    stderr = process.stderr
    assert stderr is not None
    try:
      said, url = '', None
      while url is None and (line := stderr.readline()):
        said += line
        found = re.search(r' at (http://[^\s,]+)', line)
        url = found and found[1]
      if url is None:
        raise UserError(f'the server did not start: {said.strip()}')
      yield url
      process.send_signal(signal.SIGTERM)
      if process.wait(60):
        raise UserError(f'the server ended with {process.returncode}: {stderr.read()}')
    finally:
      process.kill()


async def ask(
  client: httpx2.AsyncClient, body: dict[str, Any], leaves: bool
) -> tuple[int | str, float, float]:
  """Asks for a stream: its status, or what went wrong; seconds to its first text and its end."""
  start = time.perf_counter()
  try:
    async with client.stream('POST', '/v1/completions', json=body) as response:
      lines = (line async for line in response.aiter_lines() if line.startswith('data: '))
      await anext(lines, '')
      first = time.perf_counter() - start
      if leaves:
        return 'left', first, first
      last = ''
      async for line in lines:
        last = line
      status = response.status_code if last == 'data: [DONE]' else f'{response.status_code}, cut'
      return status, first, time.perf_counter() - start
  except httpx2.HTTPError as error:
    return type(error).__name__, 0.0, 0.0


async def abuse(client: httpx2.AsyncClient, path: str, body: bytes | int, status: int) -> str:
  """Sends what is no request, and says what came of it."""

  async def endless(size: int) -> AsyncIterator[bytes]:
    for _ in range(0, size, 2**16):
      yield b'x' * 2**16

  content = endless(body) if isinstance(body, int) else body
  try:
    held = await client.post(path, content=content, headers={'Content-Type': 'application/json'})
  except httpx2.HTTPError as error:
    return f'abuse: {type(error).__name__} for {status}'
  return f'abuse: {held.status_code}' + ('' if held.status_code == status else f' for {status}')


async def load(url: str, models: Sequence[str], clients: int, leaving: float, tokens: int) -> dict:
  """Lets all ask at once: a record of what came of it."""
  limits = httpx2.Limits(max_connections=None)
  async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
    rng = np.random.default_rng(0)
    leaves = rng.permutation(clients) < round(leaving * clients)
    bodies = [
      {
        'model': models[i % len(models)],
        'prompt': rng.integers(4, 200, rng.integers(4, 60)).tolist(),
        'max_tokens': tokens,
        'temperature': float(i % 2),
        'seed': i,
        'stream': True,
      }
      for i in range(clients)
    ]
    start = time.perf_counter()
    asking = [ask(client, body, bool(left)) for body, left in zip(bodies, leaves, strict=True)]
    sending = [abuse(client, *case) for case in _ABUSE for _ in range(-(-clients // 40))]
    both = await asyncio.gather(asyncio.gather(*asking), asyncio.gather(*sending))
    answers, abused = both
    seconds = time.perf_counter() - start
    # Those who left last may still have to be noticed.
    await asyncio.sleep(1)
    text = (await client.get('/metrics')).text
  at = {
    '/'.join([sample.name.removeprefix('lora_jax_'), *sample.labels.values()]): sample.value
    for family in prometheus_client.parser.text_string_to_metric_families(text)
    for sample in family.samples
  }
  whole = [(first, end) for status, first, end in answers if status == 200]
  return {
    'clients': clients,
    'seconds': seconds,
    'statuses': collections.Counter(str(status) for status, *_ in answers),
    'abuse': collections.Counter(abused),
    'first_text_seconds': _spread([first for first, _ in whole]),
    'answer_seconds': _spread([end for _, end in whole]),
    'tokens': at['generation_tokens_total'],
    'still': {
      name: at[name] for name in ('requests_waiting', 'requests_running', 'adapter_slots_in_use')
    },
  }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
  if len(seconds) < 2:
    return {}
  cuts = statistics.quantiles(seconds, n=20)
  return {'median': statistics.median(seconds), 'p95': cuts[-1], 'most': max(seconds)}


_BASE = flags.DEFINE_string('base', 'tiny', 'As for every command.')
_ADAPTERS = flags.DEFINE_integer('adapters', 32, 'How many there are.')
_ROWS = flags.DEFINE_integer('rows', 16, 'Of the server.')
_SLOTS = flags.DEFINE_integer('slots', 8, 'Of the server.')
_CLIENTS = flags.DEFINE_integer('clients', 200, 'How many ask at once.')
_LEAVING = flags.DEFINE_float('leaving', 0.5, 'The share that leaves midway.')
_TOKENS = flags.DEFINE_integer('tokens', 64, 'Of an answer, at most.')


def main(argv: Sequence[str]) -> None:
  """Starts a server, asks it, and prints the record as JSON."""
  del argv
  # Every request would be a line.
  logging.set_verbosity(logging.WARNING)
  with exit_on_user_error(), tempfile.TemporaryDirectory() as folder:
    root, params = Path(folder), bases.load(_BASE.value).params
    names = write_adapters(root, params, _ADAPTERS.value)
    corrupt = root / 'corrupt'
    corrupt.mkdir()
    (corrupt / 'adapter_config.json').write_text('{"peft_type": "LORA"')
    del params
    with server(_BASE.value, root, _ROWS.value, _SLOTS.value) as url:
      models = [_BASE.value, *names]
      record = asyncio.run(load(url, models, _CLIENTS.value, _LEAVING.value, _TOKENS.value))
    print(json.dumps(record, indent=2))
    if any(record['still'].values()):
      raise UserError('rows or slots are still in use, and nobody asks any more')


if __name__ == '__main__':
  app.run(main)

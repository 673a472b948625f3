"""`experiments.serve` as it is started and stopped."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import numpy as np
import openai
import pytest

from lora_jax.hub import peft

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, '-m', 'experiments.serve']


def refused(*arguments, command=COMMAND):
  held = subprocess.run(
    [*command, *arguments], capture_output=True, text=True, cwd=ROOT, check=False, timeout=120
  )
  assert held.returncode == 2, held.stderr
  (line,) = held.stderr.splitlines()
  return line


def test_a_package_that_is_missing_is_named():
  script = (
    'import runpy, sys; sys.modules["uvicorn"] = None; '
    'runpy.run_module("experiments.serve", run_name="__main__")'
  )
  line = refused(command=[sys.executable, '-c', script])
  assert line == 'error: serving needs uvicorn: pip install -e .[serve]'


def test_mistakes_are_told_before_a_base_is_loaded(tmp_path):
  assert 'flag --port=65536' in refused('--port=65536')
  assert 'no such directory' in refused(f'--adapters={tmp_path / "nowhere"}')
  with socket.create_server(('127.0.0.1', 0)) as taken:
    port = taken.getsockname()[1]
    assert f'--port={port}' in refused('--base=tiny', f'--port={port}')


@pytest.mark.slow
def test_a_server_is_started_used_and_drained(tmp_path):
  leaves = {'a': np.full((2, 64, 4), 0.1, np.float32), 'b': np.full((2, 4, 32), 0.1, np.float32)}
  tree = {'layers': {'mlp': {'down_proj': leaves}}}
  peft.save(tmp_path / 'adapters' / 'mine', peft.uniform(tree, rank=4, alpha=8.0))
  (tmp_path / 'keys').write_text('first\nsecond\n')
  command = [
    *COMMAND, '--base=tiny', f'--cache={tmp_path / "cache"}', '--port=0', '--rows=2',
    '--slots=1', '--max_length=256', f'--adapters={tmp_path / "adapters"}',
    f'--api_key_file={tmp_path / "keys"}',
  ]  # fmt: skip
  env = os.environ | {'LORA_JAX_API_KEYS': 'third'}
  with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env) as process:
    try:
      said = ''
      while not (found := re.search(r'serving tiny and 1 adapters at (http:\S+)', said)):
        line = process.stderr.readline()
        assert line, said
        said += line
      url = found[1]
      assert httpx2.get(f'{url}/health').status_code == 200
      assert httpx2.get(f'{url}/v1/models').status_code == 401
      with openai.OpenAI(base_url=f'{url}/v1', api_key='third', max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ['tiny', 'mine']
        ask = {'model': 'mine', 'prompt': [5, 6], 'max_tokens': 250, 'temperature': 0}
        stream = iter(client.completions.create(**ask, stream=True))
        chunks = [next(stream)]
        process.send_signal(signal.SIGTERM)
        chunks += stream
        assert chunks[-1].choices[0].finish_reason in ('length', 'stop')
      assert process.wait(60) == 0
      assert 'Traceback' not in process.stderr.read()
    finally:
      process.kill()
  with pytest.raises(httpx2.ConnectError):
    httpx2.get(f'{url}/health')

"""What the server answers is what the same base and adapter say without one, however stored."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
import served
import served_http
import tiny_model
from served import KINDS, MODEL, NEW, TOKENIZER
from served_http import BASE

from lora_jax import chat, lora_family, quantize
from lora_jax.config import QUANTIZE, LoraConfig
from lora_jax.generate import generate
from lora_jax.hub import adapters, bases, peft
from lora_jax.serve.config import ServeConfig
from lora_jax.serve.engine import Engine
from lora_jax.targets import resolve
from lora_jax.transformer import Transformer

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ServeConfig(rows=3, length=64, shortest=64, slots=2, rank=8, dora=True)
LENGTHS = (5, 12)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  return served.write(tmp_path_factory.mktemp('adapters'), KINDS)


def alone(params, root, name, asked):
  """The greedy answer to a prompt as `chat` and `evaluate` have it, and how clear it is."""
  if name:
    params = adapters.attach(params, peft.load(root / name, params))
  length = len(asked)
  tokens_1T = np.zeros((1, max(LENGTHS)), np.int32)
  tokens_1T[0, :length] = asked
  ids = np.asarray(generate(MODEL, params, tokens_1T, np.asarray([length]), NEW, -1))[0]
  whole_1T = np.zeros((1, max(LENGTHS) + NEW), np.int32)
  whole_1T[0, : length + NEW] = [*asked, *ids]
  logits_TV = np.asarray(tiny_model.logits(MODEL, params, jnp.asarray(whole_1T)))[0]
  top_T2 = np.sort(logits_TV, axis=-1)[length - 1 : length + NEW - 1, -2:]
  return ids.tolist(), float((top_T2[:, 1] - top_T2[:, 0]).min())


@pytest.mark.parametrize('stored', QUANTIZE)
def test_adapters_of_every_kind_on_a_base_however_stored(root, stored):
  params = quantize.store(served.params(), jnp.float32, stored)
  engine = Engine(MODEL, params, TOKENIZER, CONFIG, root)
  asked_of, clear, different = 0, 0, set()
  with served_http.running(engine) as server, server.client() as client:
    # Each is a program of its own without a server, and those of quantised kernels take long.
    for name in ('', *(KINDS if stored == 'none' else ('dora', 'pissa', 'fused'))):
      for length in LENGTHS:
        asked = served.prompt(length)
        ids, margin = alone(params, root, name, asked)
        held = client.completions.create(
          model=name or BASE, prompt=[*asked], max_tokens=NEW, temperature=0
        )
        asked_of += 1
        if margin > 1e-3:
          assert held.choices[0].text == TOKENIZER.decode(ids), name
          clear += 1
          different.add(held.choices[0].text)
  assert clear > 0.7 * asked_of
  assert len(different) > 0.8 * clear


@pytest.mark.slow
def test_the_command_says_what_a_chat_without_a_server_says(tmp_path):
  base = bases.load('tiny')
  params = quantize.store(base.params, jnp.float32, 'int8')
  configs = {
    'plain': ('o_proj,fc2', {}),
    'dora': ('all', {'dora': True}),
    'pissa': ('qkv', {'init': 'pissa'}),
    'fused': ('qkv_proj,gate_up_proj', {}),
  }
  rng = np.random.default_rng(0)
  for name, (targets, more) in configs.items():
    config = LoraConfig(rank=4, alpha=8.0, **more)
    paths = resolve(targets, base.params)
    fresh = lora_family.init(jax.random.key(0), base.params, paths, config)
    moved = jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), fresh)
    peft.save(tmp_path / 'adapters' / name, peft.of(moved, config))
  command = [
    *(sys.executable, '-m', 'experiments.serve', '--base=tiny', '--quantize=int8', '--dora'),
    *('--dtype=float32', '--port=0', '--rows=2', '--slots=2', '--max_length=256', '--max_rank=8'),
    f'--cache={tmp_path / "cache"}', f'--adapters={tmp_path / "adapters"}',
  ]  # fmt: skip
  with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
    try:
      said = ''
      while not (found := re.search(r'serving tiny and 4 adapters at (http:[^\s,]+)', said)):
        line = process.stderr.readline()
        assert line, said
        said += line
      texts = []
      with openai.OpenAI(base_url=f'{found[1]}/v1', api_key='any', max_retries=0) as client:
        answerer = chat.Answerer(Transformer(base.config), base.tokenizer, 256, 12)
        for name in ('tiny', *configs):
          held = params
          if name != 'tiny':
            held = adapters.attach(params, adapters.load(tmp_path / 'adapters' / name, base))
          alone = ''.join(chat.Chat(answerer).ask('Which organ?', answerer.voice(held)))
          turns = [{'role': 'user', 'content': 'Which organ?'}]
          ask = {'model': name, 'messages': turns, 'max_tokens': 12, 'temperature': 0}
          texts.append(client.chat.completions.create(**ask).choices[0].message.content)
          assert texts[-1] == alone, name
      assert len({*texts}) == len(texts)
      process.send_signal(signal.SIGTERM)
      assert process.wait(60) == 0
    finally:
      process.kill()

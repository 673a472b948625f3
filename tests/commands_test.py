"""train -> evaluate -> merge -> chat -> export on the tiny base, as a user runs them."""

import dataclasses
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.hub import adapters, bases, huggingface, peft, tokenizer_hf
from lora_jax.transformer import Transformer

ROOT = Path(__file__).resolve().parent.parent


def command(name, *arguments):
  return [sys.executable, '-m', f'experiments.{name}', *map(str, arguments)]


def run(name, *arguments, **options):
  return subprocess.run(
    command(name, *arguments), capture_output=True, text=True, cwd=ROOT, check=False,
    timeout=300, **options,
  )  # fmt: skip


def done(name, *arguments, **options):
  held = run(name, *arguments, **options)
  assert held.returncode == 0, held.stderr
  return held


def write_rows(path, count=40):
  rows = []
  for i in range(count):
    turns = [('user', f'{i} and 1?'), ('assistant', str(i + 1))]
    if i % 2:
      turns += [('user', 'and 1 more?'), ('assistant', str(i + 2))]
    rows.append({'messages': [{'role': role, 'content': text} for role, text in turns]})
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """A directory with rows, and flags that keep downloads and compiled programs in it."""
  path = tmp_path_factory.mktemp('commands')
  write_rows(path / 'my.jsonl')
  return path, ('--base=tiny', f'--cache={path / "cache"}')


@pytest.fixture(scope='module')
def trained(place):
  path, common = place
  held = done(
    'train', *common, f'--data={path / "my.jsonl"}', f'--out={path / "run"}', '--rank=4',
    '--lr=1e-2', '--steps=6', '--eval_every=2', '--tokens_per_batch=512', '--eval_share=0.25',
  )  # fmt: skip
  return path / 'run', held


def test_training_leaves_the_best_adapter_and_its_record(trained):
  out, held = trained
  record = json.loads((out / 'run.json').read_text())
  entries = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
  losses = {entry['step']: entry['eval_loss'] for entry in entries if 'eval_loss' in entry}
  assert [*losses] == [0, 2, 4, 6]
  assert record['status'] == 'finished'
  best = record['train']['kept_step']
  assert losses[best] == min(losses[step] for step in (2, 4, 6))
  assert losses[best] < losses[0]
  assert f'step {best} is kept: the best, validation loss {losses[best]:.4f}' in held.stdout
  assert held.stdout.splitlines()[-1] == f'adapter: {out / "adapter"}'
  assert record['rows']['train'] + record['rows']['eval'] == 40
  assert record['job']['train']['steps'] == 6
  assert record['base']['sha256'] == bases.load('tiny').record['sha256']
  assert record['versions']['jax']
  assert {file.name for file in out.iterdir()} == {'.lock', 'adapter', 'metrics.jsonl', 'run.json'}


def test_the_same_seed_trains_the_same(trained, place):
  out, _ = trained
  path, common = place
  done(
    'train', *common, f'--data={path / "my.jsonl"}', f'--out={path / "again"}', '--rank=4',
    '--lr=1e-2', '--steps=6', '--eval_every=2', '--tokens_per_batch=512', '--eval_share=0.25',
  )  # fmt: skip
  name = 'adapter_model.safetensors'
  assert (path / 'again/adapter' / name).read_bytes() == (out / 'adapter' / name).read_bytes()


def test_evaluation_pairs_base_and_adapter(trained, place):
  out, _ = trained
  path, common = place
  held = done(
    'evaluate', *common, f'--data={path / "my.jsonl"}', f'--adapter={out}', '--metric=exact_match',
    '--max_new_tokens=4', f'--out={path / "scores"}',
  )  # fmt: skip
  record = json.loads((path / 'scores/scores.json').read_text())
  said = [json.loads(line) for line in (path / 'scores/predictions.jsonl').read_text().splitlines()]
  assert len(said) == record['rows']['scored'] == 40
  scores = {line['name']: line for line in record['scores']}
  tokens = sum(row['base']['tokens'] for row in said)
  # Two digits at most and the end of each turn.
  assert tokens == sum(len(row['answer']) + 1 for row in said) + sum(
    len(str(i + 1)) + 1 for i in range(1, 40, 2)
  )
  for side in ('base', 'adapter'):
    mean = sum(row[side]['loss'] for row in said) / tokens
    assert scores['loss'][side][0] == pytest.approx(mean, rel=1e-6)
  difference, error = scores['loss']['difference']
  assert difference == pytest.approx(scores['loss']['adapter'][0] - scores['loss']['base'][0])
  assert difference < -5 * error
  assert 'loss, nats a token' in held.stdout
  assert f'{difference:+.3f} ± {error:.3f}' in held.stdout


def test_a_choice_is_scored_by_likelihood_without_an_adapter(place):
  path, common = place
  rows = [{'prompt': f'{i}: A or B?', 'completion': 'AB'[i % 2], 'id': f'q{i}'} for i in range(6)]
  (path / 'choice.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  held = done(
    'evaluate', *common, f'--data={path / "choice.jsonl"}', '--metric=choice', '--choices=A,B',
    f'--out={path / "choices"}',
  )  # fmt: skip
  lines = (path / 'choices/predictions.jsonl').read_text().splitlines()
  said = [json.loads(line) for line in lines]
  assert [row['id'] for row in said] == [f'q{i}' for i in range(6)]
  assert {row['base']['prediction'] for row in said} <= {'A', 'B'}
  right = [row['base']['prediction'] == row['answer'] for row in said]
  assert [row['base']['accuracy'] for row in said] == right
  assert 'adapter' not in held.stdout


@pytest.fixture(scope='module')
def merged(trained, place):
  out, _ = trained
  path, common = place
  held = done('merge', *common, f'--adapter={out}', '--dtype=float32', f'--out={path / "merged"}')
  return path / 'merged', held


def logits_of(config, params, tokens_BT):
  model = Transformer(config)
  hidden_BTD, _ = model.apply({'params': params}, tokens_BT)
  return np.asarray(model.apply({'params': params}, hidden_BTD, method='head'))


CHAT = [{'role': 'user', 'content': 'naïve 12  and <b>?'}]


def test_a_merged_checkpoint_is_the_adapter_on_its_base(trained, merged):
  out, held = merged
  base = bases.load('tiny')
  config = huggingface.model_config(out)
  tokens_BT = jnp.asarray([base.tokenizer.encode_chat(CHAT)])
  whole = logits_of(config, huggingface.load_params(out, config), tokens_BT)
  adapter = adapters.load(trained[0], base)
  unmerged = logits_of(base.config, adapters.attach(base.params, adapter), tokens_BT)
  np.testing.assert_allclose(whole, unmerged, atol=1e-5)
  assert np.abs(whole - logits_of(base.config, base.params, tokens_BT)).max() > 1e-2
  copied = tokenizer_hf.from_directory(out, config.vocab_size)
  assert copied.encode_chat(CHAT) == base.tokenizer.encode_chat(CHAT)
  assert (copied.eos_id, copied.pad_id) == (base.tokenizer.eos_id, base.tokenizer.pad_id)
  assert 'by the cast to float32     0' in held.stdout


def test_transformers_loads_a_merged_checkpoint(merged):
  torch = pytest.importorskip('torch', reason='the references install on Python 3.11')
  transformers = pytest.importorskip('transformers')
  out, _ = merged
  base = bases.load('tiny')
  theirs = transformers.AutoTokenizer.from_pretrained(out)
  ids = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)['input_ids']
  assert ids == base.tokenizer.encode_chat(CHAT)
  assert theirs.eos_token_id == base.tokenizer.eos_id
  model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype='float32').eval()
  assert model.generation_config.eos_token_id == base.tokenizer.eos_id
  with torch.no_grad():
    logits_BTV = model(torch.tensor([ids])).logits.numpy()
  config = huggingface.model_config(out)
  ours = logits_of(config, huggingface.load_params(out, config), jnp.asarray([ids]))
  np.testing.assert_allclose(ours, logits_BTV, atol=1e-4)


def test_a_cast_says_what_it_costs(trained, place):
  path, common = place
  held = done('merge', *common, f'--adapter={trained[0]}', f'--out={path / "small"}')
  (line,) = [line for line in held.stdout.splitlines() if 'by the cast to bfloat16' in line]
  assert 1e-4 < float(line.split()[-1]) < 0.1
  config = huggingface.model_config(path / 'small')
  params = huggingface.load_params(path / 'small', config)
  assert params['layers']['mlp']['up_proj']['kernel'].dtype == jnp.bfloat16


def test_piped_turns_are_answered_and_switch(trained, place):
  _, common = place
  flags = (*common, f'--adapter={trained[0]}', '--max_new_tokens=6')
  held = done('chat', *flags, input='hi\n/base\n/reset\nhi\n/nope\n')
  assert len(held.stdout.splitlines()) >= 2
  assert '(the base answers from here on)' in held.stderr
  assert 'unknown command /nope' in held.stderr
  one = done('chat', *flags, '--prompt=hi')
  assert held.stdout.startswith(one.stdout)


def test_a_terminal_is_answered_until_ctrl_d(place):
  _, common = place
  ours, theirs = pty.openpty()
  process = subprocess.Popen(
    command('chat', *common, '--max_new_tokens=6'), cwd=ROOT, stdin=theirs, stdout=theirs,
    stderr=theirs, start_new_session=True,
  )  # fmt: skip
  os.close(theirs)
  said = b''

  def until(mark, start=0):
    nonlocal said
    deadline = time.monotonic() + 120
    while said.find(mark, start) < 0 and time.monotonic() < deadline:
      said += os.read(ours, 4096)
    return said.find(mark, start) + len(mark)

  ready = until(b'> ')
  os.write(ours, b'hi\n')
  answered = until(b'> ', ready)
  # The line is echoed, then answered.
  assert len(said[ready:answered].replace(b'hi', b'').strip()) > 2
  os.write(ours, b'\x04')
  assert process.wait(timeout=60) == 0
  os.close(ours)


def test_an_adapter_is_exported_anew_with_its_scale_baked_in(trained, place):
  path, common = place
  held = done(
    'export', *common, f'--adapter={trained[0]}', '--bake_scale', f'--out={path / "baked"}'
  )
  assert held.stdout.splitlines()[-1] == f'adapter: {path / "baked"}'
  base = bases.load('tiny')
  tokens_BT = jnp.asarray([base.tokenizer.encode_chat(CHAT)])
  baked, trained_one = (adapters.load(p, base) for p in (path / 'baked', trained[0]))
  assert all((scales == 1).all() for scales in baked.scales().values())
  one, other = (
    logits_of(base.config, adapters.attach(base.params, adapter), tokens_BT)
    for adapter in (baked, trained_one)
  )
  np.testing.assert_allclose(one, other, atol=1e-5)


def test_ctrl_c_keeps_the_best_so_far(place):
  path, common = place
  out = path / 'stopped'
  # A shell starts background jobs with interrupts ignored, and children inherit that.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  process = subprocess.Popen(
    command(
      'train', *common, f'--data={path / "my.jsonl"}', f'--out={out}', '--rank=4',
      '--steps=100000', '--eval_every=2', '--tokens_per_batch=512', '--eval_share=0.25',
    ),
    cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  signal.signal(signal.SIGINT, before)
  metrics = out / 'metrics.jsonl'
  deadline = time.monotonic() + 240
  while process.poll() is None and time.monotonic() < deadline:
    if metrics.exists() and metrics.read_text().count('eval_loss') > 3:
      break
    time.sleep(0.05)
  os.kill(process.pid, signal.SIGINT)
  stdout, stderr = process.communicate(timeout=120)
  assert process.returncode == 130, stderr
  assert 'Traceback' not in stderr
  assert 'stopping after this step' in stderr
  record = json.loads((out / 'run.json').read_text())
  assert record['status'] == 'interrupted'
  assert f'step {record["train"]["kept_step"]} is kept' in stdout
  watched = dict(map(tuple, record['train']['eval_losses']))
  assert watched[record['train']['kept_step']] == min(
    loss for step, loss in watched.items() if step
  )
  assert peft.load(out / 'adapter', bases.load('tiny').params).ranks


@pytest.mark.parametrize(
  ('name', 'arguments', 'says'),
  [
    ('train', [], '--data='),
    ('train', ['--data=nowhere.jsonl', '--out=x'], 'nowhere.jsonl is not there'),
    ('train', ['--data={bad}', '--out=x'], 'bad.jsonl:1: has'),
    ('train', ['--data={my}', '--out={place}/run', '--rank=4'], 'adapter is there already'),
    ('train', ['--data={my}', '--out=x', '--targets=banana'], "'banana'"),
    ('train', ['--data={my}', '--out=x', '--base=gpt'], "'gpt'"),
    ('train', ['--data={my}', '--out=x', '--epochs=0'], '--epochs=0.0'),
    ('train', ['--data={my}', '--out=x', '--eval_share=1'], '--eval_share=1.0'),
    ('train', ['--data={my}', '--out=x', '--patience=-1'], '--patience=-1'),
    ('train', ['--data={my}', '--out=x', '--track=mlflow'], "'mlflow'"),
    ('train', ['--data={my}', '--out=/dev/null/x', '--base=tiny'], '/dev/null/x'),
    ('evaluate', [], '--data='),
    ('evaluate', ['--data={my}', '--adapter=tests'], 'no adapter in tests'),
    ('evaluate', ['--data={my}', '--metric=choice'], 'my.jsonl:1: no choices'),
    ('evaluate', ['--data={my}', '--metric=bleu'], 'bleu'),
    ('evaluate', ['--data={my}', '--out={my}/x', '--base=gpt'], 'my.jsonl is no directory'),
    ('merge', ['--out=x'], '--adapter='),
    ('merge', ['--adapter=tests', '--out={place}'], 'is there already'),
    ('merge', ['--adapter=tests', '--out=/dev/null/x'], '/dev/null is no directory'),
    ('chat', ['--temperature=-1'], '--temperature=-1'),
    ('chat', ['--top_p=0'], '--top_p=0'),
    ('chat', ['--adapter=tests'], 'no adapter in tests'),
    ('export', ['--adapter={place}/run', '--out={place}'], 'is there already'),
  ],
)
def test_a_mistake_is_one_line_and_comes_first(trained, place, tmp_path, name, arguments, says):
  path, _ = place
  (path / 'bad.jsonl').write_text('{"text": "x"}\n')
  names = {'my': path / 'my.jsonl', 'bad': path / 'bad.jsonl', 'place': path}
  given = [argument.format(**names) for argument in arguments]
  held = run(name, *given, f'--cache={tmp_path / "cache"}')
  assert held.returncode == 2, held.stderr
  assert len([line for line in held.stderr.splitlines() if line.startswith('error: ')]) == 1
  assert says in held.stderr
  assert 'Traceback' not in held.stderr


@pytest.mark.parametrize(('method', 'rank'), [('sum', 8), ('svd', 3), ('ties', 3), ('dare', 3)])
def test_adapters_add_up_to_one_that_every_command_reads(trained, place, method, rank):
  out, _ = trained
  path, common = place
  both = path / f'both-{method}'
  done(
    'combine', *common, f'--adapter={out}:0.25', f'--adapter={out}:0.75', f'--method={method}',
    '--rank=3', '--density=1', f'--out={both}',
  )  # fmt: skip
  base = bases.load('tiny')
  one, summed = adapters.load(out, base), adapters.load(both, base)
  assert {held for ranks in summed.ranks.values() for held in ranks} == {rank}
  tokens = jnp.arange(24)[None] % base.config.vocab_size
  hidden = lambda adapter: Transformer(base.config).apply(
    {'params': adapters.attach(base.params, adapter)}, tokens
  )[0]
  if method == 'sum':
    np.testing.assert_allclose(hidden(summed), hidden(one), atol=1e-4)
  assert np.abs(hidden(summed) - hidden(dataclasses.replace(one, alphas=_none(one)))).max() > 1e-3


def _none(adapter):
  return {path: (0.0,) * len(alphas) for path, alphas in adapter.alphas.items()}


@pytest.mark.parametrize(
  ('flag', 'says'),
  [
    ('--adapter=here', 'give DIRECTORY:WEIGHT'),
    ('--adapter=here:x', 'give DIRECTORY:WEIGHT'),
    ('--adapter=nowhere:1', 'no adapter in nowhere'),
    ('--density=0', 'give a share above 0'),
  ],
)
def test_what_cannot_be_added_up_is_one_line(place, flag, says):
  path, common = place
  flags = ['--adapter=nowhere:1', flag] if flag.startswith('--density') else [flag]
  held = run('combine', *common, *flags, f'--out={path / "never"}')
  assert held.returncode == 2
  assert says in held.stderr
  assert len(held.stderr.strip().splitlines()) == 1

"""Benchmarks run to their end on a tiny base, and both sides do the same work.

Speed is not tested: what is compiled here is not optimised, and the base is a toy.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, grid, peer, serve, train
from lora_jax.hub import tiny

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  """Sides compile as tests do, and PEFT's side is the Python that runs them."""
  monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
  monkeypatch.setattr(peer, 'python', lambda: Path(sys.executable))


def test_a_shape_of_random_weights_is_trained_and_measured():
  options = gpu.Options(
    'tiny',
    None,
    'o_proj,fc2',
    4,
    steps=1,
    train_rows=1,
    test_rows=1,
    large=(2, 16),
    dtype='float32',
  )
  (runs,) = gpu.large(options, tiny.CONFIG, sys.executable).values()
  (run,) = runs.values()
  assert run['real_tokens'] == 2 * 16
  assert len(run['losses']) == train.WARMUP + 1
  assert 0 < run['of_peak'] < 1
  assert run['programs'] > 0
  # qkv and the rest stay frozen: A and B of o_proj and down_proj alone.
  heads = tiny.CONFIG.num_heads * tiny.CONFIG.head_dim
  sizes = heads + tiny.CONFIG.model_dim + tiny.CONFIG.mlp_dim + tiny.CONFIG.model_dim
  assert run['trainable_parameters'] == 4 * tiny.CONFIG.num_layers * sizes


@pytest.mark.slow
def test_both_sides_train_the_same_loss():
  pytest.importorskip('peft')
  options = gpu.Options(
    'tiny',
    None,
    'o_proj',
    4,
    steps=1,
    train_rows=1,
    test_rows=1,
    shapes=((2, 64),),
    dtype='float32',
  )
  (runs,) = gpu.single(options, sys.executable).values()
  ours, theirs = runs['lora_jax float32'], runs['PEFT float32']
  assert ours['trainable_parameters'] == theirs['trainable_parameters']
  assert ours['real_tokens'] == theirs['real_tokens'] == 2 * 64
  # PEFT's side has no target for the last token of a row.
  assert ours['losses'][0] == pytest.approx(theirs['losses'][0], rel=0.02)
  train.show({'2 x 64': runs}, 'tiny')


@pytest.fixture(scope='module')
def compared():
  """Two configurations of a dataset that is chosen by likelihood."""
  pytest.importorskip('peft')
  options = grid.Options(
    base='tiny',
    data=None,
    dataset='medmcqa',
    targets=('o_proj', 'fc2'),
    rank=4,
    steps=1,
    tokens_per_batch=1024,
    max_length=512,
    train_rows=40,
    test_rows=6,
    batch_rows=4,
    max_new_tokens=2,
    dtype='float32',
    peer_dtypes=('float32',),
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
    patch.setattr(peer, 'python', lambda: Path(sys.executable))
    return grid.compare(options)


@pytest.mark.slow
def test_the_base_is_scored_alike_on_both_sides(compared):
  ours, theirs = compared['lora_jax float32'], compared['PEFT float32']
  assert [*ours['cells']] == [*theirs['cells']] == ['base', 'o_proj', 'fc2']
  assert ours['cells']['base']['score'] == theirs['cells']['base']['score']


def test_the_grid_counts_time_memory_and_programs(compared):
  ours, theirs = compared['lora_jax float32'], compared['PEFT float32']
  for side in (ours, theirs):
    assert 0 < side['train_seconds'] + side['score_seconds'] < side['total_seconds']
    assert side['peak_bytes'] > 0
    # The same rows, give or take what packing leaves to the next batch.
    assert side['cells']['o_proj']['real_tokens'] > 0
  assert ours['programs'] > 0
  grid.show(compared)


@pytest.mark.slow
def test_engine_and_peft_say_the_same_to_a_mixed_batch():
  pytest.importorskip('peft')
  options = serve.Options(
    'tiny',
    ('o_proj,fc2',),
    rank=3,
    rows=3,
    slots=(2, 5),
    prompt_tokens=6,
    new_tokens=4,
    turns=1,
    dtype='float32',
    peer_dtypes=('float32',),
  )
  (record,) = serve.compare(options)
  assert record['peers']['float32']['rows_equal'] == 3
  assert list(record['ours']) == ['mixed', 'base', '2 slots', '5 slots']
  for times in record['ours'].values():
    assert 0 < times[0]['step_seconds'] < times[0]['seconds']
  made = serve.table([record], options)
  assert made.row_count == 6


def test_a_machine_without_a_gpu_is_refused_in_one_line(tmp_path):
  done = subprocess.run(
    [sys.executable, '-m', 'benchmarks.gpu'],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
    env={'PATH': str(tmp_path), 'HOME': str(tmp_path), 'PYTHONPATH': str(ROOT)},
  )
  assert done.returncode == 2
  assert done.stdout == ''
  assert len(done.stderr.splitlines()) == 1
  assert 'no NVIDIA GPU' in done.stderr


@pytest.mark.parametrize(
  ('module', 'arguments', 'says'),
  [
    ('train', ['--peers=trl'], 'peft, tunix'),
    ('train', ['--peers='], 'peft, tunix'),
    ('grid', ['--targets=o_proj['], 'o_proj['),
    ('grid', ['--targets=o_proj', '--targets=fc2,qkv_proj'], 'give q_proj,k_proj,v_proj'),
    ('train', ['--targets=gate_up_proj'], 'give gate_proj,up_proj'),
    ('train', ['--json=/no/such/place.json'], '--json=/no/such/place.json'),
    ('grid', ['--json=/'], '--json=/'),
    ('grid', ['--dataset=medmca'], 'medmcqa'),
    ('serve', ['--slots=4,many'], '--slots=4,many'),
    ('serve', ['--peer_dtypes=int8'], 'give of float32, bfloat16'),
    ('serve', ['--targets=qkv_proj'], 'give q_proj,k_proj,v_proj'),
  ],
)
def test_a_mistake_is_one_line(module, arguments, says):
  done = subprocess.run(
    [sys.executable, '-m', f'benchmarks.{module}', *arguments],
    capture_output=True, text=True, cwd=ROOT, check=False,
  )  # fmt: skip
  assert done.returncode == 2, done.stderr
  assert says in done.stderr

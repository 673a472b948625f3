"""Benchmarks run to their end on a tiny base, and both sides do the same work.

Speed is not tested: what is compiled here is not optimised, and the base is a toy.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import batches as batching
from benchmarks import gpu, grid, peer, serve, serve_soak, side, train
from lora_jax.attention import SHARED
from lora_jax.errors import UserError
from lora_jax.hub import bases, tiny

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


@pytest.fixture
def sure(monkeypatch):
  """The tiny base sure of what comes next; else any targets have the loss ln(vocabulary)."""
  base = bases.load('tiny')
  table = {'embedding': 40 * base.params['embed_tokens']['embedding']}
  held = dataclasses.replace(base, params={**base.params, 'embed_tokens': table})
  monkeypatch.setattr(bases, 'load', lambda *_: held)
  return held


@pytest.fixture
def _same_targets(monkeypatch):
  """PEFT's side has no target for the last token of a row; ours is given none either."""
  make = batching.equal_setting

  def equal(*arguments):
    setting = make(*arguments)
    for batch in setting.ours:
      batch['weights'][:, -1] = 0
    return setting

  monkeypatch.setattr(batching, 'equal_setting', equal)


@pytest.mark.slow
@pytest.mark.usefixtures('sure', '_same_targets')
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
  # Steps have other targets, and so other losses, by far more than both sides may differ.
  assert max(np.abs(np.diff(ours['losses']))) > 0.01 * ours['losses'][0]
  assert ours['losses'] == pytest.approx(theirs['losses'], rel=1e-3)
  train.show({'2 x 64': runs}, 'tiny')


def test_every_side_is_given_the_same_rows(monkeypatch):
  """`train.compare` with sides that only say what they were asked to train."""
  asked = {}

  def run(command, record, who, environ=None):
    given = dict(part[2:].split('=', 1) for part in command if part.startswith('--'))
    assert (Path(given['weights']) / 'config.json').is_file()
    assert (given['targets'], given['rank'], given['steps']) == ('o_proj,down_proj', '4', '1')
    with np.load(given['batches']) as file:
      asked.setdefault(who, []).append(dict(file))
    of_steps = {'step_seconds': [2.0], 'warm_seconds': [3.0, 2.0], 'losses': [1.0] * 3}
    tokens = {'real_tokens': 50, 'computed_tokens': 40, 'padded_tokens': 80}
    rest = {'matrix_peak': 1e9, 'peak_bytes': 2**30, 'versions': {}}
    return of_steps | tokens | rest | {'dtype': 'float32', 'where': 'host'}

  monkeypatch.setattr(side, 'run', run)
  sides = train.Sides('float32', peers=('peft',), peer_dtypes=('float32',))
  options = train.Options(
    'tiny', None, 'o_proj,fc2', 4, 1, sides, train_rows=20, tokens_per_batch=1024, max_length=512
  )
  records = train.compare(options)
  assert [*records] == ['equal', 'rows']
  for runs in records.values():
    assert [*runs] == ['lora_jax float32', 'PEFT float32']
    for held in runs.values():
      rates = [held[name] for name in ('real_tokens_per_second', 'padding', 'compile_seconds')]
      assert rates == [25.0, 0.5, 1.0]
      assert held['of_peak'] > 0
  assert train.table(records, '').row_count == 4
  ours, theirs = asked.values()
  for i in range(train.WARMUP + 1):
    assert ours[0][f'tokens_{i}'].shape == train.EQUAL_SHAPE
    np.testing.assert_array_equal(ours[0][f'tokens_{i}'], theirs[0][f'tokens_{i}'])
  padded, packed = _padded_rows(theirs[1]), _packed_rows(ours[1])
  assert len(padded) == options.train_rows
  assert 0 < len(packed) <= len(padded)
  assert packed <= padded


def _padded_rows(arrays):
  """(tokens, those of them that are learned) of each row of a peer's."""
  found = set()
  for i in range(len(arrays) // 3):
    each = zip(arrays[f'tokens_{i}'], arrays[f'mask_{i}'], arrays[f'labels_{i}'], strict=True)
    for tokens, mask, labels in each:
      learned = labels[labels != batching.IGNORED]
      found.add((tuple(tokens[mask > 0]), tuple(learned)))
  return found


def _packed_rows(arrays):
  """The same of each segment of ours, whose targets are a token ahead."""
  found = set()
  for i in range(len(arrays) // 5):
    names = ('tokens', 'targets', 'weights', 'segments')
    for row in zip(*(arrays[f'{name}_{i}'] for name in names), strict=True):
      tokens, targets, weights, segments = row
      for segment in range(1, segments.max() + 1):
        own = segments == segment
        whole = (*tokens[segments == SHARED], *tokens[own], targets[own][-1])
        found.add((whole, tuple(targets[own & (weights > 0)])))
  return found


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
  for held in (ours, theirs):
    assert 0 < held['train_seconds'] + held['score_seconds'] < held['total_seconds']
    assert held['peak_bytes'] > 0
  # The same rows, give or take what packing leaves to the next batch.
  real = [held['cells']['o_proj']['real_tokens'] for held in (ours, theirs)]
  assert real[0] == pytest.approx(real[1], rel=0.15)
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


@pytest.mark.slow
def test_a_soak_is_told_in_a_table():
  record, known = serve_soak.soak(
    bases.load('tiny'), adapters=9, slots=2, rows=3, steps=80, each=2, host_bytes=200_000
  )
  assert record.wrong == []
  assert {request.adapter for request, _ in known} > {'', 'adapter-0', 'adapter-8'}
  assert min(record.greedy, record.loads) > 20
  assert serve_soak.table(record, known).row_count == 11


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


def planted(rate, peak, gib, where='host', dtype='float32'):
  """A record of a side, as `train.with_rates` leaves it."""
  return {
    'dtype': dtype, 'real_tokens_per_second': rate, 'padding': 0.25, 'flops_per_second': 1e9 * rate,
    'matrix_peak': 1e9 * peak, 'of_peak': rate / peak, 'compile_seconds': 3.0,
    'peak_bytes': gib * 2**30, 'where': where,
  }  # fmt: skip


def cells_of(made):
  return [[*column.cells] for column in made.columns]


def test_ratios_are_to_the_fastest_peft_and_shares_of_the_machines_peak():
  runs = {
    'lora_jax float32': planted(300, 400, 2),
    'PEFT float32': planted(100, 1000, 3),
    'PEFT bfloat16': planted(150, 600, 4, dtype='bfloat16'),
    'Tunix float32': planted(200, 500, 5),
  }
  made = train.table(train.of_the_machines_peak({'rows': runs}), '')
  _, _, rates, ratios, _, _, shares, _, _, memory = cells_of(made)
  assert rates == ['300', '100', '150', '200']
  assert ratios == ['2.00x', '0.67x', '1.00x', '1.33x']
  assert shares == ['30%', '10%', '25%', '20%']
  assert memory == ['0.50x', '0.75x', '1.00x', '1.25x']


def test_the_grids_ratios_are_of_the_faster_peft_to_ours():
  side_of = lambda total, gib: {
    'train_seconds': total / 2, 'score_seconds': total / 4, 'total_seconds': total,
    'peak_bytes': gib * 2**30, 'cells': {'base': {}, 'o_proj': {}},
  }  # fmt: skip
  records = {
    'lora_jax float32': side_of(100, 3),
    'PEFT float32': side_of(300, 6),
    'PEFT bfloat16': side_of(250, 4),
  }
  made = grid.table(records)
  assert 'ratio: PEFT bfloat16 to ours' in made.title
  assert cells_of(made)[-1] == ['2.50x', '2.50x', '2.50x', '2.50x', '1.33x']


def test_sides_on_other_devices_are_no_comparison():
  side.check_alike(planted(1, 1, 1), planted(1, 1, 1), 'PEFT')
  with pytest.raises(UserError, match='our side ran on an accelerator and PEFT on the CPU'):
    side.check_alike(planted(1, 1, 1, 'device'), planted(1, 1, 1), 'PEFT')


def test_rows_of_a_batch_are_counted_over_all_configurations():
  trained = lambda rows: {'train': {'examples': rows}}
  assert grid.mean_rows({'base': {}, 'o_proj': trained(40), 'fc2': trained(80)}, 3) == 20

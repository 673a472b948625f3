"""Rankings are of different batches alone, the same for the same numbers, and say when unsure."""

import numpy as np
import pytest
from planted_run import plant_probe

from lora_jax.ranking import (
  DECREASE,
  FEATURE_NORM,
  PER_LATENCY,
  PER_PARAMETER,
  rank,
)
from lora_jax.records import RunDirectory

QUERY, OUT, DOWN = (f'layers/{path}' for path in ('attn/q_proj', 'attn/o_proj', 'mlp/down_proj'))
SETS = {'q_proj': ([QUERY], 4000), 'o_proj': ([OUT], 1000), 'q_proj,o_proj': ([QUERY, OUT], 5000)}
DECREASES = {QUERY: 0.02, OUT: 0.01, DOWN: 0.5}
NORMS = {QUERY: 2.0, OUT: 1.0, DOWN: 1.5}


def planted(tmp_path, datasets=('medmcqa',), decreases=DECREASES, sets=SETS, **more):
  run = RunDirectory(tmp_path)
  plant_probe(run, datasets, decreases, NORMS, sets, **more)
  return run.probe()


def test_a_set_is_the_sum_of_its_modules_over_different_batches(tmp_path):
  found = rank(planted(tmp_path), ['medmcqa'], {})
  assert [*found] == [DECREASE, PER_PARAMETER, FEATURE_NORM]
  decrease = found[DECREASE]
  # The diagonal is 100.
  assert [decrease.value(name) for name in SETS] == pytest.approx([0.02, 0.01, 0.03])
  assert [decrease.rank(name) for name in SETS] == [2, 3, 1]
  assert decrease.interval('o_proj') == pytest.approx((0.01, 0.01))
  assert decrease.best == 'q_proj,o_proj'
  per = found[PER_PARAMETER]
  assert [per.value(name) for name in SETS] == pytest.approx([5, 10, 6])
  assert per.best == 'o_proj'
  norm = found[FEATURE_NORM]
  assert [norm.value(name) for name in SETS] == pytest.approx([2, 1, 1.5])
  assert [norm.rank(name) for name in SETS] == [3, 1, 2]
  assert norm.best == 'o_proj'
  for ranking in found.values():
    assert ranking.decided
    assert ranking.first() == {ranking.best: 1.0}
    assert ranking.rank_interval(ranking.best) == (1, 1)


def test_a_fused_module_has_the_norms_of_its_parts(tmp_path):
  decreases = {'layers/attn/qkv_proj': 0.1, OUT: 0.01}
  norms = {QUERY: 2.0, 'layers/attn/k_proj': 3.0, 'layers/attn/v_proj': 4.0, OUT: 1.0}
  run = RunDirectory(tmp_path)
  sets = {'qkv_proj': (['layers/attn/qkv_proj'], 1)}
  plant_probe(run, ['medmcqa'], decreases, norms, sets)
  assert rank(run.probe(), ['medmcqa'], {})[FEATURE_NORM].value('qkv_proj') == pytest.approx(3)


def test_latency_ranks_the_sets_that_were_timed(tmp_path):
  found = rank(planted(tmp_path), ['medmcqa'], {'q_proj': 1.0, 'o_proj': 0.4, 'other': 1.0})
  ranking = found[PER_LATENCY]
  assert ranking.names == ('o_proj', 'q_proj')
  assert ranking.value('o_proj') == pytest.approx(0.025)
  assert ranking.best == 'o_proj'


def test_noise_leaves_it_undecided_and_is_drawn_alike(tmp_path):
  near = {**DECREASES, QUERY: 0.0101}
  sets = {name: SETS[name] for name in ('q_proj', 'o_proj')}
  held = planted(tmp_path, decreases=near, sets=sets, noise=0.002)
  ranking = rank(held, ['medmcqa'], {})[DECREASE]
  assert not ranking.decided
  assert sum(ranking.first().values()) == pytest.approx(1)
  assert ranking.rank_interval('o_proj') == (1, 2)
  low, high = ranking.interval('o_proj')
  assert low < ranking.value('o_proj') < high
  again = rank(held, ['medmcqa'], {})[DECREASE]
  assert (again.draws_CN == ranking.draws_CN).all()


def test_the_interval_covers_what_more_batches_would_give():
  covered = 0
  for seed in range(200):
    random = np.random.default_rng(seed)
    # A batch is easier or harder to learn from, and to learn for.
    on, of = random.normal(1, 0.3, (2, 8))
    x = 0.01 * np.outer(on, of) + 0.001 * random.standard_normal((8, 8))
    held = {
      'sets': {'o_proj': {'modules': [OUT], 'trainable_params': 1}},
      'datasets': {
        f'd{seed}': {
          'losses': [1.0] * 8, 'decreases': {OUT: x.tolist()}, 'feature_norms': {OUT: [1.0] * 8},
        }
      },
    }  # fmt: skip
    low, high = rank(held, [f'd{seed}'], {})[DECREASE].interval('o_proj')
    covered += low <= 0.01 <= high
  # Of eight batches a bootstrap says a little too much.
  assert 0.85 <= covered / 200 <= 0.99


def test_datasets_count_alike(tmp_path):
  held = planted(tmp_path, ('medmcqa', 'fincot'))
  for path, x in held['datasets']['fincot']['decreases'].items():
    held['datasets']['fincot']['decreases'][path] = (3 * np.array(x)).tolist()
  both = rank(held, ['medmcqa', 'fincot'], {})[DECREASE]
  assert both.value('o_proj') == pytest.approx(0.02)

"""What is planted is found, what is not there is not, and the numbers are the references'."""

import numpy as np
import pytest
from scipy import stats

from lora_jax.report import statistics
from lora_jax.report.statistics import RowScores, analyse, average, holm


def table(scores, dataset='d'):
  """RowScores of {configuration: x_SR}."""
  x_SR = {name: np.atleast_2d(np.asarray(rows, float)) for name, rows in scores.items()}
  rows = tuple(f'r{i}' for i in range(next(iter(x_SR.values())).shape[1]))
  seeds = {name: tuple(range(len(x))) for name, x in x_SR.items()}
  return RowScores(dataset, rows, x_SR, seeds)


def planted(random, names=9, seeds=3, rows=120, between_seeds=2.0, lift=None, wild=1.0):
  """Right or wrong answers: rows differ in difficulty, runs by their seed, sets by `lift`."""
  lift = lift or {}
  easy_R = random.beta(1, 1.5, rows)
  scores = {}
  for name in ['base', *(f'c{i}' for i in range(1, names))]:
    trained = name != 'base'
    own_R = random.normal(0, 0.1, rows) + lift.get(name, 0) / 100
    noise = between_seeds * (wild if name == 'c1' else 1) / 100 if trained else 0
    seed_S1 = random.normal(0, noise, (seeds if trained else 1, 1))
    chance_SR = easy_R + own_R + seed_S1 + random.normal(0, 0.2, (len(seed_S1), rows))
    scores[name] = 100.0 * (random.random(chance_SR.shape) < chance_SR)
  return table(scores, str(random.integers(2**31)))


@pytest.fixture
def few_draws(monkeypatch):
  """Simulations need many analyses rather than many draws in each."""
  monkeypatch.setattr(statistics, 'DRAWS', 800)


@pytest.mark.parametrize('wild', [1.0, 3.0])
def test_no_difference_is_declared_significant_at_the_nominal_rate(few_draws, wild):
  """All configurations alike in truth; `wild`: one varies three times as much between seeds."""
  random = np.random.default_rng(0)
  times, alone, family = 150, [], 0
  for _ in range(times):
    found = analyse(planted(random, names=5, rows=100, wild=wild)).comparisons.values()
    alone += [compared.p < 0.05 for compared in found]
    family += any(compared.beyond_noise for compared in found)
  # Standard errors here: below 0.01 (ten correlated pairs a time) and 0.018.
  assert 0.02 < np.mean(alone) < 0.08
  assert family / times < 0.05 + 2.5 * 0.018


def test_seeds_left_out_of_account_would_find_what_is_not_there(few_draws):
  """The test above can fail: of means over seeds alone, differences come out of nothing."""
  random = np.random.default_rng(1)
  found = 0
  for _ in range(60):
    planted_table = planted(random, names=3, rows=100, between_seeds=6.0)
    one_mean = {name: x_SR.mean(axis=0) for name, x_SR in planted_table.scores.items()}
    held = analyse(table(one_mean)).compare('c1', 'c2')
    found += held.p < 0.05
  assert found / 60 > 0.12


@pytest.mark.parametrize('lift', [2.5, 4.0, 6.0])
def test_a_planted_difference_is_found_with_the_stated_power(few_draws, lift):
  """A target set `lift` points above the base is told from it as often as theory says.

  Rows and seeds are normal, so the variance of the difference is known: of R rows, what
  is a set's own and the rest of both; of S seeds, that between seeds.
  """
  random = np.random.default_rng(2)
  rows, seeds, own, between, rest, times = 80, 3, 8.0, 1.0, 6.0, 120
  error = ((own**2 + rest**2 * (1 + 1 / seeds)) / rows + between**2 / seeds) ** 0.5
  power = stats.norm.cdf(lift / error - stats.norm.ppf(0.975))
  found, wrong = 0, 0
  for _ in range(times):
    easy_R = random.normal(50, 15, rows)
    scores = {'base': easy_R + random.normal(0, rest, rows)}
    for name in ('c1', 'c2', 'c3', 'c4'):
      shift_S1 = random.normal(0, between, (seeds, 1))
      own_SR = random.normal(0, own, rows) + random.normal(0, rest, (seeds, rows))
      scores[name] = easy_R + lift * (name == 'c1') + shift_S1 + own_SR
    held = analyse(table(scores, str(random.random()))).compare('c1', 'base')
    found += held.p < 0.05 and held.difference > 0
    wrong += held.beyond_noise < 0
  # The variance between seeds is estimated from few, which costs a little.
  assert power - 0.08 - 2.5 * 0.045 < found / times < power + 2.5 * 0.045
  assert wrong == 0
  if lift > 5:
    assert found / times > 0.9


def test_intervals_cover_the_truth(few_draws):
  """Rows and seeds drawn anew: 95 % of the intervals hold what both are drawn around."""
  random = np.random.default_rng(3)
  held, narrow, times = 0, 0, 150
  for _ in range(times):
    rows_R = random.normal(50, 20, 60)
    x_CSR = rows_R + random.normal(0, 4, (4, 3, 1)) + random.normal(0, 5, (4, 3, 60))
    names = ('base', 'c1', 'c2', 'c3')
    found = analyse(table(dict(zip(names, x_CSR, strict=True)), str(random.random())))
    low, high = found.intervals['c1']
    held += low <= 50 <= high
    # What resampling the three seeds would say of them alone.
    means = x_CSR[1].mean(axis=1) - rows_R.mean()
    narrow += np.ptp(means) > 0 and means.min() <= 0 <= means.max()
  assert 0.90 <= held / times <= 0.99
  assert narrow / times < 0.85


@pytest.mark.parametrize('chance', [0.01, 0.05, 0.15])
def test_intervals_cover_the_truth_where_all_rows_may_be_alike(few_draws, chance):
  """Of twelve rows of an answer that is rarely right, most samples have none that is."""
  random = np.random.default_rng(11)
  means, gaps, alike, times = 0, 0, 0, 200
  for _ in range(times):
    right_CR = 100.0 * (random.random((2, 12)) < np.array([[chance], [2 * chance]]))
    scores = dict(zip(('base', 'c1'), right_CR, strict=True))
    found = analyse(table(scores, str(random.random())))
    low, high = found.intervals['base']
    means += low <= 100 * chance <= high
    held = found.compare('c1', 'base')
    gaps += held.low <= 100 * chance <= held.high
    alike += not right_CR[0].any()
  assert alike / times > 0.05
  assert means / times >= 0.93
  assert gaps / times >= 0.93


@pytest.mark.parametrize('rows', [2, 12, 200])
def test_rows_all_at_an_end_of_the_scale_have_the_exact_binomial_interval(rows):
  scores = {'base': np.zeros(rows), 'c1': np.full(rows, 100.0), 'c2': np.zeros((3, rows))}
  held = analyse(table(scores))
  bound = 100 * stats.binomtest(0, rows).proportion_ci(method='exact').high
  assert held.intervals['base'] == held.intervals['c2'] == pytest.approx((0, bound), abs=0.1)
  assert held.intervals['c1'] == pytest.approx((100 - bound, 100), abs=0.1)
  compared = held.compare('c2', 'base')
  assert (compared.difference, compared.beyond_noise) == (0, 0)
  assert (compared.low, compared.high) == pytest.approx((-bound, bound), abs=0.1)


def test_a_base_that_is_never_right_may_be_on_other_rows():
  base, some = np.zeros(12), np.repeat([100.0, 0.0], [2, 10])
  held = analyse(table({'base': base, 'c1': some})).compare('c1', 'base')
  # By itself c1 reaches from 0 to 43, and the base to 26.
  assert -26 < held.low < -5
  assert held.high == pytest.approx(42, abs=4)


def test_an_average_of_rows_all_alike_is_within_its_interval():
  parts = [analyse(table({'base': np.zeros(12)}, str(i))) for i in range(7)]
  low, high = average(parts).intervals['base']
  assert low == 0
  assert 5 < high < parts[0].intervals['base'][1] / 2


def test_the_sign_test_is_scipys():
  random = np.random.default_rng(4)
  base, other = random.random((2, 40)) * 100
  held = analyse(table({'base': base, 'c1': other + 8})).compare('c1', 'base')
  reference = stats.permutation_test(
    (other + 8 - base,), np.mean, permutation_type='samples', n_resamples=20_000, rng=0
  )
  assert held.p == pytest.approx(reference.pvalue, abs=0.03)
  assert held.difference == pytest.approx(np.mean(other + 8 - base), abs=1e-5)


def test_the_interval_of_one_seed_is_scipys():
  rows = np.random.default_rng(5).random(80) * 100
  low, high = analyse(table({'base': rows})).intervals['base']
  reference = stats.bootstrap((rows,), np.mean, method='percentile', rng=0).confidence_interval
  assert (low, high) == pytest.approx((reference.low, reference.high), abs=1.0)


def test_pairing_by_rows_is_what_finds_a_small_difference():
  random = np.random.default_rng(6)
  base = random.random(100) * 90
  held = analyse(table({'base': base, 'c1': base + 1 + random.normal(0, 1, 100)}))
  assert held.compare('c1', 'base').beyond_noise == 1
  assert held.compare('base', 'c1').beyond_noise == -1
  low, high = held.intervals['base']
  assert low < np.mean(base) + 1 < high


def test_holm_by_hand():
  # 0.01 x 4, 0.02 x 3, 0.03 x 2, 0.04 x 1, each at least the one before.
  assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
  assert holm([0.9, 0.8]) == [1.0, 1.0]
  assert holm([]) == []


def test_the_smallest_p_survives_the_correction():
  random = np.random.default_rng(7)
  sets = {f'c{i}': random.random(60) * 10 for i in range(1, 20)}
  held = analyse(table({'base': random.random(60) * 10, **sets, 'c20': np.full(60, 100.0)}))
  assert len(held.comparisons) == 210
  assert all(held.compare('c20', name).beyond_noise == 1 for name in ('base', 'c1', 'c19'))


def test_equal_scores_are_no_difference():
  rows = [0, 100, 100, 0, 100]
  held = analyse(table({'base': rows, 'c1': [rows, rows]})).compare('c1', 'base')
  assert (held.difference, held.p, held.beyond_noise) == (0.0, 1.0, 0)
  # Half of all rows may differ, for all that five say.
  assert (held.low, held.high) == pytest.approx((-52.2, 52.2), abs=0.1)


def test_a_single_row_says_nothing_of_others():
  held = analyse(table({'base': [0], 'c1': [100]}))
  assert held.intervals == {}
  assert held.compare('c1', 'base').difference == 100
  assert held.compare('c1', 'base').beyond_noise == 0


def test_variance_is_split_as_it_was_planted():
  random = np.random.default_rng(8)
  of_name, of_seed = random.normal(0, 8, 40), random.normal(0, 4, 30)
  scores = {'base': np.zeros(2)}
  for i, name in enumerate(of_name):
    y_S = 50 + name + of_seed + random.normal(0, 2, 30)
    scores[f'c{i}'] = np.repeat(y_S[:, None], 2, axis=1)
  split = statistics._split(table(scores))
  assert split.configuration**0.5 == pytest.approx(np.std(of_name, ddof=1), rel=0.1)
  assert split.seed**0.5 == pytest.approx(np.std(of_seed, ddof=1), rel=0.1)
  assert split.rest**0.5 == pytest.approx(2, rel=0.1)
  assert sum(split.shares()) == pytest.approx(1)
  assert (split.configurations, split.seeds) == (40, 30)


def test_one_seed_gives_no_split_and_says_so():
  held = analyse(table({'base': [0, 100], 'c1': [100, 100], 'c2': [0, 0]}))
  assert held.split is None
  assert not held.seeds_known
  two = analyse(table({'base': [0, 100], 'c1': [[100, 100], [0, 100]], 'c2': [0, 0]}))
  assert two.seeds_known


def test_an_average_is_over_independent_datasets():
  random = np.random.default_rng(9)
  parts = [
    analyse(table({'base': random.random(50) * 100, 'c1': random.random(50) * 100}, str(i)))
    for i in range(4)
  ]
  held = average(parts)
  gaps = [part.compare('c1', 'base').difference for part in parts]
  assert held.compare('c1', 'base').difference == pytest.approx(np.mean(gaps), abs=1e-5)
  wide = np.mean([np.ptp(part.intervals['c1']) for part in parts])
  assert np.ptp(held.intervals['c1']) == pytest.approx(wide / 2, rel=0.15)


def test_a_configuration_more_leaves_the_others_intervals_alone():
  random = np.random.default_rng(10)
  scores = {name: random.random(30) * 100 for name in ('base', 'c1', 'c2')}
  fewer = analyse(table({name: scores[name] for name in ('base', 'c1')}))
  assert analyse(table(scores)).intervals['c1'] == fewer.intervals['c1']

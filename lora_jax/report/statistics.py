"""How sure the numbers of a report are: intervals, paired tests, and where the variance lies.

Two things could have turned out otherwise: which rows the test split holds, and which
seeds were trained with. Both are taken into account, together, everywhere below.

- **Rows** are resampled, the same ones for every configuration (`scipy.stats.bootstrap`),
  or have the signs of their differences flipped (the tests). Of rows that are all alike
  resampling gives nothing else, as if no other row could be unlike them: there it is the
  exact binomial bound on the share of such rows that says how far a mean may be off.
- **Seeds** are too few to resample: of three, resampling can give nothing beyond the
  smallest and the largest, and an interval of 95 % covers about 75 %. Instead the error
  of a mean over seeds is drawn from Student's t. Its scale is the standard deviation
  between seeds beyond what the rows explain, pooled over the dataset's configurations and
  moved towards the configuration's own (moderated as in Smyth 2004, doi:10.2202/1544-6115.1027,
  with a fixed prior weight). The base has no seed and no such error.

With one seed nothing is known of how another training run would turn out; intervals and
tests are then over rows alone, and `DatasetStatistics.seeds_known` says so.

Everything random is seeded from the names of the dataset and its rows, and results are
rounded, so that the same records give the same numbers.

  found = analyse(RowScores('medmcqa', ('q1', 'q2'), {'base': x_SR, 'o_proj': y_SR}, ...))
  found.compare('o_proj', 'base').beyond_noise
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from lora_jax.report.resampling import EQUAL, alike, flipped, resampled, unseen

# Of what is called beyond the noise, the share that chance alone may bring about.
LEVEL = 0.05
DRAWS = 4000
# A prior weight, in seeds, of the pooled variance against a configuration's own.
_PRIOR_SEEDS = 4
_DIGITS = 6


@dataclasses.dataclass(frozen=True)
class RowScores:
  """The scores of one dataset, row by row.

  Attributes:
    dataset: its name.
    rows: ids of the R rows that every configuration has.
    scores: configuration -> x_SR in 0..100, a row for each seed; the base's first.
    seeds: configuration -> its seeds, in the order of x_SR.
    base: the configuration that was not trained.
    arm: told apart from others: the same rows are drawn in all arms, and errors of seeds
      are not.
  """

  dataset: str
  rows: tuple[str, ...]
  scores: Mapping[str, np.ndarray]
  seeds: Mapping[str, tuple[int, ...]]
  base: str = 'base'
  arm: str = ''


@dataclasses.dataclass(frozen=True)
class Comparison:
  """One configuration against another on the same rows.

  Attributes:
    difference: first minus second, in points.
    low, high: its interval of 95 %.
    p: how often chance alone brings about a difference as large.
    adjusted: p after Holm's correction for all comparisons of the dataset.
  """

  difference: float
  low: float
  high: float
  p: float
  adjusted: float

  @property
  def beyond_noise(self) -> int:
    """1: first is better, -1: second is, 0: the difference is inside the noise."""
    if self.adjusted >= LEVEL:
      return 0
    return 1 if self.difference > 0 else -1

  def turned(self) -> 'Comparison':
    """Second against first."""
    # Adding 0 turns -0.0 into 0.0, which prints without a sign.
    return dataclasses.replace(
      self, difference=0.0 - self.difference, low=0.0 - self.high, high=0.0 - self.low
    )


@dataclasses.dataclass(frozen=True)
class VarianceSplit:
  """Variance of the scores of single runs, as components (two-way, method of moments).

  Attributes:
    configuration: between target sets.
    seed: common to all target sets of a seed.
    rest: between runs of one target set beyond that.
    configurations: how many target sets.
    seeds: how many seeds.
  """

  configuration: float
  seed: float
  rest: float
  configurations: int
  seeds: int

  def shares(self) -> tuple[float, float, float] | None:
    """Of configuration, seed and rest in their sum; None where nothing varies."""
    total = self.configuration + self.seed + self.rest
    if not total:
      return None
    return self.configuration / total, self.seed / total, self.rest / total


@dataclasses.dataclass(frozen=True)
class DatasetStatistics:
  """What is known of one dataset, or of the average over several.

  Attributes:
    configurations: those with scores.
    seen_CN: the mean of each as N other samples of the same rows and seeds would have it.
    draws_CN: the same with what rows unlike any of these may add, see `resampling.unseen`.
    intervals: configuration -> interval of 95 % of its mean; none below two rows.
    comparisons: (first, second) -> comparison; the other way round is not stored.
    gaps_PN: the differences of the P comparisons, as of `draws_CN`.
    null_PN: those that chance alone brings about.
    seeds_known: whether some configuration was trained with two seeds or more.
    split: components of variance, or None below two seeds or two target sets.
    rows: on how many rows, over all datasets.
  """

  configurations: tuple[str, ...]
  seen_CN: np.ndarray
  draws_CN: np.ndarray
  intervals: Mapping[str, tuple[float, float]]
  comparisons: Mapping[tuple[str, str], Comparison]
  gaps_PN: np.ndarray
  null_PN: np.ndarray
  seeds_known: bool
  split: VarianceSplit | None
  rows: int

  def compare(self, first: str, second: str) -> Comparison | None:
    """First against second, or None where one of them has no scores."""
    if (first, second) in self.comparisons:
      return self.comparisons[first, second]
    held = self.comparisons.get((second, first))
    return None if held is None else held.turned()

  def draws(self, configuration: str) -> np.ndarray:
    """Its draws_N."""
    return self.draws_CN[self.configurations.index(configuration)]


def analyse(table: RowScores, configurations: int = 0) -> DatasetStatistics:
  """Intervals and tests of one dataset, which has at least one row.

  Args:
    table: its scores.
    configurations: how many the whole run has, where a dataset may lack some: averages
      over datasets need equally many draws of each.
  """
  names, rows = tuple(table.scores), len(table.rows)
  pairs = list(itertools.combinations(range(len(names)), 2))
  # At least so many that the smallest p survives Holm's correction.
  draws = max(DRAWS, 40 * math.comb(max(configurations, len(names)), 2))
  x_CR = np.array([table.scores[name].mean(axis=0) for name in names])
  d_PR = np.array([x_CR[i] - x_CR[j] for i, j in pairs]).reshape(len(pairs), rows)
  errors = _seed_errors(table)
  noise_CN = np.zeros((len(names), draws))
  for place, (name, error) in enumerate(errors.scales.items()):
    noise_CN[place] = error * _generator(table, name + table.arm).standard_t(errors.freedom, draws)
  noise_PN = np.array([noise_CN[i] - noise_CN[j] for i, j in pairs]).reshape(len(pairs), draws)
  seen_CN = resampled(x_CR, _generator(table, 'rows'), draws) + noise_CN
  draws_CN = seen_CN.copy()
  for name, x_R, draws_N in zip(names, x_CR, draws_CN, strict=True):
    if alike(x_R):
      draws_N += unseen(x_R, (0.0, 100.0), _generator(table, f'unseen {name}{table.arm}'), draws)
  gaps_PN = np.array([draws_CN[i] - draws_CN[j] for i, j in pairs]).reshape(len(pairs), draws)
  for place, ((i, j), d_R) in enumerate(zip(pairs, d_PR, strict=True)):
    if alike(d_R):
      random = _generator(table, f'unseen {names[i]} {names[j]}{table.arm}')
      unseen_N = unseen(d_R, (-100.0, 100.0), random, draws)
      gaps_PN[place] = d_R.mean() + noise_PN[place] + unseen_N
  return _statistics(
    names,
    d_PR.mean(axis=1),
    seen_CN,
    draws_CN,
    gaps_PN,
    flipped(d_PR, _generator(table, 'signs'), draws) + noise_PN,
    rows=rows,
    seeds_known=errors.known,
    split=_split(table),
  )


def average(parts: Sequence[DatasetStatistics]) -> DatasetStatistics:
  """Of the average over datasets with the same configurations, each counted alike.

  Datasets are independent of each other, so their draws are averaged one by one.
  """
  mean = lambda arrays: np.mean(np.array(arrays), axis=0)
  pairs = parts[0].comparisons
  return _statistics(
    parts[0].configurations,
    np.array([mean([part.comparisons[pair].difference for part in parts]) for pair in pairs]),
    mean([part.seen_CN for part in parts]),
    mean([part.draws_CN for part in parts]),
    mean([part.gaps_PN for part in parts]),
    mean([part.null_PN for part in parts]),
    # Of two rows in all no interval can be had where one dataset has a single one.
    rows=min(part.rows for part in parts),
    seeds_known=any(part.seeds_known for part in parts),
    split=None,
  )


def _statistics(
  names: tuple[str, ...],
  differences_P: np.ndarray,
  seen_CN: np.ndarray,
  draws_CN: np.ndarray,
  gaps_PN: np.ndarray,
  null_PN: np.ndarray,
  rows: int,
  seeds_known: bool,
  split: VarianceSplit | None,
) -> DatasetStatistics:
  pairs = list(itertools.combinations(range(len(names)), 2))
  raw = [_p_value(*found) for found in zip(differences_P, null_PN, strict=True)]
  comparisons = {}
  found = zip(pairs, differences_P, gaps_PN, raw, holm(raw), strict=True)
  for (i, j), difference, gaps_N, p, adjusted in found:
    low, high = _hull(seen_CN[i] - seen_CN[j], gaps_N, -100.0, 100.0)
    comparisons[names[i], names[j]] = Comparison(
      _rounded(difference), low, high, _rounded(p), _rounded(adjusted)
    )
  return DatasetStatistics(
    configurations=names,
    seen_CN=seen_CN,
    draws_CN=draws_CN,
    intervals={
      name: _hull(seen_N, draws_N, 0.0, 100.0)
      for name, seen_N, draws_N in zip(names, seen_CN, draws_CN, strict=True)
      if rows > 1
    },
    comparisons=comparisons,
    gaps_PN=gaps_PN,
    null_PN=null_PN,
    rows=rows,
    seeds_known=seeds_known,
    split=split,
  )


def interval(draws: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
  """What lies between the quantiles `level / 2` at both ends."""
  low, high = np.quantile(draws, (level / 2, 1 - level / 2))
  return _rounded(low), _rounded(high)


def _hull(
  seen_N: np.ndarray, draws_N: np.ndarray, least: float, most: float
) -> tuple[float, float]:
  """The interval that holds those of both, within the scale."""
  # Rows at an end of the scale leave others one way to go: that end is moved and not the other.
  bounds = interval(seen_N), interval(draws_N)
  low, high = min(low for low, _ in bounds), max(high for _, high in bounds)
  # Errors of seeds and the widening for few rows know no end of the scale. The range of the
  # rows is no end: those that were not drawn may be beyond it, whatever these few are.
  return max(least, low), min(most, high)


def holm(p: Sequence[float]) -> list[float]:
  """Adjusts p-values so that one false finding among all has the level (Holm 1979)."""
  order = sorted(range(len(p)), key=lambda i: p[i])
  adjusted, largest = [0.0] * len(p), 0.0
  for place, i in enumerate(order):
    largest = max(largest, min(1.0, (len(p) - place) * p[i]))
    adjusted[i] = largest
  return adjusted


def _p_value(difference: float, null_N: np.ndarray) -> float:
  as_large = np.count_nonzero(np.abs(null_N) >= abs(difference) - EQUAL)
  # The observed signs are one of the possible ones.
  return (1 + as_large) / (1 + null_N.size)


@dataclasses.dataclass(frozen=True)
class _SeedErrors:
  """Standard error of each configuration's mean over seeds; zeros where nothing is known."""

  scales: dict[str, float]
  freedom: int
  known: bool


def _seed_errors(table: RowScores) -> _SeedErrors:
  own, weights = {}, {}
  for name, x_SR in table.scores.items():
    seeds, rows = x_SR.shape
    if name == table.base or seeds < 2 or rows < 2:
      continue
    by_seed = x_SR.mean(axis=1, keepdims=True)
    rest_SR = x_SR - by_seed - x_SR.mean(axis=0, keepdims=True) + x_SR.mean()
    rest = float((rest_SR**2).sum()) / ((seeds - 1) * (rows - 1))
    # What single answers add is in the noise of the rows already.
    own[name] = float(by_seed.var(ddof=1)) - rest / rows
    weights[name] = seeds - 1
  freedom = sum(weights.values())
  if not freedom:
    return _SeedErrors(dict.fromkeys(table.scores, 0.0), 1, known=False)
  pooled = sum(own[name] * weights[name] for name in own) / freedom
  scales = {}
  for name, x_SR in table.scores.items():
    weight = weights.get(name, 0)
    held = _PRIOR_SEEDS * pooled + own.get(name, 0.0) * weight
    variance = max(0.0, held / (_PRIOR_SEEDS + weight))
    scales[name] = 0.0 if name == table.base else (variance / x_SR.shape[0]) ** 0.5
  return _SeedErrors(scales, freedom, known=True)


def _split(table: RowScores) -> VarianceSplit | None:
  """Components of the scores of single runs, over the seeds that all target sets have."""
  names = [name for name in table.scores if name != table.base]
  common = sorted(set.intersection(*(set(table.seeds[name]) for name in names))) if names else []
  if len(names) < 2 or len(common) < 2:
    return None
  y_CS = np.array(
    [
      [table.scores[name][table.seeds[name].index(seed)].mean() for seed in common]
      for name in names
    ]
  )
  count, seeds = y_CS.shape
  by_name, by_seed = y_CS.mean(axis=1, keepdims=True), y_CS.mean(axis=0, keepdims=True)
  rest = float(((y_CS - by_name - by_seed + y_CS.mean()) ** 2).sum()) / ((count - 1) * (seeds - 1))
  of_name, of_seed = (seeds * by_name.var(ddof=1), count * by_seed.var(ddof=1))
  return VarianceSplit(
    configuration=_rounded(max(0.0, float(of_name) - rest) / seeds),
    seed=_rounded(max(0.0, float(of_seed) - rest) / count),
    rest=_rounded(rest),
    configurations=count,
    seeds=seeds,
  )


def _generator(table: RowScores, purpose: str) -> np.random.Generator:
  name = '\n'.join((purpose, table.dataset, *table.rows))
  seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], 'big')
  return np.random.Generator(np.random.PCG64(seed))


def _rounded(value: float) -> float:
  # Sums differ in their last digits between processors; reports must not.
  return round(float(value), _DIGITS) + 0.0

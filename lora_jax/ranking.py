"""Target sets ranked by what a probe measured, and how sure that is; nothing here needs JAX.

  rankings = rank(held, ['medmcqa'], {'o_proj': 1.02})
  rankings['per_parameter'].best, rankings['per_parameter'].first()

A probe's record has, for each module, by how much a step on batch i lowers the loss of batch j.
**Only different batches are paired**: a step lowers the loss of its own batch for whatever is
in it, noise included (<sign(g), g> is never negative), so that the diagonal would call every
module good, and those with the most parameters best.

How sure a ranking is comes from resampling the batches (Efron 1979), the same ones for every
set: of n batches another draw of n, in which one may be there several times and is still
never paired with itself.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.targets import parts

# Of fewer there is nothing to resample.
FEWEST_BATCHES = 4
# Resamples.
DRAWS = 2000
# A set that is first in so many of them is the choice; below, it is undecided.
SURE = 0.95

# What sets are ranked by.
DECREASE, PER_PARAMETER, PER_LATENCY, FEATURE_NORM = (
  'decrease',
  'per_parameter',
  'per_latency',
  'feature_norm',
)


@dataclasses.dataclass(frozen=True)
class Ranking:
  """Target sets by one score.

  Attributes:
    score: one of the names above.
    names: C sets.
    values_C: the score of each.
    draws_CN: what other batches would have given.
    lowest: whether the lowest is the best.
  """

  score: str
  names: tuple[str, ...]
  values_C: np.ndarray
  draws_CN: np.ndarray
  lowest: bool = False

  def goodness(self) -> np.ndarray:
    """The scores (C,), higher for what is better."""
    return -self.values_C if self.lowest else self.values_C

  @property
  def best(self) -> str:
    """The set that it picks."""
    return self.names[int(np.argmax(self.goodness()))]

  def value(self, name: str) -> float:
    """A set's score."""
    return _rounded(self.values_C[self.names.index(name)])

  def interval(self, name: str) -> tuple[float, float]:
    """Of 95 %, over batches."""
    low, high = np.quantile(self.draws_CN[self.names.index(name)], (0.025, 0.975))
    return _rounded(low), _rounded(high)

  def rank(self, name: str) -> int:
    """A set's place, from 1."""
    return int(_ranks(self.goodness()[:, None])[self.names.index(name), 0])

  def rank_interval(self, name: str) -> tuple[int, int]:
    """The places of 95 % of the resamples."""
    places_N = self._drawn_ranks()[self.names.index(name)]
    low = np.quantile(places_N, 0.025, method='lower')
    return int(low), int(np.quantile(places_N, 0.975, method='higher'))

  def first(self) -> dict[str, float]:
    """In which share of the resamples a set is first; of those that ever are, most often first."""
    shares = (self._drawn_ranks() == 1).mean(axis=1)
    found = {name: _rounded(share) for name, share in zip(self.names, shares, strict=True) if share}
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))

  @property
  def decided(self) -> bool:
    """Whether the best set is so in nearly all resamples."""
    return self.first().get(self.best, 0.0) >= SURE

  def of(self, names: Sequence[str]) -> 'Ranking':
    """The same for some of the sets, in this order."""
    places = [self.names.index(name) for name in names]
    values_C, draws_CN = self.values_C[places], self.draws_CN[places]
    return dataclasses.replace(self, names=tuple(names), values_C=values_C, draws_CN=draws_CN)

  def _drawn_ranks(self) -> np.ndarray:
    return _ranks(-self.draws_CN if self.lowest else self.draws_CN)


def rank(
  held: Mapping[str, Any], datasets: Sequence[str], times: Mapping[str, float]
) -> dict[str, Ranking]:
  """Rankings by each score, over the mean of some datasets.

  Args:
    held: the content of probe.json.
    datasets: which of its datasets, at least one; each counts alike.
    times: set -> time of a decoded token over the base's, of those for which it is known.
  """
  sets = held['sets']
  names = tuple(sets)
  # Draws of datasets are independent, so they are averaged one by one.
  found = [_of_dataset(name, held['datasets'][name], sets) for name in datasets]
  decrease, norm = (
    Ranking(score, names, *(np.mean([own[score][i] for own in found], axis=0) for i in (0, 1)))
    for score in (DECREASE, FEATURE_NORM)
  )
  rankings = {DECREASE: decrease}
  millions = {name: of['trainable_params'] / 1e6 for name, of in sets.items()}
  rankings[PER_PARAMETER] = _over(decrease, PER_PARAMETER, millions)
  timed = {name: times[name] for name in names if name in times}
  if timed:
    rankings[PER_LATENCY] = _over(decrease.of(tuple(timed)), PER_LATENCY, timed)
  rankings[FEATURE_NORM] = dataclasses.replace(norm, lowest=True)
  return rankings


def _over(ranking: Ranking, score: str, what: Mapping[str, float]) -> Ranking:
  each_C1 = np.array([[what[name]] for name in ranking.names])
  values_C, draws_CN = ranking.values_C / each_C1[:, 0], ranking.draws_CN / each_C1
  return dataclasses.replace(ranking, score=score, values_C=values_C, draws_CN=draws_CN)


def _of_dataset(
  name: str, held: Mapping[str, Any], sets: Mapping[str, Any]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Score -> values (C,) and draws (C, N) of one dataset."""
  batches = len(held['losses'])
  random = np.random.Generator(np.random.PCG64(_seed(name)))
  # How often each batch is there. One of them alone, time and again, has no other to be paired
  # with; that is rare enough for twice as many draws as are needed.
  drawn_Nn = random.multinomial(batches, np.full(batches, 1 / batches), 2 * DRAWS)
  drawn_Nn = drawn_Nn[drawn_Nn.max(axis=1) < batches][:DRAWS].astype(float)
  # First of all as they are.
  counts_Nn = np.concatenate([np.ones((1, batches)), drawn_Nn])
  others_nn = 1 - np.eye(batches)
  pairs = lambda x_nn: np.einsum('Ni,ij,Nj->N', counts_Nn, others_nn * x_nn, counts_Nn)
  weight_N = pairs(np.ones((batches, batches)))
  modules = {m: pairs(np.array(x)) for m, x in held['decreases'].items()}
  kernels = {m: counts_Nn @ np.array(x) / batches for m, x in held['feature_norms'].items()}
  decrease_CN = np.array([sum(modules[m] for m in of['modules']) for of in sets.values()])
  decrease_CN = decrease_CN / weight_N
  norm_CN = np.array(
    [
      np.mean([kernels[part] for m in of['modules'] for part in parts(m)], axis=0)
      for of in sets.values()
    ]
  )
  return {DECREASE: _apart(decrease_CN, batches), FEATURE_NORM: _apart(norm_CN, batches)}


def _apart(found_CN: np.ndarray, batches: int) -> tuple[np.ndarray, np.ndarray]:
  """The values and their draws, which are too near to them by as much as n batches are few."""
  values_C1 = found_CN[:, :1]
  draws_CN = values_C1 + (found_CN[:, 1:] - values_C1) * np.sqrt(batches / (batches - 1))
  return values_C1[:, 0], draws_CN


def _ranks(goodness_CN: np.ndarray) -> np.ndarray:
  """Places from 1 for the highest; of equal ones the earlier is before."""
  order_CN = np.argsort(-goodness_CN, axis=0, kind='stable')
  return np.argsort(order_CN, axis=0, kind='stable') + 1


def _seed(dataset: str) -> int:
  return int.from_bytes(hashlib.sha256(dataset.encode()).digest()[:8], 'big')


def _rounded(value: float) -> float:
  # Sums differ in their last digits between processors; reports must not.
  return float(f'{value:.6g}') + 0.0

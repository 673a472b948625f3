"""A probe held against the grid that it would spare: did it rank target sets as training did?

Two questions, on each dataset and on their mean. How far does the order agree (Spearman,
Kendall)? And what would have been lost by training nothing but the set that the probe picks:
its regret, the points by which the best set of the grid is above it. Beside it stands the
regret of who asks no probe and always takes the same set.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.ranking import Ranking, rank
from lora_jax.report.results import DONE, Dataset, Results
from lora_jax.report.statistics import interval
from lora_jax.report.view import spearman

# What one takes who does not ask.
ALWAYS = ('o_proj', 'all')
# Of fewer sets a rank correlation says next to nothing.
FEWEST_SETS = 3
_DIGITS = 6


@dataclasses.dataclass(frozen=True)
class Foresight:
  """One score of the probe beside what was measured.

  Attributes:
    datasets: names of those that the mean is over, one or more.
    score: of `lora_jax.ranking`.
    sets: how many target sets both have.
    spearman: rank correlation of predicted and measured means; None where one of them is the
      same for all sets, or the sets are few.
    interval: of that, 95 % over test rows and seeds, or None.
    kendall: the same as tau-b.
    pick: the set that the probe puts first.
    best: the highest in the grid.
    regret: points of `best` above `pick`.
    always: set -> the regret of always taking it, of those that were run.
  """

  datasets: tuple[str, ...]
  score: str
  sets: int
  spearman: float | None
  interval: tuple[float, float] | None
  kendall: float | None
  pick: str
  best: str
  regret: float
  always: dict[str, float]


def decode_times(latency: Mapping | None) -> dict[str, float]:
  """Set -> time of a decoded token over the base's, of a record of times."""
  targets = latency['targets'] if latency else {}
  return {name: times['decode_ratio'] for name, times in targets.items()}


def foresight(results: Results) -> list[Foresight]:
  """Every score on every dataset that has been probed and run, then on their mean."""
  if results.probe is None:
    return []
  probed = [d for d in results.datasets if d.name in results.probe['datasets']]
  complete = [d for d in probed if all(d.entries[name].status == DONE for name in _sets(results))]
  groups = [[dataset] for dataset in probed]
  groups += [complete] if len(complete) > 1 else []
  found = []
  for group in groups:
    names = tuple(dataset.name for dataset in group)
    times = decode_times(results.latency)
    for ranking in rank(results.probe, names, times).values():
      sets = [
        name
        for name in ranking.names
        if all(name in d.entries and d.entries[name].status == DONE for d in group)
      ]
      if len(sets) > 1:
        found.append(_beside(ranking.of(sets), group))
  return found


def _sets(results: Results) -> list[str]:
  """What both the probe and the grid have."""
  probed = results.probe['sets'] if results.probe else {}
  return [name for name in results.configurations[1:] if name in probed]


def _beside(ranking: Ranking, group: Sequence[Dataset]) -> Foresight:
  names = ranking.names
  mean = lambda name: float(np.mean([d.entries[name].mean or 0.0 for d in group]))
  # As printed to a millionth: sums of equal scores may differ in their last digits.
  measured = {name: round(mean(name), _DIGITS) for name in names}
  best = max(measured, key=lambda name: measured[name])
  regret = lambda name: round(measured[best] - measured[name], _DIGITS)
  correlated = tau = ends = None
  measured_C = np.array([*measured.values()])
  if len(names) >= FEWEST_SETS and len({*measured_C}) > 1 < len({*ranking.goodness()}):
    from scipy import stats  # takes a second to import

    foretold_C1 = ranking.goodness()[:, None]
    correlated = round(float(spearman(foretold_C1, measured_C[:, None])[0]), _DIGITS)
    # SciPy's own types do not say what this gives.
    found: Any = stats.kendalltau(foretold_C1[:, 0], measured_C)
    tau = round(float(found.statistic), _DIGITS)
    ends = _interval(foretold_C1, names, group)
  return Foresight(
    datasets=tuple(dataset.name for dataset in group),
    score=ranking.score,
    sets=len(names),
    spearman=correlated,
    interval=ends,
    kendall=tau,
    pick=ranking.best,
    best=best,
    regret=regret(ranking.best),
    always={name: regret(name) for name in ALWAYS if name in measured},
  )


def _interval(
  foretold_C1: np.ndarray, names: Sequence[str], group: Sequence[Dataset]
) -> tuple[float, float] | None:
  """Of the correlation, as other test rows and seeds would have it."""
  known = [dataset.statistics for dataset in group if dataset.statistics is not None]
  if len(known) < len(group) or any(held.rows < 2 for held in known):
    return None
  drawn_CN = np.mean([[held.draws(name) for name in names] for held in known], axis=0)
  foretold_CN = np.broadcast_to(foretold_C1, drawn_CN.shape)
  return interval(spearman(foretold_CN, drawn_CN))

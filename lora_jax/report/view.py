"""An arm of a run as claims and recommendations look at it, and three-valued logic.

A statement about a run is true, false, or open (`None`): what is inside the noise, or was
not measured, decides nothing.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from lora_jax.report.results import BASE, DONE, NEEDS_VISION, Dataset, Results
from lora_jax.report.statistics import Comparison, DatasetStatistics, interval
from lora_jax.report.tables import NOTHING, spread

# Of the article's seven datasets, so many must speak for what is said of all.
ENOUGH = 4
# A share of less than a point is a share of nothing.
_LEAST_SCORE = 1.0


@dataclasses.dataclass(frozen=True)
class View:
  """One arm of a run.

  Attributes:
    results: that arm.
  """

  results: Results

  @property
  def trained(self) -> list[str]:
    """The configurations beside the base."""
    return self.results.configurations[1:]

  @property
  def datasets(self) -> list[Dataset]:
    """Those that this base could be asked."""
    return [
      dataset
      for dataset in self.results.datasets
      if all(entry.status != NEEDS_VISION for entry in dataset.entries.values())
    ]

  def known(self, dataset: Dataset, targets: Iterable[str]) -> DatasetStatistics | None:
    """The dataset's statistics, if the base and all of these target sets are done."""
    names = [BASE, *targets]
    if any(n not in dataset.entries or dataset.entries[n].status != DONE for n in names):
      return None
    return dataset.statistics

  def compare(self, dataset: Dataset, first: str, second: str) -> Comparison | None:
    """Two target sets, or one and the base, on a dataset where both are done."""
    held = self.known(dataset, (first, second))
    return held.compare(first, second) if held else None

  def ahead(self, dataset: Dataset, targets: str) -> Comparison | None:
    """The best of the other sets against this one."""
    held = self.known(dataset, (targets,))
    others = [n for n in self.trained if n != targets and dataset.entries[n].status == DONE]
    if held is None or not others:
      return None
    return held.compare(max(others, key=lambda n: dataset.entries[n].mean or 0.0), targets)

  def percent(
    self, datasets: Sequence[Dataset], more: str, less: str, of: str
  ) -> tuple[float, float, float] | None:
    """How far `more` is above `less` on average, in % of `of`, and the interval of that.

    None where a score is missing, or `of` has next to none.
    """
    found = [self.known(dataset, (more, less)) for dataset in datasets]
    if not found or None in found:
      return None
    draws = {
      name: np.mean([held.draws(name) for held in found if held], axis=0) for name in (more, less)
    }
    means = {
      name: np.mean([d.entries[name].mean or 0.0 for d in datasets]) for name in (more, less)
    }
    if means[of] < _LEAST_SCORE or draws[of].min() <= 0:
      return None
    low, high = interval(100 * (draws[more] - draws[less]) / draws[of])
    return float(100 * (means[more] - means[less]) / means[of]), low, high


@dataclasses.dataclass(frozen=True)
class Statement:
  """A part of a claim: its words with numbers, and whether it is so."""

  says: str
  so: bool | None


def all_of(sides: Iterable[bool | None], enough: bool = True) -> bool | None:
  """Whether all are so; one that is not refutes, and too few never affirm."""
  held = [*sides]
  if False in held:
    return False
  return True if held and enough and None not in held else None


def most_of(sides: Sequence[bool | None], enough: int = ENOUGH) -> bool | None:
  """Whether more than half are so; open below `enough` of them."""
  if len(sides) < enough:
    return None
  if 2 * sides.count(True) > len(sides):
    return True
  return False if 2 * sides.count(False) >= len(sides) else None


def threshold(low: float, high: float, at: float) -> bool | None:
  """Whether a value is at least `at`: its whole interval is, or is below."""
  return True if low >= at else False if high < at else None


def count(sides: Sequence[bool | None]) -> str:
  """'on 3 of 6, not on 1, open on 2'."""
  return (
    f'on {sides.count(True)} of {len(sides)}, not on {sides.count(False)}, '
    f'open on {sides.count(None)}'
  )


def too_few(found: int) -> str:
  """Why nothing can be said of datasets in general."""
  return f'needs at least {ENOUGH} complete datasets; there {"is" if found == 1 else "are"} {found}'


def numbers_of(comparison: Comparison | None) -> str:
  """A difference with its interval."""
  if comparison is None:
    return NOTHING
  return spread(comparison.difference, comparison.low, comparison.high)


def spearman(x_DN: np.ndarray, y_DN: np.ndarray) -> np.ndarray:
  """Rank correlation over D of each of N draws; 0 where all are equal."""
  from scipy import stats  # takes a second to import

  x_DN, y_DN = (stats.rankdata(values, axis=0) for values in (x_DN, y_DN))
  x_DN, y_DN = x_DN - x_DN.mean(axis=0), y_DN - y_DN.mean(axis=0)
  scale_N = np.sqrt((x_DN**2).sum(axis=0) * (y_DN**2).sum(axis=0))
  return (x_DN * y_DN).sum(axis=0) / np.where(scale_N > 0, scale_N, 1.0)

"""The numbers of a report, computed from a run's records and nothing else.

A configuration's score on a dataset is the mean over its test rows, each row averaged
over the seeds first. Standard errors are over those rows, so they say how far another
draw of test rows would move the score. What another training run would do to it is in
the intervals and comparisons of `lora_jax.report.statistics`.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.data.tasks import TASKS
from lora_jax.errors import UserError
from lora_jax.presets import ARTICLE_TARGETS, EQUAL_RANK
from lora_jax.records import RunDirectory, read_json
from lora_jax.report import costs, statistics
from lora_jax.report.costs import Cost, Size
from lora_jax.report.resampling import alike
from lora_jax.report.statistics import DatasetStatistics, RowScores

BASE = 'base'
DONE, DIVERGED, PARTLY_DIVERGED, MISSING = 'done', 'diverged', 'partly diverged', 'missing'
NEEDS_VISION = 'needs vision'


@dataclasses.dataclass(frozen=True)
class Entry:
  """One configuration on one dataset.

  Attributes:
    status: 'done', 'diverged', 'partly diverged' (some seeds; the numbers are those of
      the others), 'needs vision' or 'missing'.
    mean: headline score in 0..100, or None.
    se: its standard error over test rows; None below two rows, and where all are alike.
    rows: test rows.
    seed_means: seed -> headline score of that seed alone.
    difference: score minus the base's over the rows both have, or None.
    difference_se: its standard error, paired by row.
    paired_rows: test rows that the difference is over.
    other_scores: the dataset's other scores, 0..100.
    generations: predictions made, over all seeds.
    unfinished: those that were stopped by the token limit.
    diverged: seed -> why it was given up.
  """

  status: str = MISSING
  mean: float | None = None
  se: float | None = None
  rows: int = 0
  seed_means: dict[str, float] = dataclasses.field(default_factory=dict)
  difference: float | None = None
  difference_se: float | None = None
  paired_rows: int = 0
  other_scores: dict[str, float] = dataclasses.field(default_factory=dict)
  generations: int = 0
  unfinished: int = 0
  diverged: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Dataset:
  """One dataset under every configuration.

  Attributes:
    name: the task's name.
    title: the name for people.
    headline: name of the score in `Entry.mean`, or '' before anything was scored.
    rows: where its rows come from and how many there are (`rows` of a record).
    entries: configuration -> entry, every configuration of the run included.
    statistics: over the rows that all scored configurations have; None without any.
  """

  name: str
  title: str
  headline: str
  rows: dict[str, Any]
  entries: dict[str, Entry]
  statistics: DatasetStatistics | None = None

  @property
  def complete(self) -> bool:
    """Whether every configuration is done."""
    return all(entry.status == DONE for entry in self.entries.values())


@dataclasses.dataclass(frozen=True)
class Average:
  """A configuration's scores averaged over the complete datasets, each counted alike."""

  mean: float | None
  se: float | None
  difference: float | None
  difference_se: float | None


@dataclasses.dataclass(frozen=True)
class Results:
  """One arm of a run, the article's of equal rank, and the others beside it.

  Attributes:
    shared: what `RunDirectory.claim` was given.
    base: the base's record.
    configurations: names in the order of the tables, 'base' first.
    datasets: in the order of the tables.
    averages: configuration -> average; empty where no dataset is complete.
    average_statistics: of those averages, or None.
    costs: configuration -> cost, of those that were trained.
    latency: the content of latency.json with this arm's times as its 'targets', or None.
    batches: the content of batches.json, or None; of equal rank alone.
    probe: the content of probe.json, or None; of equal rank alone.
    versions: package (and 'python', 'device' and the like) -> the versions that records name.
    sizes: configuration -> how its rank was solved, where it was.
    rates: dataset -> configuration -> the learning rates that were tried, as a cell's record
      has them; empty where all trained at the settings' own.
    others: arm -> its results, of the arms beside this one.
  """

  shared: dict[str, Any]
  base: dict[str, str]
  configurations: list[str]
  datasets: list[Dataset]
  averages: dict[str, Average]
  average_statistics: DatasetStatistics | None
  costs: dict[str, Cost]
  latency: dict[str, Any] | None
  versions: dict[str, list[str]]
  sizes: dict[str, Size] = dataclasses.field(default_factory=dict)
  rates: dict[str, dict[str, dict[str, Any]]] = dataclasses.field(default_factory=dict)
  others: dict[str, 'Results'] = dataclasses.field(default_factory=dict)
  batches: dict[str, Any] | None = None
  probe: dict[str, Any] | None = None

  @property
  def complete(self) -> list[Dataset]:
    """The datasets that `averages` is over."""
    return [dataset for dataset in self.datasets if dataset.complete]

  def times(self, configuration: str) -> dict[str, Any] | None:
    """The configuration's entry of latency.json, or None."""
    return self.latency['targets'].get(configuration) if self.latency else None


def gather(run: RunDirectory) -> Results:
  """Reads a run.

  Raises:
    UserError: there is nothing to report, or a record is damaged.
  """
  records = run.cells()
  if not records or not (run.path / 'run.json').exists():
    raise UserError(f'{run.path} holds no finished cells; run `python -m experiments.ablate` first')
  shared, latency = read_json(run.path / 'run.json')['shared'], run.latency()
  arms = sorted({record['cell']['arm'] for record in records} - {'', EQUAL_RANK})
  others = {arm: _arm(arm, records, shared, latency) for arm in arms}
  results = _arm(EQUAL_RANK, records, shared, latency)
  held = {'batches': run.batches(), 'probe': run.probe()}
  return dataclasses.replace(results, others=others, **held)


def _arm(
  arm: str,
  all_records: Sequence[dict[str, Any]],
  shared: dict[str, Any],
  latency: dict[str, Any] | None,
) -> Results:
  """The base and what one arm has beside it."""
  records = [record for record in all_records if record['cell']['arm'] in ('', arm)]
  groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
  for record in records:
    groups.setdefault((record['cell']['dataset'], record['cell']['targets']), []).append(record)
  configurations = _ordered({BASE, *(name for _, name in groups)}, (BASE, *ARTICLE_TARGETS))
  names = _ordered({name for name, _ in groups}, tuple(TASKS))
  datasets = [
    _dataset(name, arm, {key: groups.get((name, key), []) for key in configurations})
    for name in names
  ]
  complete = [dataset for dataset in datasets if dataset.complete]
  known = [dataset.statistics for dataset in complete if dataset.statistics is not None]
  trained = {key: [] for key in configurations}
  for record in records:
    if 'train' in record:
      trained[record['cell']['targets']].append(record)
  if latency is not None and arm != EQUAL_RANK:
    latency = {**latency, 'targets': latency.get('arms', {}).get(arm, {})}
  made_with = [record['versions'] for record in all_records]
  return Results(
    shared=shared,
    base=all_records[0]['base'],
    configurations=configurations,
    datasets=datasets,
    averages=_averages(complete, configurations),
    average_statistics=statistics.average(known) if known and len(known) == len(complete) else None,
    costs={key: costs.cost(runs) for key, runs in trained.items() if runs},
    latency=latency,
    versions={
      package: sorted({made[package] for made in made_with if package in made})
      for package in dict.fromkeys(itertools.chain(*made_with))
    },
    sizes={key: size for key, runs in trained.items() if (size := costs.size(runs))},
    rates=_rates(records),
  )


def _rates(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
  found = {}
  for record in records:
    if 'rates' in record:
      of_dataset = found.setdefault(record['cell']['dataset'], {})
      of_dataset[record['cell']['targets']] = record['rates']
  return found


def _ordered(names: Iterable[str], first: Sequence[str]) -> list[str]:
  """`names` in the order of `first`; those it lacks follow by alphabet."""
  rank = {name: i for i, name in enumerate(first)}
  return sorted(names, key=lambda name: (rank.get(name, len(rank)), name))


def _dataset(name: str, arm: str, by_configuration: Mapping[str, list[dict[str, Any]]]) -> Dataset:
  records = [record for group in by_configuration.values() for record in group]
  scored = [record for record in records if record['status'] == DONE]
  headline = scored[0]['scores']['headline'] if scored else ''
  base_rows = _row_scores(by_configuration[BASE], headline)
  of_rows = (scored or records)[0]['rows']
  return Dataset(
    name=name,
    title=TASKS[name].title if name in TASKS else of_rows.get('title', name),
    headline=headline,
    rows=of_rows,
    entries={
      key: _entry(group, headline, base_rows if key != BASE else {})
      for key, group in by_configuration.items()
    },
    statistics=_statistics(name, arm, by_configuration, headline),
  )


def _statistics(
  dataset: str, arm: str, by_configuration: Mapping[str, list[dict[str, Any]]], headline: str
) -> DatasetStatistics | None:
  scores, seeds = {}, {}
  for key, group in by_configuration.items():
    done = sorted(
      (record for record in group if record['status'] == DONE),
      key=lambda record: record['cell']['seed'],
    )
    if done:
      scores[key] = [
        {row['id']: 100 * row[headline] for row in record['scores']['rows']} for record in done
      ]
      seeds[key] = tuple(record['cell']['seed'] for record in done)
  everyone = [seed for of_seeds in scores.values() for seed in of_seeds]
  rows = [row for row in everyone[0] if all(row in seed for seed in everyone)] if everyone else []
  if not rows:
    return None
  x_SR = {
    key: np.array([[seed[row] for row in rows] for seed in of_seeds])
    for key, of_seeds in scores.items()
  }
  table = RowScores(dataset, tuple(rows), x_SR, seeds, BASE, '' if arm == EQUAL_RANK else arm)
  return statistics.analyse(table, len(by_configuration))


def _entry(
  records: Sequence[Mapping[str, Any]], headline: str, base_rows: Mapping[str, float]
) -> Entry:
  if not records:
    return Entry()
  records = sorted(records, key=lambda record: record['cell']['seed'])
  diverged = {str(r['cell']['seed']): r['why'] for r in records if r['status'] == DIVERGED}
  done = [record for record in records if record['status'] == DONE]
  if not done:
    return Entry(status=records[0]['status'], diverged=diverged)
  rows = _row_scores(done, headline)
  mean, se = mean_and_se(list(rows.values()))
  # Rows are the same in all cells unless the data changed under the run.
  shared = [rows[row] - base_rows[row] for row in rows if row in base_rows]
  difference, difference_se = mean_and_se(shared) if shared else (None, None)
  means = [record['scores']['means'] for record in done]
  return Entry(
    status=PARTLY_DIVERGED if diverged else DONE,
    mean=mean,
    se=se,
    rows=len(rows),
    seed_means={str(r['cell']['seed']): r['scores']['means'][headline] for r in done},
    difference=difference,
    difference_se=difference_se,
    paired_rows=len(shared),
    other_scores={
      score: math.fsum(of_seed[score] for of_seed in means) / len(means)
      for score in means[0]
      if score != headline
    },
    generations=sum(len(record['scores']['rows']) for record in done),
    unfinished=sum(record['scores']['unfinished'] for record in done),
    diverged=diverged,
  )


def _row_scores(records: Iterable[Mapping[str, Any]], headline: str) -> dict[str, float]:
  """Row id -> score in 0..100, averaged over the seeds; rows that every seed has."""
  seeds = [
    {row['id']: 100 * row[headline] for row in record['scores']['rows']}
    for record in records
    if record['status'] == DONE
  ]
  if not seeds:
    return {}
  return {
    row: math.fsum(seed[row] for seed in seeds) / len(seeds)
    for row in seeds[0]
    if all(row in seed for seed in seeds)
  }


def mean_and_se(values: Sequence[float]) -> tuple[float, float | None]:
  """The mean of at least one value and its standard error.

  None for a single value, and for equal ones: they say nothing of how others would differ.
  """
  mean = math.fsum(values) / len(values)
  if alike(np.asarray(values)):
    return mean, None
  variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
  return mean, math.sqrt(variance / len(values))


def _averages(datasets: Sequence[Dataset], configurations: Sequence[str]) -> dict[str, Average]:
  if not datasets:
    return {}
  averages = {}
  for key in configurations:
    entries = [dataset.entries[key] for dataset in datasets]
    averages[key] = Average(
      mean=_average([entry.mean for entry in entries]),
      se=_average_se([entry.se for entry in entries]),
      difference=_average([entry.difference for entry in entries]),
      difference_se=_average_se([entry.difference_se for entry in entries]),
    )
  return averages


def _average(values: Sequence[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return math.fsum(known) / len(known) if len(known) == len(values) else None


def _average_se(errors: Sequence[float | None]) -> float | None:
  """Of an average over datasets, whose rows have nothing to do with each other's."""
  known = [error for error in errors if error is not None]
  if len(known) < len(errors):
    return None
  return math.sqrt(math.fsum(error**2 for error in known)) / len(known)

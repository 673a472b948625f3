"""The arms beside the article's: do target sets rank alike where they are of equal size?

At equal rank a larger set may be better for its size alone. Where each set has as many
trainable parameters as any other, what is left is where they are put.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from lora_jax.presets import EQUAL_PARAMETERS
from lora_jax.report import findings, sections, tables
from lora_jax.report.costs import Size
from lora_jax.report.document import EVEN, PLAIN, Block, Cell, Section, Table
from lora_jax.report.results import Dataset, Results
from lora_jax.report.statistics import interval
from lora_jax.report.tables import NOTHING, arm_title, code
from lora_jax.report.view import spearman

# A budget that is missed by more is told where nobody overlooks it.
TOLERANCE = 0.05
# Of fewer sets a rank correlation says next to nothing.
_FEWEST_SETS = 3

Pair = tuple[Dataset, Dataset]


@dataclasses.dataclass(frozen=True)
class Correlation:
  """How far one arm ranks target sets as the other does (Spearman), over some datasets.

  Attributes:
    sets: how many are ranked.
    datasets: how many their averages are over.
    middle, low, high: median and interval of 95 % over test rows and seeds.
    best: the highest set in each arm; '' where all are equal as printed.
  """

  sets: int
  datasets: int
  middle: float
  low: float
  high: float
  best: tuple[str, str]

  @property
  def survives(self) -> bool | None:
    """Whether the order is kept; open where the interval has both signs."""
    return True if self.low > 0 else False if self.high < 0 else None


def missed(results: Results) -> list[str]:
  """The budgets that whole ranks of the modules cannot meet, a sentence each."""
  return [
    f'at {arm_title(arm)} {code(name)} has {other.costs[name].trainable_params:,} trainable '
    f'parameters where the budget is {size.budget:,} ({100 * size.miss:+.0f} %): {_why(size)}.'
    for arm, other in results.others.items()
    for name, size in other.sizes.items()
    if abs(size.miss) > TOLERANCE
  ]


def _why(size: Size) -> str:
  if size.rank == size.most_rank:
    return f'rank {size.rank} is the smallest side of its modules'
  return f'rank {size.rank} is the nearest whole one'


def correlate(results: Results, other: Results) -> Correlation | None:
  """Over the average of all datasets that are complete in both arms; None where it says nothing."""
  return _correlation(results, other, _pairs(results, other))


def beside(results: Results) -> list[Section]:
  """A section for each other arm: its sizes, scores and claims, and how far it agrees."""
  return [_section(results, arm, other) for arm, other in results.others.items()]


def _section(results: Results, arm: str, other: Results) -> Section:
  pairs = _pairs(results, other)
  blocks: list[Block] = []
  if arm == EQUAL_PARAMETERS and other.sizes:
    budget = next(iter(other.sizes.values())).budget
    blocks.append(
      'In a second arm the rank of each target set is solved so that it trains as many numbers as '
      f'`all` does at the run’s rank, {budget:,}, as nearly as whole ranks allow. The factor on '
      'the low-rank product stays what it was. What differs between these columns is where the '
      'parameters are, no longer how many there are.'
    )
  blocks += [_survival(results, other, arm, pairs), _sizes(results, other, pairs)]
  if agreement := _agreement(results, other, pairs):
    blocks.append(agreement)
  differences = [b for b in findings.differences(other).blocks if isinstance(b, Table)]
  parts = {
    'Scores': findings.scores(other).blocks,
    'Differences to the base': differences,
    'Each seed': sections.each_seed(other).blocks,
    'The article’s claims': [findings.verdicts(other)],
  }
  for name, held in parts.items():
    if held:
      blocks += [f'{name}, at {arm_title(arm)}:', *held]
  return Section(f'At {arm_title(arm)}', blocks)


def _survival(results: Results, other: Results, arm: str, pairs: Sequence[Pair]) -> str:
  found = _correlation(results, other, pairs)
  asked = f'Does the ranking of target sets survive at {arm_title(arm)}?'
  if found is None:
    return (
      f'**{asked}** It cannot be told: no dataset is complete in both arms, or fewer than '
      f'{_FEWEST_SETS} sets are in both.'
    )
  answers = {True: 'Yes', False: 'No', None: 'It cannot be told from noise'}
  one, two = map(_named, found.best)
  best = f'highest in both: {one}' if one == two else f'highest at equal rank: {one}, here: {two}'
  return (
    f'**{asked}** {answers[found.survives]}: the rank correlation (Spearman) of the average scores '
    f'of {found.sets} sets over {sections.plural(found.datasets, "dataset")} is '
    f'{tables.spread(found.middle, found.low, found.high, 2)}; {best}.'
  )


def _sizes(results: Results, other: Results, pairs: Sequence[Pair]) -> Table:
  rows = []
  for name in other.configurations[1:]:
    size, cost = other.sizes.get(name), other.costs.get(name)
    rows.append(
      [
        code(name),
        _number(size and size.rank, 'd'),
        _number(cost and cost.trainable_params, ',d'),
        _number(size and 100 * size.miss, '+.1f', ' %'),
        *_averages(pairs, name),
        *(_number((r.times(name) or {}).get('decode_ratio'), '.2f') for r in (results, other)),
        _number(cost and cost.seconds, ',.1f'),
      ]
    )
  header = ['targets', 'rank', 'trainable parameters', 'off the budget', 'average: equal rank']
  header += ['average: here', 'change', 'decoded token: equal rank', 'decoded token: here']
  header += ['s a run']
  note = (
    f'Averages over {sections.plural(len(pairs), "dataset")} complete in both arms. Change: points '
    'above the same set at equal rank, the interval of 95 % of this pair alone; grey: it has both '
    'signs. Latency of a decoded token, base = 1.'
  )
  return Table(header, rows, 1, note)


def _averages(pairs: Sequence[Pair], name: str) -> list[Cell]:
  if not pairs or name not in pairs[0][0].entries:
    return [Cell(NOTHING)] * 3
  means = [np.mean([pair[i].entries[name].mean or 0.0 for pair in pairs]) for i in (0, 1)]
  one_CN, two_CN = _draws(pairs, [name])
  low, high = interval((two_CN - one_CN)[0])
  change = float(means[1] - means[0])
  tone = EVEN if low <= 0 <= high else PLAIN
  return [
    *(Cell(f'{mean:.1f}', round(float(mean), 6)) for mean in means),
    Cell(f'{change:+z.1f}', round(change, 6), tone, tables.reach(low, high)),
  ]


def _agreement(results: Results, other: Results, pairs: Sequence[Pair]) -> Table | None:
  """How far the arms agree on each dataset."""
  rows = []
  for pair in pairs:
    found = _correlation(results, other, [pair])
    if found:
      rows.append([pair[0].title, *_agreement_cells(found)])
  whole = _correlation(results, other, pairs)
  footer = [[f'average of {len(pairs)}', *_agreement_cells(whole)]] if whole and rows else []
  header = ['dataset', 'rank correlation', 'highest: equal rank', 'highest: here']
  note = 'Grey: the interval has both signs, so that noise does not tell the order from any other.'
  return Table(header, rows, 1, note, footer) if rows else None


def _agreement_cells(found: Correlation) -> list[Cell | str]:
  tone = EVEN if found.survives is None else PLAIN
  reach = tables.reach(found.low, found.high, 2)
  return [Cell(f'{found.middle:+z.2f}', found.middle, tone, reach), *map(_named, found.best)]


def _pairs(results: Results, other: Results) -> list[Pair]:
  """The datasets that are complete in both arms, and have scores to draw from."""
  theirs = {dataset.name: dataset for dataset in other.complete}
  both = [(d, theirs[d.name]) for d in results.complete if d.name in theirs]
  return [(d, e) for d, e in both if d.statistics is not None and e.statistics is not None]


def _correlation(results: Results, other: Results, pairs: Sequence[Pair]) -> Correlation | None:
  names = [name for name in results.configurations[1:] if name in other.configurations]
  if not pairs or len(names) < _FEWEST_SETS:
    return None
  found_N = spearman(*_draws(pairs, names))
  low, high = interval(found_N)
  mean = lambda name, i: float(np.mean([pair[i].entries[name].mean or 0.0 for pair in pairs]))
  one, two = (_highest({name: mean(name, i) for name in names}) for i in (0, 1))
  middle = round(float(np.median(found_N)), 6)
  return Correlation(len(names), len(pairs), middle, low, high, (one, two))


def _draws(pairs: Sequence[Pair], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  """Averages over datasets of these sets in each arm, (C, N); both draw the same rows."""
  held = [[pair[side].statistics for pair in pairs] for side in (0, 1)]
  one_CN, two_CN = (
    np.mean([[own.draws(name) for name in names] for own in of if own], axis=0) for of in held
  )
  # An arm with more sets to compare draws more often.
  count = min(one_CN.shape[1], two_CN.shape[1])
  return one_CN[:, :count], two_CN[:, :count]


def _highest(means: Mapping[str, float]) -> str:
  printed = {round(mean, 1) for mean in means.values()}
  return max(means, key=lambda name: round(means[name], 6)) if len(printed) > 1 else ''


def _named(best: str) -> str:
  return code(best) if best else 'none'


def _number(value: float | None, how: str, unit: str = '') -> Cell:
  return Cell(NOTHING) if value is None else Cell(f'{value:{how}}{unit}', value)

"""Which target set for which priority, with why and with what the evidence lacks.

A recommendation is read off the averages over the datasets that are complete, at equal
rank as in the article, and says which others the noise does not tell from it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from lora_jax.report import statistics
from lora_jax.report.document import Card
from lora_jax.report.results import BASE, Dataset, Results
from lora_jax.report.sections import OWN_FILE
from lora_jax.report.statistics import DatasetStatistics
from lora_jax.report.tables import NOTHING, code, spread
from lora_jax.report.view import ENOUGH, View

PRIORITIES = ('accuracy', 'balance', 'lowest latency', 'hard tasks')
# What the article calls nearly as good.
_NEAR = 0.02


@dataclasses.dataclass(frozen=True)
class _Field:
  """What there is to choose from: averages over some datasets."""

  results: Results
  datasets: Sequence[Dataset]
  means: Mapping[str, float]
  held: DatasetStatistics

  @property
  def sets(self) -> list[str]:
    return [name for name in self.means if name != BASE]

  @property
  def best(self) -> str:
    """The highest average; of equal ones the smallest adapter."""
    return min(self.sets, key=lambda name: (-round(self.means[name], 6), self.size(name)))

  def size(self, name: str) -> int:
    cost = self.results.costs.get(name)
    return cost.adapter_bytes if cost else 0

  def like(self, name: str) -> list[str]:
    """Those that the noise does not tell from it."""
    compared = {other: self.held.compare(other, name) for other in self.sets if other != name}
    return [other for other, c in compared.items() if c and not c.beyond_noise]


def recommend(results: Results) -> list[Card]:
  """A card for each of `PRIORITIES`."""
  field = _field(results, results.complete)
  if field is None:
    why = 'no dataset has scores of the base and of every target set yet'
    return [Card(priority, NOTHING, why, 'scores') for priority in PRIORITIES]
  # The lower half by the base's score, the middle one included.
  by_base = sorted(field.datasets, key=lambda d: (d.entries[BASE].mean or 0.0, d.name))
  hard = _field(results, by_base[: (len(by_base) + 1) // 2]) or field
  makers: tuple[Callable[[], Card], ...] = (
    lambda: _accuracy(field),
    lambda: _balance(field),
    lambda: _latency(field),
    lambda: _hard(hard),
  )
  return [make() for make in makers]


def _field(results: Results, datasets: Sequence[Dataset]) -> _Field | None:
  parts = [dataset.statistics for dataset in datasets if dataset.statistics is not None]
  names = [BASE, *View(results).trained]
  if not parts or len(parts) < len(datasets) or len(names) < 2:
    return None
  means = {
    name: sum(dataset.entries[name].mean or 0.0 for dataset in datasets) / len(datasets)
    for name in names
  }
  return _Field(results, datasets, means, statistics.average(parts))


def _accuracy(field: _Field) -> Card:
  best = field.best
  why = f'the highest average, {field.means[best]:.1f}: {_over_base(field, best)}'
  return _card(field, 'accuracy', best, why, _unsure(field, best))


def _balance(field: _Field) -> Card:
  best = field.best
  near = [n for n in field.sets if field.means[n] >= (1 - _NEAR) * field.means[best]]
  chosen = min(near, key=lambda name: (field.size(name), -field.means[name]))
  megabytes = field.size(chosen) / 2**20
  why = f'the smallest adapter ({megabytes:.3g} MiB) within 2 % of the highest average'
  if chosen != best:
    compared = field.held.compare(chosen, best)
    why += f'; against {code(best)} {_numbers(compared)}'
  return _card(field, 'balance', chosen, why, _unsure(field, chosen, others=False))


def _latency(field: _Field) -> Card:
  better = [n for n in field.sets if field.means[n] > field.means[BASE]] or field.sets
  times = {name: field.results.times(name) for name in better}
  known = {name: held for name, held in times.items() if held}
  if not known:
    chosen = min(better, key=lambda name: (field.size(name), -field.means[name]))
    why = 'the smallest adapter of those above the base'
    lacks = ['latency was not measured, so size stands in for it']
  else:
    chosen = min(known, key=lambda name: (known[name]['decode_ratio'], field.size(name)))
    own = known[chosen]
    why = (
      f'the shortest time for a decoded token of those above the base, {own["decode_ratio"]:.2f} '
      f'times the base’s (prefill {own["prefill_ratio"]:.2f})'
    )
    reach = own['decode_ratio_high']
    like = [n for n, t in known.items() if n != chosen and t['decode_ratio_low'] <= reach]
    lacks = [f'{_names(like)}: quartiles overlap'] if like else []
  return _card(field, 'lowest latency', chosen, why, lacks + _unsure(field, chosen, others=False))


def _hard(field: _Field) -> Card:
  best = field.best
  titles = ', '.join(dataset.title for dataset in field.datasets)
  why = f'the highest average where the base scores lowest ({titles}): {_over_base(field, best)}'
  return _card(field, 'hard tasks', best, why, _unsure(field, best))


def _card(field: _Field, title: str, chosen: str, why: str, lacks: list[str]) -> Card:
  if field.means[chosen] <= field.means[BASE]:
    why = f'no target set is above it on average; the nearest is {code(chosen)}'
    return Card(title, BASE, why, '; '.join(_evidence(field)) or 'nothing named here')
  return Card(title, code(chosen), why, '; '.join(lacks) or 'nothing named here')


def _unsure(field: _Field, chosen: str, others: bool = True) -> list[str]:
  lacks = []
  compared = field.held.compare(chosen, BASE)
  if compared and compared.beyond_noise <= 0:
    lacks.append('its gain over the base is inside the noise')
  like = field.like(chosen) if others else []
  if like:
    lacks.append(f'the noise does not tell it from {_names(like)}')
  return lacks + _evidence(field)


def _evidence(field: _Field) -> list[str]:
  lacks, results = [], field.results
  if results.base['name'] == 'tiny':
    lacks.append('a base that knows something (weights are random)')
  if any(dataset.rows['source'] == 'synthetic' for dataset in field.datasets):
    lacks.append('real rows')
  if not field.held.seeds_known:
    lacks.append('a second seed: what another training run would give is unknown')
  own = any(dataset.rows['source'] == OWN_FILE for dataset in field.datasets)
  if len(results.complete) < ENOUGH and not own:
    lacks.append(f'more datasets than {len(results.complete)}')
  if len(field.sets) == 1:
    lacks.append('a second target set')
  return lacks


def _over_base(field: _Field, name: str) -> str:
  return f'{_numbers(field.held.compare(name, BASE))} over the base'


def _numbers(compared: statistics.Comparison | None) -> str:
  return spread(compared.difference, compared.low, compared.high) if compared else NOTHING


def _names(names: Sequence[str]) -> str:
  return ', '.join(map(code, names))

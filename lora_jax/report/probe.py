"""What a probe foretells (`experiments.probe`), in a study's report or in one of its own.

In a study's report it is held against what was measured; see `lora_jax.report.foresight`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.data.tasks import TASKS
from lora_jax.ranking import (
  DECREASE,
  FEATURE_NORM,
  PER_LATENCY,
  PER_PARAMETER,
  SURE,
  Ranking,
  rank,
)
from lora_jax.report import sections, tables, terminal
from lora_jax.report.document import (
  BAD,
  BEST,
  EVEN,
  GOOD,
  PLAIN,
  Block,
  Cell,
  Document,
  Section,
  Table,
)
from lora_jax.report.foresight import ALWAYS, FEWEST_SETS, Foresight, decode_times, foresight
from lora_jax.report.results import Results
from lora_jax.report.tables import NOTHING, code

_TITLES = {
  DECREASE: 'decrease',
  PER_PARAMETER: 'per million parameters',
  PER_LATENCY: 'per time of a token',
  FEATURE_NORM: 'feature norm',
}
_WHAT = (
  'Decrease: of the loss, in nats a token, by one step of Adam at its peak rate from a fresh '
  'adapter; the step is taken on one batch and the loss is another one’s. It is a slope times a '
  'length, which can exceed the loss itself: it is to rank by, and promises nothing. A sum over '
  'modules, so a set is above its parts unless a module would do harm. '
  'Per time of a token: over the time of a decoded token with the adapter unmerged, base = 1. '
  'Feature norm: PLoP’s (Hayou et al. 2025), mean over the set’s modules; the lowest is the best.'
)


def document(held: Mapping[str, Any], latency: Mapping[str, Any] | None) -> Document:
  """A report of a probe alone.

  Args:
    held: the content of probe.json.
    latency: that of latency.json, or None.
  """
  return Document(
    title=f'What a probe foretells on {held["about"]["base"]}',
    intro=_intro(held),
    warnings=[],
    sections=[
      Section('Scores of the probe', [_scores(held, decode_times(latency)), _WHAT]),
      Section('Ranking', _ranking(held, decode_times(latency))),
      _modules(held),
    ],
  )


def text(held: Mapping[str, Any], latency: Mapping[str, Any] | None, width: int) -> str:
  """The tables for a terminal, and which set is first by each score."""
  times = decode_times(latency)
  decisions = [line.replace('`', '') for line in _decisions(held, times)]
  shown = [_scores(held, times), _ranks(held, times)]
  return '\n'.join([*(terminal.plain(table, width) for table in shown), *decisions])


def beside(results: Results) -> list[Section]:
  """What was foretold, and whether it came true; none where nothing was probed."""
  held = results.probe
  if held is None or not held['datasets']:
    return []
  times = decode_times(results.latency)
  blocks = [*_intro(held), *_checked(results), _scores(held, times), _WHAT]
  return [Section('Probe', [*blocks, *_ranking(held, times)])]


def _intro(held: Mapping[str, Any]) -> list[Block]:
  about, datasets = held['about'], held['datasets']
  counts = sorted({len(of['losses']) for of in datasets.values()})
  many = str(counts[0]) if len(counts) == 1 else f'{counts[0]} to {counts[-1]}'
  seconds = sum(of['seconds'] for of in datasets.values())
  return [
    f'Without any training, from the gradients and activations of {many} training batches of '
    f'{sections.plural(len(datasets), "dataset")} (seed {about["seed"]}), which took '
    f'{seconds:,.0f} s on {about["device"]}, rows and compilation included.'
  ]


def _checked(results: Results) -> list[Block]:
  """How the probe's order agrees with the grid's."""
  found = foresight(results)
  if not found:
    return ['**Did it foresee the grid?** It cannot be told: no two sets are in both.']
  titles = {dataset.name: dataset.title for dataset in results.datasets}
  rows = [_foresight(one, titles) for one in found if len(one.datasets) == 1]
  footer = [_foresight(one, titles) for one in found if len(one.datasets) > 1]
  header = ['dataset', 'ranked by', 'Spearman', 'Kendall', 'picks', 'highest in the grid']
  header += ['regret', *(f'regret of {code(name)}' for name in ALWAYS)]
  note = (
    'Spearman and Kendall: rank correlation of the foretold with the measured mean scores, 1 for '
    f'the same order, with the interval of 95 % over test rows and seeds; of fewer than '
    f'{FEWEST_SETS} sets there is none. Grey: the interval has both signs, so that noise does not '
    'tell the order from any other. Regret: points of the highest set above the one that is '
    'picked, and above who always takes the same set.'
  )
  return [_verdict(found), Table(header, rows, 2, note, footer)]


def _verdict(found: Sequence[Foresight]) -> str:
  """On the widest mean, a sentence for each score."""
  most = max(len(one.datasets) for one in found)
  told = []
  for one in (one for one in found if len(one.datasets) == most):
    said = 'no rank correlation'
    if one.spearman is not None:
      reach = f' ({tables.reach(*one.interval, 2)})' if one.interval else ''
      said = f'rank correlation {one.spearman:+z.2f}{reach}'
    told.append(f'by {_TITLES[one.score]} {said}, regret {one.regret:.1f} ({code(one.pick)})')
  always = next(one.always for one in found if len(one.datasets) == most)
  told += [f'always {code(name)}: regret {regret:.1f}' for name, regret in always.items()]
  over = f'On the mean of {most} datasets' if most > 1 else 'On one dataset'
  return f'**Did it foresee the grid?** {over}: {"; ".join(told)}.'


def _foresight(one: Foresight, titles: Mapping[str, str]) -> list[Cell | str]:
  named = titles[one.datasets[0]]
  if len(one.datasets) > 1:
    named = f'mean of {len(one.datasets)}'
  correlated, tau = Cell(NOTHING), Cell(NOTHING)
  if one.spearman is not None and one.kendall is not None:
    tone, reach = PLAIN, ''
    if one.interval:
      low, high = one.interval
      tone = GOOD if low > 0 else BAD if high < 0 else EVEN
      reach = tables.reach(low, high, 2)
    correlated = Cell(f'{one.spearman:+z.2f}', one.spearman, tone, reach)
    tau = Cell(f'{one.kendall:+z.2f}', one.kendall)
  points = lambda value: Cell(NOTHING) if value is None else Cell(f'{value:.1f}', value)
  always = [points(one.always.get(name)) for name in ALWAYS]
  names = [code(one.pick), code(one.best)]
  return [named, _TITLES[one.score], correlated, tau, *names, points(one.regret), *always]


def _ranking(held: Mapping[str, Any], times: Mapping[str, float]) -> list[Block]:
  """Places, decisions, and what each dataset would have."""
  blocks: list[Block] = [*_decisions(held, times), _ranks(held, times)]
  if len(held['datasets']) > 1:
    blocks.append(_each_dataset(held, times))
  return blocks


def _decisions(held: Mapping[str, Any], times: Mapping[str, float]) -> list[str]:
  """Which set is first by each score, or that it is undecided."""
  rankings = rank(held, [*held['datasets']], times).values()
  return [f'By {_TITLES[ranking.score]}: {_decision(ranking)}.' for ranking in rankings]


def _decision(ranking: Ranking) -> str:
  shares = ', '.join(f'{code(name)} {share:.0%}' for name, share in ranking.first().items())
  if ranking.decided:
    return f'{code(ranking.best)} ({shares} of the resamples)'
  return f'undecided, {code(ranking.best)} is ahead (first in: {shares} of the resamples)'


def _scores(held: Mapping[str, Any], times: Mapping[str, float]) -> Table:
  """Scores of the mean over datasets, with intervals."""
  rankings = rank(held, [*held['datasets']], times)
  rows = []
  for name in _sorted(rankings[DECREASE]):
    size = held['sets'][name]['trainable_params']
    cells = [_score(ranking, name) for ranking in rankings.values()]
    rows.append([code(name), Cell(f'{size:,}', size), *cells])
  header = ['targets', 'trainable parameters', *(_TITLES[score] for score in rankings)]
  over = sections.plural(len(held['datasets']), 'dataset')
  note = f'Means over {over}, with intervals of 95 % over batches.'
  return Table(header, rows, 1, note)


def _score(ranking: Ranking, name: str) -> Cell:
  if name not in ranking.names:
    return Cell(NOTHING)
  value, (low, high) = ranking.value(name), ranking.interval(name)
  tone = BEST if name == ranking.best and ranking.decided else PLAIN
  if ranking.score == FEATURE_NORM:
    return Cell(f'{value:.3f}', value, tone, f'{low:.3f} to {high:.3f}')
  return Cell(f'{value:.3g}', value, tone, f'{low:.3g} to {high:.3g}')


def _ranks(held: Mapping[str, Any], times: Mapping[str, float]) -> Table:
  """Places by each score, with their intervals, and how often a set is first."""
  rankings = rank(held, [*held['datasets']], times)
  rows = [
    [code(name), *(_place(ranking, name) for ranking in rankings.values())]
    for name in _sorted(rankings[DECREASE])
  ]
  header = ['targets', *(_TITLES[score] for score in rankings)]
  note = (
    'Place by each score, with the places of 95 % of the resamples of batches and the share of '
    f'them in which a set is first. A choice is called decided from {SURE:.0%} on.'
  )
  return Table(header, rows, 1, note)


def _place(ranking: Ranking, name: str) -> Cell:
  if name not in ranking.names:
    return Cell(NOTHING)
  place, (low, high) = ranking.rank(name), ranking.rank_interval(name)
  told = [] if low == high == place else [f'{low} to {high}']
  told += [f'first {share:.0%}'] if (share := ranking.first().get(name, 0.0)) else []
  return Cell(str(place), place, detail='; '.join(told))


def _each_dataset(held: Mapping[str, Any], times: Mapping[str, float]) -> Table:
  rows = []
  for dataset, of in held['datasets'].items():
    rankings = rank(held, [dataset], times).values()
    firsts = [
      Cell(code(ranking.best), detail=f'{ranking.first().get(ranking.best, 0.0):.0%}')
      for ranking in rankings
    ]
    loss = sum(of['losses']) / len(of['losses'])
    rows.append([_title(dataset, of), str(len(of['losses'])), f'{loss:.3f}', *firsts])
  scores = rank(held, [*held['datasets']], times)
  header = ['dataset', 'batches', 'loss of the base', *(_TITLES[score] for score in scores)]
  return Table(header, rows, 1, 'First on each dataset, and in which share of the resamples.')


def _modules(held: Mapping[str, Any]) -> Section:
  """What each module alone has, over the mean of datasets."""
  paths = dict.fromkeys(path for of in held['datasets'].values() for path in of['decreases'])
  alone = {path: {'modules': [path], 'trainable_params': 1} for path in paths}
  rankings = rank({**held, 'sets': alone}, [*held['datasets']], {})
  shown = [rankings[score] for score in (DECREASE, FEATURE_NORM)]
  rows = [[code(path), *(_score(ranking, path) for ranking in shown)] for path in _sorted(shown[0])]
  header = ['module', *(_TITLES[ranking.score] for ranking in shown)]
  return Section('Module by module', [Table(header, rows)])


def _sorted(ranking: Ranking) -> list[str]:
  return sorted(ranking.names, key=ranking.rank)


def _title(dataset: str, of: Mapping[str, Any]) -> str:
  return TASKS[dataset].title if dataset in TASKS else of.get('title', dataset)

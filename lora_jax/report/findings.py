"""What a run shows: scores and differences with their noise, robustness, difficulty, claims."""

from lora_jax.report import plots, tables
from lora_jax.report.advice import recommend
from lora_jax.report.article import ADVICE, SOURCE, TRADE_OFFS
from lora_jax.report.claims import DOES_NOT_HOLD, HOLDS, Verdict, judge
from lora_jax.report.document import (
  BAD,
  BEST,
  EVEN,
  GOOD,
  PLAIN,
  Block,
  Card,
  Cards,
  Cell,
  Gallery,
  Section,
  Table,
)
from lora_jax.report.results import BASE, DONE, PARTLY_DIVERGED, Dataset, Entry, Results
from lora_jax.report.sections import columns, status
from lora_jax.report.statistics import DatasetStatistics
from lora_jax.report.tables import NOTHING, arm_title, code

_MARKS = {1: '▲', -1: '▼', 0: '≈'}
_TONES = {1: GOOD, -1: BAD, 0: EVEN}
MARKS_NOTE = (
  '▲ above, ▼ below, ≈ inside the noise: a paired test on the same rows that takes the seeds into '
  'account, corrected (Holm) for all comparisons of its row of the table, at 5 %.'
)


def recommendations(results: Results) -> tuple[Section, list[Card]]:
  """A card for each priority, and the cards."""
  cards = recommend(results)
  return Section('Which modules', [Cards(cards)]), cards


def claims(results: Results) -> Section:
  """The article's claims at equal rank, and beside each verdict that of the other arms."""
  blocks: list[Block] = [verdicts(results)]
  blocks.append(
    'A claim holds where every statement that makes it up is so beyond the noise, does not hold '
    'where one is not so beyond the noise, and is undetermined otherwise: cells missing, too few '
    f'datasets, latency not measured, or noise. Claims of {SOURCE}. Its own figures pull apart in '
    'places (C1 and C4 on CoCoHD, C5 and C6, C2 and C8); each is judged alone.'
  )
  return Section('The article’s claims', blocks)


def verdicts(results: Results) -> Table:
  """What an arm says of each claim, with the verdict of the arms beside it."""
  beside = {arm_title(arm): judge(other) for arm, other in results.others.items()}
  rows = [
    [
      own.claim,
      _verdict(own),
      *(_verdict(of_arm[i]) for of_arm in beside.values()),
      own.states,
      '\n'.join(own.numbers),
    ]
    for i, own in enumerate(judge(results))
  ]
  header = ['', 'verdict', *(f'at {arm}' for arm in beside), 'claim', 'what decides']
  return Table(header, rows, len(header))


def _verdict(held: Verdict) -> Cell:
  return Cell(held.verdict, tone={HOLDS: GOOD, DOES_NOT_HOLD: BAD}.get(held.verdict, EVEN))


def scores(results: Results) -> Section:
  """The table of scores with intervals, and what is missing from it."""
  rows = [
    [
      dataset.title,
      code(dataset.headline) if dataset.headline else NOTHING,
      str(dataset.rows.get('test', NOTHING)),
      *(
        score_cell(dataset.entries[name], dataset.statistics, name, tables.best(results, row))
        for name in results.configurations
      ),
    ]
    for row, dataset in enumerate(results.datasets)
  ]
  footer = []
  if results.averages:
    held, top = results.average_statistics, tables.best(results, -1)
    cells = [
      _mean_cell(average.mean, held, name, name in top)
      for name, average in results.averages.items()
    ]
    footer.append([f'average of {len(results.complete)}', '', '', *cells])
  note = (
    'From 0 to 100, with intervals of 95 % over '
    + ('test rows and seeds. ' if _several_seeds(results) else 'test rows; ')
    + (
      ''
      if _several_seeds(results)
      else 'with one seed, what another training run would give is not known. '
    )
    + 'Bold: the highest in its row, which need not mean better than the next. The average is over '
    'the datasets on which every configuration is done.'
  )
  header = ['dataset', 'score', 'rows', *columns(results)]
  return Section('Scores', [Table(header, rows, 2, note, footer), *status(results)])


def differences(results: Results) -> Section:
  """Every configuration against the base."""
  names = results.configurations[1:]
  if not names:
    return Section('Differences to the base', ['Only the base was run.'])
  rows = [
    [dataset.title, *(difference_cell(dataset.statistics, name, BASE) for name in names)]
    for dataset in results.datasets
  ]
  footer = []
  if results.averages:
    held = results.average_statistics
    cells = [difference_cell(held, name, BASE) for name in names]
    footer.append([f'average of {len(results.complete)}', *cells])
  note = f'Points above the base, with intervals of 95 %. {MARKS_NOTE}'
  drawn = [plots.differences(dataset, names) for dataset in results.datasets]
  figures = [figure for figure in drawn if figure]
  gallery = Gallery(figures, 'Points above the base; grey: inside the noise.', in_markdown=False)
  table = Table(['dataset', *columns(results)[1:]], rows, 1, note, footer)
  return Section('Differences to the base', [table, *([gallery] if figures else [])])


def to_best(results: Results) -> Section:
  """Every configuration against the best one of its dataset."""
  if len(results.configurations) < 3:
    return Section('Differences to the best', [])
  rows = []
  for dataset in results.datasets:
    best = _best(dataset)
    if best:
      held = dataset.statistics
      cells = [
        Cell('best', 0.0, BEST) if name == best else difference_cell(held, name, best)
        for name in results.configurations
      ]
      rows.append([dataset.title, *cells])
  note = f'Points below the highest score of the row, with intervals of 95 %. {MARKS_NOTE}'
  table = Table(['dataset', *columns(results)], rows, 1, note)
  return Section('Differences to the best', [table] if rows else [])


def robustness(results: Results) -> Section:
  """Each configuration over all complete datasets: worst case, rank, wins and failures."""
  title, datasets = 'Robustness', results.complete
  if not datasets or len(results.configurations) < 2:
    return Section(title, [])
  rows = [[code(name), *_robust(datasets, name)] for name in results.configurations]
  header = ['targets', 'worst to base', 'worst to best', 'mean rank', 'best on', 'above base']
  header += ['failures', 'wins', 'losses']
  note = (
    f'Over {len(datasets)} complete {"dataset" if len(datasets) == 1 else "datasets"}. Worst: the '
    'lowest difference, and where. Rank 1 is the highest score; equal scores share their ranks. '
    'Above base and failures: datasets on which it is above or below the base beyond the noise. '
    'Wins and losses: comparisons with other configurations, beyond the noise.'
  )
  return Section(title, [Table(header, rows, 1, note)])


def accuracy_latency(results: Results) -> Section:
  """Average scores against times, drawn."""
  drawn = plots.accuracy_latency(results)
  fronts = '; '.join(f'{f.title.lower()}: {", ".join(map(code, names))}' for f, names in drawn)
  note = (
    f'Dashed, blue: the Pareto front, configurations that no other beats in both ({fronts}). Bars: '
    'intervals of 95 % of the score, quartiles of the latency. Adapters unmerged, one row at a '
    'time.'
  )
  blocks = [Gallery([figure for figure, _ in drawn], note)] if drawn else []
  return Section('Accuracy against latency', blocks)


def difficulty(results: Results) -> Section:
  """Whether low scores of the base go with a wide spread between configurations."""
  rows, points = [], []
  for dataset in results.datasets:
    names = [n for n in results.configurations[1:] if dataset.entries[n].mean is not None]
    base = dataset.entries[BASE].mean
    if base is None or len(names) < 2:
      continue
    means = {name: dataset.entries[name].mean or 0.0 for name in names}
    low, high = (pick(means, key=lambda name: means[name]) for pick in (min, max))
    wide = means[high] - means[low]
    held = dataset.statistics and dataset.statistics.compare(high, low)
    told = held and held.beyond_noise
    points.append(plots.Point(dataset.title, base, wide, kind='mark' if told else EVEN))
    rows.append(
      [
        dataset.title,
        Cell(f'{base:.1f}', base),
        Cell(f'{means[high]:.1f}', means[high], detail=code(high)),
        Cell(f'{means[low]:.1f}', means[low], detail=code(low)),
        Cell(f'{wide:.1f}', wide, PLAIN if told else EVEN, mark='' if told else '≈'),
      ]
    )
  if not rows:
    return Section('Difficulty against spread', [])
  note = 'Spread: highest minus lowest score of the target sets; ≈, grey: inside the noise.'
  blocks: list[Block] = [Table(['dataset', 'base', 'highest', 'lowest', 'spread'], rows, 1, note)]
  if len(points) > 1:
    blocks.append(Gallery([plots.difficulty(points)]))
  return Section('Difficulty against spread', blocks)


def noise(results: Results) -> Section:
  """Where the variance of single runs lies, and how many pairs can be told apart."""
  rows = []
  for dataset in results.datasets:
    held = dataset.statistics
    if held is None or not held.comparisons:
      continue
    split = held.split
    shares = split and split.shares()
    parts = [NOTHING] * 3
    if split and shares:
      found = zip((split.configuration, split.seed, split.rest), shares, strict=True)
      parts = [Cell(f'{v**0.5:.1f}', share, detail=f'{100 * share:.0f} %') for v, share in found]
    apart = sum(c.beyond_noise != 0 for c in held.comparisons.values())
    rows.append([dataset.title, *parts, f'{apart} of {len(held.comparisons)}'])
  if not rows:
    return Section('Noise', [])
  note = (
    'Standard deviations in points of the scores of single runs, and shares of their variance: '
    'between target sets, between seeds (common to all target sets), and what is left, which '
    'another run of the same cell would change. Told apart: pairs of configurations whose '
    'difference is beyond the noise.'
  )
  if not _several_seeds(results):
    note += ' Seeds and rest need two seeds or more, and two target sets.'
  header = ['dataset', 'target sets', 'seeds', 'rest', 'told apart']
  return Section('Noise', [Table(header, rows, 1, note)])


def beside_article(results: Results, cards: list[Card]) -> Section:
  """The article's two tables with this run's numbers beside them."""
  rows = []
  for held in TRADE_OFFS:
    name, average = held.targets, results.averages.get(held.targets)
    times, cost = results.times(name), results.costs.get(name)
    mean = average.mean if average else None
    rows.append(
      [
        code(name),
        held.accuracy,
        Cell(NOTHING if mean is None else f'{mean:.1f}', mean),
        held.latency,
        _number(times['decode_ratio'] if times else None, '.2f'),
        held.meant_for,
        _number(cost.trainable_params if cost else None, ',.0f'),
      ]
    )
  header = ['targets', 'accuracy: article', 'here', 'latency: article', 'here', 'meant for']
  header.append('parameters here')
  advice = [
    [said.priority, code(said.targets), said.figures, card.choice, card.why]
    for said, card in zip(ADVICE, cards, strict=True)
  ]
  return Section(
    'Beside the article',
    [
      Table(header, rows, 6),
      Table(['you want', 'article', 'its figures', 'here', 'why'], advice, 5),
      f'Article: {SOURCE}. Here: average score over the complete datasets; latency of a decoded '
      'token, base = 1.',
    ],
  )


def method() -> Section:
  """How the noise was taken into account."""
  return Section(
    'How it was computed',
    [
      'A score is the mean over test rows, each averaged over the seeds first. Intervals are '
      'percentiles of a bootstrap: rows are resampled, the same for every configuration; the error '
      'of a mean over seeds, of which there are too few to resample, is drawn from Student’s t '
      'with the variance between seeds beyond what rows explain, pooled over configurations and '
      'moved towards each one’s own. Where all rows score alike, or a pair differs alike on all, '
      'resampling has nothing to go by, and the interval is how far rows that were not drawn could '
      'move the mean: the exact binomial bound on their share (Clopper and Pearson), with the ends '
      'of the scale as their scores. Tests flip the signs of a pair’s differences row by row and '
      'add the same error. Where there is one seed, both are over rows alone. Everything random is '
      'seeded from the names of rows: the same records give the same report.'
    ],
  )


def score_cell(entry: Entry, held: DatasetStatistics | None, name: str, top: set[str]) -> Cell:
  """A score with its interval, or why there is none; bold where it is one of `top`."""
  if entry.mean is None or entry.status not in (DONE, PARTLY_DIVERGED):
    return Cell(tables.entry_score(entry))
  mark = ''
  if entry.status == PARTLY_DIVERGED:
    seeds = len(entry.diverged) + len(entry.seed_means)
    mark = f'({len(entry.diverged)} of {seeds} seeds diverged)'
  return _mean_cell(entry.mean, held, name, name in top, mark)


def _mean_cell(
  mean: float | None, held: DatasetStatistics | None, name: str, best: bool, mark: str = ''
) -> Cell:
  if mean is None:
    return Cell(NOTHING)
  interval = held.intervals.get(name) if held else None
  return Cell(
    f'**{mean:.1f}**' if best else f'{mean:.1f}',
    mean,
    BEST if best else PLAIN,
    f'{interval[0]:.1f} to {interval[1]:.1f}' if interval else '',
    mark,
  )


def difference_cell(held: DatasetStatistics | None, first: str, second: str) -> Cell:
  """A difference with its interval and what the test says of it."""
  compared = held.compare(first, second) if held else None
  if held is None or compared is None:
    return Cell(NOTHING)
  return Cell(
    f'{compared.difference:+z.1f}',
    compared.difference,
    _TONES[compared.beyond_noise],
    tables.reach(compared.low, compared.high) if held.rows > 1 else '',
    _MARKS[compared.beyond_noise],
  )


def _best(dataset: Dataset) -> str | None:
  held = dataset.statistics
  names = [n for n in held.configurations if dataset.entries[n].status == DONE] if held else []
  return max(names, key=lambda name: dataset.entries[name].mean or 0.0) if names else None


def _robust(datasets: list[Dataset], name: str) -> list[Cell]:
  to_base, to_best, ranks, best_on, wins, losses = [], [], [], 0, 0, 0
  above = below = 0
  for dataset in datasets:
    means = {key: round(entry.mean or 0.0, 6) for key, entry in dataset.entries.items()}
    own, held = means[name], dataset.statistics
    higher = sum(mean > own for mean in means.values())
    ranks.append(1 + higher + ([*means.values()].count(own) - 1) / 2)
    best_on += not higher
    to_best.append((own - max(means.values()), dataset.title))
    to_base.append((own - means[BASE], dataset.title))
    sides = {other: held.compare(name, other) for other in means if other != name} if held else {}
    signs = {other: compared.beyond_noise for other, compared in sides.items() if compared}
    above += signs.get(BASE, 0) > 0
    below += signs.get(BASE, 0) < 0
    wins += [*signs.values()].count(1)
    losses += [*signs.values()].count(-1)
  worst = [Cell(f'{d:+z.1f}', d, detail=title) for d, title in (min(to_base), min(to_best))]
  mean_rank = sum(ranks) / len(ranks)
  counts = [_number(v, 'd') for v in (best_on, above, below, wins, losses)]
  if name == BASE:
    worst[0] = counts[1] = counts[2] = Cell(NOTHING)
  return [*worst, Cell(f'{mean_rank:.1f}', mean_rank), *counts]


def _number(value: float | None, how: str) -> Cell:
  return Cell(NOTHING) if value is None else Cell(f'{value:{how}}', value)


def _several_seeds(results: Results) -> bool:
  return any(d.statistics.seeds_known for d in results.datasets if d.statistics)

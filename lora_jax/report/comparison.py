"""Several runs side by side, such as the same grid over several bases."""

from collections.abc import Mapping
from pathlib import Path

from lora_jax.report import findings, report, sections, tables
from lora_jax.report.claims import DOES_NOT_HOLD, HOLDS, judge
from lora_jax.report.document import BAD, EVEN, GOOD, Cell, Document, Section, Table
from lora_jax.report.results import BASE, Results
from lora_jax.report.tables import NOTHING, code


def write(runs: Mapping[str, Results], directory: Path) -> str:
  """Writes comparison.html and comparison.md.

  Args:
    runs: name of a run (of its directory, say) -> its numbers; at least two.
    directory: where to.

  Returns:
    Where they are, for a terminal.

  Raises:
    UserError: a file cannot be written.
  """
  report.save(describe(runs), directory, 'comparison')
  return f'comparison: {directory / "comparison.html"} and {directory / "comparison.md"}'


def describe(runs: Mapping[str, Results]) -> Document:
  """The comparison, before it is Markdown or a page."""
  named = _named(runs)
  warnings = [
    f'{code(name)}: {warning}'
    for name, results in named.items()
    for warning in report.warnings(results)
  ]
  return Document(
    title='LoRA target modules, several runs side by side',
    intro=[
      'Scores of different bases compare where rows and settings are the same; which target set '
      'is better within a run compares always.'
    ],
    warnings=warnings,
    sections=[
      _runs(named),
      _advice(named),
      _claims(named),
      _averages(named, 'Average difference to the base'),
      *_other_arms(named),
      *_datasets(named),
    ],
  )


def _other_arms(named: Mapping[str, Results]) -> list[Section]:
  """What runs have beside equal rank, run by run."""
  found = []
  for arm in dict.fromkeys(arm for results in named.values() for arm in results.others):
    those = {name: r.others[arm] for name, r in named.items() if arm in r.others}
    found.append(_averages(those, f'Average difference to the base, at {tables.arm_title(arm)}'))
  return found


def _named(runs: Mapping[str, Results]) -> dict[str, Results]:
  """Each run by its base, or where bases are alike by its own name too."""
  bases = [sections.base_name(results) for results in runs.values()]
  return {
    base if bases.count(base) == 1 else f'{base}, {name}': results
    for base, (name, results) in zip(bases, runs.items(), strict=True)
  }


def _runs(named: Mapping[str, Results]) -> Section:
  rows = []
  for name, results in named.items():
    settings = results.shared['settings']
    lora, train = settings['lora'], settings['train']
    trained = f'{train["steps"]} × {train["tokens_per_batch"]:,}'
    cells = [results.base['weights'], f'{lora["rank"]}, {lora["alpha"]:g}', trained]
    seeds = {s for d in results.datasets for e in d.entries.values() for s in e.seed_means}
    rows.append([code(name), *cells, str(len(seeds)), f'{len(results.complete)}'])
  header = ['run', 'weights', 'rank, alpha', 'steps × tokens', 'seeds', 'complete datasets']
  return Section('Runs', [Table(header, rows, 2)])


def _advice(named: Mapping[str, Results]) -> Section:
  cards = [findings.recommendations(results)[1] for results in named.values()]
  rows = [
    [of_priority[0].title, *(f'{card.choice}' for card in of_priority)]
    for of_priority in zip(*cards, strict=True)
  ]
  return Section('Which modules', [Table(['you want', *map(code, named)], rows, 1 + len(named))])


def _claims(named: Mapping[str, Results]) -> Section:
  judged = [judge(results) for results in named.values()]
  tones = {HOLDS: GOOD, DOES_NOT_HOLD: BAD}
  rows = [
    [of[0].claim, of[0].states, *(Cell(v.verdict, tone=tones.get(v.verdict, EVEN)) for v in of)]
    for of in zip(*judged, strict=True)
  ]
  header = ['', 'claim', *map(code, named)]
  return Section('The article’s claims', [Table(header, rows, len(header))])


def _averages(named: Mapping[str, Results], title: str) -> Section:
  names = dict.fromkeys(n for results in named.values() for n in results.configurations[1:])
  rows = []
  for name in names:
    cells = [
      findings.difference_cell(results.average_statistics, name, BASE) for results in named.values()
    ]
    rows.append([code(name), *cells])
  note = (
    f'Points above the base on average over the complete datasets. {findings.MARKS_NOTE} A '
    'parameter of a bigger base is not a parameter of a smaller one: see each report for sizes.'
  )
  return Section(title, [Table(['', *map(code, named)], rows, 1, note)])


def _datasets(named: Mapping[str, Results]) -> list[Section]:
  # Two files of a user's own are two datasets.
  of = lambda dataset: (dataset.name, dataset.title)
  found = []
  for dataset in dict.fromkeys(of(d) for results in named.values() for d in results.datasets):
    by_run = [
      next((d for d in results.datasets if of(d) == dataset), None) for results in named.values()
    ]
    configurations = dict.fromkeys(n for d in by_run if d for n in d.entries)
    rows = [
      [
        code(name),
        *(
          findings.score_cell(d.entries[name], d.statistics, name, set())
          if d and name in d.entries
          else Cell(NOTHING)
          for d in by_run
        ),
      ]
      for name in configurations
    ]
    found.append(Section(dataset[1], [Table(['', *map(code, named)], rows)]))
  return found

"""Writes a run's report: `report.html`, `report.md` with its drawings, `results.json`.

    print(report.write(RunDirectory(Path('runs/quick'))))

The files are a pure function of the records: no dates, no paths of this machine, the
same bytes for the same records.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from lora_jax.presets import EQUAL_RANK
from lora_jax.records import RunDirectory, write_json, write_text
from lora_jax.report import (
  arms,
  batches,
  document,
  findings,
  foresight,
  page,
  probe,
  sections,
  svg,
  terminal,
)
from lora_jax.report.claims import judge
from lora_jax.report.document import Card, Document
from lora_jax.report.results import BASE, Dataset, Results, gather
from lora_jax.report.statistics import DatasetStatistics

FORMAT = 2

_DRAWINGS = ('accuracy_prefill.svg', 'accuracy_decode.svg', 'difficulty_spread.svg')


def write(run: RunDirectory) -> str:
  """Writes the files into the run's directory.

  Args:
    run: a run with at least one record.

  Returns:
    The table of scores for a terminal, and where the report is.

  Raises:
    UserError: there is nothing to report, a record is damaged, or a file cannot be
      written.
  """
  return write_results(gather(run), run.path)


def write_results(results: Results, directory: Path) -> str:
  """Writes the files of a run whose records were read, as `write` does."""
  made, cards = describe(results)
  write_json(directory / 'results.json', as_json(results, cards))
  # A report from before may have had more to draw.
  for drawing in _DRAWINGS:
    (directory / drawing).unlink(missing_ok=True)
  save(made, directory, 'report')
  return '\n'.join(
    [
      terminal.render(results, shutil.get_terminal_size().columns),
      *(f'note: {warning.replace("`", "")}' for warning in made.warnings),
      f'report: {directory / "report.html"} and {directory / "report.md"}',
    ]
  )


def describe(results: Results) -> tuple[Document, list[Card]]:
  """The report, and its recommendations."""
  recommended, cards = findings.recommendations(results)
  made = Document(
    title=f'LoRA target modules on {sections.base_name(results)}',
    intro=sections.what_was_run(results).split('\n\n'),
    warnings=warnings(results),
    sections=[
      recommended,
      findings.claims(results),
      findings.scores(results),
      findings.differences(results),
      findings.to_best(results),
      findings.robustness(results),
      findings.accuracy_latency(results),
      *arms.beside(results),
      findings.difficulty(results),
      findings.noise(results),
      sections.each_seed(results),
      sections.rates(results),
      sections.costs(results),
      sections.latency(results),
      *batches.sections(results.batches),
      *probe.beside(results),
      sections.other_scores(results),
      findings.beside_article(results, cards),
      sections.rows_and_tasks(results),
      findings.method(),
      sections.versions(results),
    ],
  )
  return made, cards


def warnings(results: Results) -> list[str]:
  """What a reader must not overlook, a sentence each."""
  return [*sections.warnings(results), *arms.missed(results)]


def save(made: Document, directory: Path, name: str) -> None:
  """Writes a document as Markdown with its drawings, and as a page."""
  drawings = {f'{figure.name}.svg': figure.svg for figure in made.figures()}
  for drawing, element in drawings.items():
    write_text(directory / drawing, svg.standalone(element))
  write_text(directory / f'{name}.md', document.markdown(made))
  write_text(directory / f'{name}.html', page.render(made))


def as_json(results: Results, cards: list[Card]) -> dict[str, Any]:
  """The content of results.json; its lists have the order of the tables.

  `datasets` -> name -> `configurations` -> name holds each score with the
  configuration's costs and latency beside it, so that a cell can be read alone.
  """
  settings = dict(results.shared['settings'], base=sections.base_name(results))
  return {
    'format': FORMAT,
    'base': dict(results.base, name=sections.base_name(results)),
    'settings': settings,
    'preset': sections.preset_name(results.shared['settings']),
    'versions': results.versions,
    'warnings': warnings(results),
    **_arm(results),
    'latency': results.latency,
    'claims': {
      arm: [dataclasses.asdict(verdict) for verdict in judge(of_arm)]
      for arm, of_arm in {EQUAL_RANK: results, **results.others}.items()
    },
    'recommendations': [dataclasses.asdict(card) for card in cards],
    **({'arms': others} if (others := _others(results)) else {}),
    **({'foresight': _foresight(results)} if results.probe else {}),
  }


def _foresight(results: Results) -> list[dict[str, Any]]:
  return [dataclasses.asdict(one) for one in foresight.foresight(results)]


def _arm(results: Results) -> dict[str, Any]:
  """Scores and costs of one arm."""
  return {
    'order': {
      'configurations': results.configurations,
      'datasets': [dataset.name for dataset in results.datasets],
    },
    'datasets': {dataset.name: _dataset(results, dataset) for dataset in results.datasets},
    'average': {
      'datasets': [dataset.name for dataset in results.complete],
      'configurations': {
        name: {
          **dataclasses.asdict(average),
          'interval': _interval(results.average_statistics, name),
        }
        for name, average in results.averages.items()
      },
    },
    'costs': {name: dataclasses.asdict(cost) for name, cost in results.costs.items()},
    'average_comparisons': _comparisons(results.average_statistics),
    **({'rates': results.rates} if results.rates else {}),
  }


def _others(results: Results) -> dict[str, Any]:
  """The arms beside equal rank, with how each set was sized and how far the ranking agrees."""
  found = {}
  for arm, other in results.others.items():
    agreed = arms.correlate(results, other)
    found[arm] = {
      **_arm(other),
      'sizes': {name: dataclasses.asdict(size) for name, size in other.sizes.items()},
      'rank_correlation': agreed and dataclasses.asdict(agreed),
    }
  return found


def _dataset(results: Results, dataset: Dataset) -> dict[str, Any]:
  split = dataset.statistics.split if dataset.statistics else None
  rows = dict(dataset.rows, description=sections.source_of(dataset.rows))
  return {
    'title': dataset.title,
    'headline': dataset.headline,
    'rows': rows,
    'configurations': {
      name: {
        **dataclasses.asdict(entry),
        'interval': _interval(dataset.statistics, name),
        **_beside(results, name),
      }
      for name, entry in dataset.entries.items()
    },
    'comparisons': _comparisons(dataset.statistics),
    'variance': dataclasses.asdict(split) if split else None,
  }


def _beside(results: Results, name: str) -> dict[str, Any]:
  cost = results.costs.get(name)
  times = results.times(name) or {}
  return {
    'trainable_params': cost.trainable_params if cost else 0 if name == BASE else None,
    'adapter_bytes': cost.adapter_bytes if cost else 0 if name == BASE else None,
    'prefill_ratio': times.get('prefill_ratio'),
    'decode_ratio': times.get('decode_ratio'),
  }


def _interval(held: DatasetStatistics | None, name: str) -> tuple[float, float] | None:
  return held.intervals.get(name) if held else None


def _comparisons(held: DatasetStatistics | None) -> list[dict[str, Any]]:
  """Every pair once: first against second, with the corrected p."""
  return [
    {
      'first': first,
      'second': second,
      **dataclasses.asdict(compared),
      'beyond_noise': compared.beyond_noise,
    }
    for (first, second), compared in (held.comparisons if held else {}).items()
  ]

"""Writes a run's report: `report.md`, `results.json` and a plot.

    print(report.write(RunDirectory(Path('runs/quick'))))

The files are a pure function of the records: no dates, no paths of this machine, the
same bytes for the same records.
"""

import dataclasses
import shutil
from typing import Any

from lora_jax.records import RunDirectory, write_bytes, write_json, write_text
from lora_jax.report import markdown, plot, terminal
from lora_jax.report.results import BASE, Dataset, Results, gather

FORMAT = 1


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
  results = gather(run)
  image = plot.accuracy_latency(results)
  plot_file = run.path / markdown.PLOT
  if image is None:
    plot_file.unlink(missing_ok=True)
  else:
    write_bytes(plot_file, image)
  write_json(run.path / 'results.json', as_json(results))
  file = run.path / 'report.md'
  write_text(file, markdown.render(results, plotted=image is not None))
  return '\n'.join(
    [
      terminal.render(results, shutil.get_terminal_size().columns),
      *(f'note: {warning.replace("`", "")}' for warning in markdown.warnings(results)),
      f'report: {file}',
    ]
  )


def as_json(results: Results) -> dict[str, Any]:
  """The content of results.json; its lists have the order of the tables.

  `datasets` -> name -> `configurations` -> name holds each score with the
  configuration's costs and latency beside it, so that a cell can be read alone.
  """
  settings = dict(results.shared['settings'], base=markdown.base_name(results))
  return {
    'format': FORMAT,
    'base': dict(results.base, name=markdown.base_name(results)),
    'settings': settings,
    'preset': markdown.preset_name(results.shared['settings']),
    'versions': results.versions,
    'warnings': markdown.warnings(results),
    'order': {
      'configurations': results.configurations,
      'datasets': [dataset.name for dataset in results.datasets],
    },
    'datasets': {dataset.name: _dataset(results, dataset) for dataset in results.datasets},
    'average': {
      'datasets': [dataset.name for dataset in results.complete],
      'configurations': {
        name: dataclasses.asdict(average) for name, average in results.averages.items()
      },
    },
    'costs': {name: dataclasses.asdict(cost) for name, cost in results.costs.items()},
    'latency': results.latency,
  }


def _dataset(results: Results, dataset: Dataset) -> dict[str, Any]:
  rows = dict(dataset.rows, description=markdown.portable(dataset.rows['description']))
  return {
    'title': dataset.title,
    'headline': dataset.headline,
    'rows': rows,
    'configurations': {
      name: {**dataclasses.asdict(entry), **_beside(results, name)}
      for name, entry in dataset.entries.items()
    },
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

"""The report that a person reads, as Markdown."""

import dataclasses
import json
import re
from pathlib import PurePath
from typing import Any

from lora_jax.presets import PRESETS
from lora_jax.report import tables
from lora_jax.report.results import BASE, NEEDS_VISION, Entry, Results
from lora_jax.report.tables import NOTHING, code

PLOT = 'accuracy_latency.png'
# Share of generations stopped by the token limit from which the reader should know.
_MANY_UNFINISHED = 0.1


def render(results: Results, plotted: bool) -> str:
  """The whole of report.md.

  Args:
    results: the numbers.
    plotted: whether there is a plot beside it.
  """
  sections = [
    f'# LoRA target modules on {base_name(results)}',
    _what_was_run(results),
    *(f'> **Note:** {warning}' for warning in warnings(results)),
    '## Scores',
    _scores(results),
    *_status(results),
    '## Differences to the base',
    _differences(results),
    *_seeds(results),
    *_costs(results),
    *_latency(results, plotted),
    *_other_scores(results),
    '## Rows and tasks',
    _rows(results),
    '## Versions',
    '; '.join(f'{name} {", ".join(found)}' for name, found in results.versions.items()) + '.',
  ]
  return '\n\n'.join(sections) + '\n'


def base_name(results: Results) -> str:
  """The base's name; of a file given by its path, the file's."""
  return PurePath(results.base['name']).name


def warnings(results: Results) -> list[str]:
  """What keeps these scores from meaning what they seem to, a sentence each."""
  found = []
  if results.base['name'] == 'tiny':
    found.append('the base has random weights, so the scores mean nothing.')
  if any(dataset.rows['source'] == 'synthetic' for dataset in results.datasets):
    found.append(
      'rows are synthetic, so the scores say nothing of the real datasets; '
      'give `--data` real rows for that.'
    )
  return found


def preset_name(settings: dict[str, Any]) -> str | None:
  """The preset that these settings are, base and dtype aside; None: none of them."""
  for name, preset in PRESETS.items():
    values = json.loads(json.dumps(dataclasses.asdict(preset)))
    values['base'] = settings['base']
    values['train']['dtype'] = settings['train']['dtype']
    if values == settings:
      return name
  return None


def portable(description: str) -> str:
  """A source's description without the directories that only this machine has."""
  found = re.fullmatch(r'directory (/.+)(, \d+ train, \d+ test)', description)
  if not found:
    return description
  return f'directory {"/".join(PurePath(found[1]).parts[-2:])}{found[2]}'


def _what_was_run(results: Results) -> str:
  settings = results.shared['settings']
  lora, optim, train = settings['lora'], settings['optim'], settings['train']
  preset = preset_name(settings)
  seeds = sorted(
    {
      int(seed)
      for dataset in results.datasets
      for name, entry in dataset.entries.items()
      for seed in (*entry.seed_means, *entry.diverged)
      if name != BASE
    }
  )
  quantized = '' if train['quantize'] == 'none' else f', kernels stored as {train["quantize"]}'
  return (
    f'Base {code(base_name(results))} ({results.base["weights"]}, sha256 '
    f'{code(results.base["sha256"][:12])}), compared with LoRA adapters of rank {lora["rank"]}, '
    f'alpha {lora["alpha"]:g}{_variant(lora)}, one set of target modules a column. '
    f'All train alike: {train["steps"]} steps of {train["tokens_per_batch"]:,} tokens (padding '
    "included, and as near as a dataset's rows allow), rows of at most "
    f'{train["max_length"]:,} tokens, AdamW at a peak rate of '
    f'{optim["learning_rate"]:g} for A and {optim["lr_ratio"]:g} times that for B, '
    f'{train["dtype"]}{quantized}{_ends(train)}; '
    f'{_plural(len(seeds), "seed")} ({", ".join(map(str, seeds)) or NOTHING}); '
    + (f'preset {code(preset)}.' if preset else 'settings of its own, no preset.')
    + f'\n\nRows used: {_source(results)}. How many, and how each task is posed: see "Rows and '
    'tasks".'
  )


def _ends(train: dict[str, Any]) -> str:
  """Which adapter a run gives, and whether it may end early, where that is not the rule."""
  ends = ''
  if train.get('patience'):
    after = _plural(train['patience'], 'evaluation')
    ends += f', ended after {after} in a row without a lower loss on rows kept out'
  if train.get('keep_best'):
    ends += ', with the adapter of the lowest loss on rows kept out'
  return ends


def _variant(lora: dict[str, Any]) -> str:
  """What else the adapters are; fused ones are known by the names of their targets."""
  kinds = [f'dropout {lora["dropout"]:g}'] if lora['dropout'] else []
  kinds += [name for key, name in (('rslora', 'rsLoRA'), ('dora', 'DoRA')) if lora.get(key)]
  kinds += ['PiSSA'] if lora.get('init') == 'pissa' else []
  for key, what in (('rank_pattern', 'rank'), ('alpha_pattern', 'alpha')):
    kinds += [f'{what} {value:g} for {code(pattern)}' for pattern, value in lora.get(key, ())]
  kinds += [f'layers {lora["layers"]}'] if lora.get('layers') else []
  kinds += [f'{code(pattern)} trained too' for pattern in lora.get('train_also', ())]
  return ''.join(f', {kind}' for kind in kinds)


def _source(results: Results) -> str:
  data = results.shared['data']
  if data == 'synthetic':
    return 'synthetic ones, generated by this project'
  if data == 'hub':
    return 'those of the canonical datasets, from their hub'
  path = PurePath(data)
  here = path.is_absolute() or data.startswith('~')
  return f'the files in the directory {code(path.name if here else data)}'


def _scores(results: Results) -> str:
  def emphasised(text: str, name: str, row: int) -> str:
    return f'**{text}**' if name in tables.best(results, row) else text

  rows = [
    [
      dataset.title,
      code(dataset.headline) if dataset.headline else NOTHING,
      str(dataset.rows.get('test', NOTHING)),
      *(
        emphasised(tables.entry_score(dataset.entries[name]), name, row)
        for name in results.configurations
      ),
    ]
    for row, dataset in enumerate(results.datasets)
  ]
  if results.averages:
    cells = [
      emphasised(tables.score(average.mean, average.se), name, -1)
      for name, average in results.averages.items()
    ]
    rows.append([f'average of {len(results.complete)}', '', '', *cells])
  header = ['dataset', 'score', 'rows', *_columns(results)]
  several = max(len(e.seed_means) for d in results.datasets for e in d.entries.values()) > 1
  return (
    tables.markdown(header, rows, left=2)
    + '\n\nFrom 0 to 100; ± is the standard error over test rows'
    + (', each row averaged over the seeds first' if several else '')
    + '. It takes no account of how another training run would turn out. Bold: the highest in '
    'its row, which need not mean better than the next. The average is over the datasets on '
    'which every configuration is done.'
  )


def _differences(results: Results) -> str:
  names = results.configurations[1:]
  if not names:
    return 'Only the base was run.'
  rows = [
    [
      dataset.title,
      *(
        tables.difference(entry.difference, entry.difference_se)
        for entry in (dataset.entries[name] for name in names)
      ),
    ]
    for dataset in results.datasets
  ]
  if results.averages:
    averages = [results.averages[name] for name in names]
    cells = [tables.difference(average.difference, average.difference_se) for average in averages]
    rows.append([f'average of {len(results.complete)}', *cells])
  return (
    tables.markdown(['dataset', *_columns(results)[1:]], rows)
    + '\n\nPoints above the base; ± is the standard error of the difference, paired over the same '
    'test rows. ▲ or ▼: more than one standard error (chance alone does that to one in three), '
    '▲▲ or ▼▼: more than two (one in twenty).'
  )


def _seeds(results: Results) -> list[str]:
  if all(len(e.seed_means) < 2 for d in results.datasets for e in d.entries.values()):
    return []
  rows = [
    [dataset.title, *(_seed_scores(dataset.entries[name]) for name in results.configurations)]
    for dataset in results.datasets
  ]
  return ['## Each seed', tables.markdown(['dataset', *_columns(results)], rows)]


def _seed_scores(entry: Entry) -> str:
  seeds = {seed: f'{mean:.1f}' for seed, mean in entry.seed_means.items()}
  seeds |= dict.fromkeys(entry.diverged, 'diverged')
  return ', '.join(seeds[seed] for seed in sorted(seeds, key=int)) or NOTHING


def _costs(results: Results) -> list[str]:
  if not results.costs:
    return []
  rows = [
    [
      code(name),
      ', '.join(cost.modules),
      f'{cost.trainable_params:,}',
      tables.significant(cost.adapter_bytes / 2**20),
      f'{cost.tokens_per_second:,.0f}' if cost.tokens_per_second else NOTHING,
      f'{cost.seconds:,.1f}',
    ]
    for name, cost in results.costs.items()
  ]
  header = ['targets', 'modules', 'trainable parameters', 'adapter MiB', 'tokens/s', 's a run']
  return [
    '## Size and training',
    tables.markdown(header, rows, left=2)
    + '\n\nTokens/s: tokens trained on, padding not counted, after the first step. Seconds: '
    'compilation included, averaged over runs; a run that finds its programs compiled is shorter.',
  ]


def _latency(results: Results, plotted: bool) -> list[str]:
  if results.latency is None:
    return []
  targets = results.latency['targets']
  known = [name for name in results.configurations if name in targets]
  names = [*known, *sorted(targets.keys() - set(known))]

  def ratio(times: dict[str, float], work: str) -> str:
    low, high = times[f'{work}_ratio_low'], times[f'{work}_ratio_high']
    return f'{times[f"{work}_ratio"]:.2f} ({low:.2f} to {high:.2f})'

  rows = [
    [
      code(name),
      tables.significant(targets[name]['prefill_ms']),
      '1' if name == BASE else ratio(targets[name], 'prefill'),
      tables.significant(targets[name]['decode_ms']),
      '1' if name == BASE else ratio(targets[name], 'decode'),
    ]
    for name in names
  ]
  header = ['targets', 'prefill ms', 'ratio to base', 'decoded token ms', 'ratio to base']
  text = (
    tables.markdown(header, rows)
    + '\n\nAdapters unmerged, one row at a time, on '
    + f'{results.latency["device"]} in {results.latency["dtype"]}. Medians over '
    f'{results.shared["settings"]["latency_turns"]} turns, quartiles in brackets; a ratio is '
    'taken within a turn, so it need not equal the quotient of the medians.'
  )
  return ['## Latency', text, *([f'![accuracy against latency]({PLOT})'] if plotted else [])]


def _other_scores(results: Results) -> list[str]:
  rows = []
  for dataset in results.datasets:
    names = dict.fromkeys(name for e in dataset.entries.values() for name in e.other_scores)
    for name in names:
      entries = [dataset.entries[key] for key in results.configurations]
      cells = [
        f'{entry.other_scores[name]:.1f}' if name in entry.other_scores else NOTHING
        for entry in entries
      ]
      rows.append([dataset.title, code(name), *cells])
  if not rows:
    return []
  header = ['dataset', 'score', *_columns(results)]
  return ['## Other scores', tables.markdown(header, rows, left=2)]


def _rows(results: Results) -> str:
  rows = [
    [
      dataset.title,
      portable(dataset.rows['description']),
      *(str(dataset.rows.get(key, NOTHING)) for key in ('train', 'eval', 'test')),
      _batch(dataset.rows),
      *(
        str(dataset.rows.get(key, NOTHING))
        for key in ('prompt_limit', 'left_out', 'cut_completions')
      ),
    ]
    for dataset in results.datasets
  ]
  header = ['dataset', 'source', 'trained on', 'watched', 'scored']
  header += ['batch', 'prompt limit', 'left out', 'completions cut']
  notes = [f'- {d.title}: {d.rows["note"]}' for d in results.datasets if d.rows['note']]
  return '\n\n'.join(
    [
      tables.markdown(header, rows, left=2)
      + '\n\nWatched: rows of the train split kept out of training to follow the loss. Batch: rows '
      'times tokens of a training step; such a row packs several of the data where they are short. '
      'Prompt limit: tokens of a prompt, whose document is cut to fit. Left out: training '
      'rows whose prompt does not fit. Completions cut: training targets longer than an answer may '
      f'be, at most {results.shared["settings"]["eval"]["max_new_tokens"]} tokens.',
      *(['\n'.join(notes)] if notes else []),
    ]
  )


def _batch(rows: dict[str, Any]) -> str:
  return f'{rows["batch_rows"]} × {rows["row_length"]}' if 'row_length' in rows else NOTHING


def _status(results: Results) -> list[str]:
  """What is missing from the table of scores, and why."""
  lines = []
  for dataset in results.datasets:
    statuses = {entry.status for entry in dataset.entries.values()}
    if NEEDS_VISION in statuses:
      lines.append(
        f'{dataset.title} was not run: its task needs the image, which this base cannot see.'
      )
    limited = []
    for name, entry in dataset.entries.items():
      where = f'{dataset.title}, {code(name)}'
      for why in dict.fromkeys(entry.diverged.values()):
        seeds = [seed for seed, reason in entry.diverged.items() if reason == why]
        word = 'seed' if len(seeds) == 1 else 'seeds'
        lines.append(f'{where}, {word} {", ".join(seeds)}: diverged ({why}).')
      if entry.paired_rows < entry.rows and name != BASE and entry.paired_rows:
        lines.append(
          f"{where}: only {entry.paired_rows} of its {entry.rows} test rows are the base's; "
          'the difference is over those.'
        )
      if entry.unfinished > _MANY_UNFINISHED * entry.generations:
        limited.append(f'{code(name)} {entry.unfinished} of {entry.generations}')
    if limited:
      lines.append(
        f'{dataset.title}, answers stopped by the token limit before their end: '
        f'{", ".join(limited)}.'
      )
  for name, cost in results.costs.items():
    if cost.bad_steps:
      lines.append(f'{code(name)}: {_plural(cost.bad_steps, "update")} left out, not finite.')
  return ['\n'.join(f'- {line}' for line in lines)] if lines else []


def _columns(results: Results) -> list[str]:
  return [name if name == BASE else code(name) for name in results.configurations]


def _plural(count: int, noun: str) -> str:
  return f'{count} {noun}' + ('' if count == 1 else 's')

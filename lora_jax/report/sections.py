"""What was run, on what, and what it took: the sections that state rather than judge."""

import dataclasses
import json
import re
from pathlib import PurePath
from typing import Any

from lora_jax.presets import PRESETS
from lora_jax.report import tables, timings
from lora_jax.report.document import Block, Bullets, Cell, Section, Table
from lora_jax.report.results import BASE, NEEDS_VISION, Entry, Results
from lora_jax.report.tables import NOTHING, arm_title, code

# The source of rows that are a user's own.
OWN_FILE = 'file'
# Share of generations stopped by the token limit from which the reader should know.
_MANY_UNFINISHED = 0.1


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


def source_of(rows: dict[str, Any]) -> str:
  """What a record says of its rows' source, without the directories that only this machine has.

  Nor how many rows there are, where none were read.
  """
  described = rows['description']
  source = re.sub(r', \d+ train, \d+ test$', '', described)
  counts = described[len(source) :] if 'test' in rows else ''
  if found := re.fullmatch('directory (/.+)', source):
    source = f'directory {"/".join(PurePath(found[1]).parts[-2:])}'
  return source + counts


def what_was_run(results: Results) -> str:
  """Base, adapters, training and rows, in a few sentences."""
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
    f'{_peak(results)} for A and {optim["lr_ratio"]:g} times that for B, '
    f'{train["dtype"]}{quantized}{_ends(train)}; '
    f'{plural(len(seeds), "seed")} ({", ".join(map(str, seeds)) or NOTHING}); '
    + (f'preset {code(preset)}.' if preset else 'settings of its own, no preset.')
    + ''.join(f' Beside it stands an arm at {arm_title(arm)}.' for arm in results.others)
    + f'\n\nRows used: {_source(results)}. How many, and how each task is posed: see "Rows and '
    'tasks".'
  )


def _peak(results: Results) -> str:
  tried = results.shared.get('learning_rates')
  if not tried:
    return f'{results.shared["settings"]["optim"]["learning_rate"]:g}'
  rates = ', '.join(f'{rate:g}' for rate in tried)
  return f'whichever of {rates} has the lowest validation loss (see "Learning rates")'


def _ends(train: dict[str, Any]) -> str:
  """Which adapter a run gives, and whether it may end early, where that is not the rule."""
  ends = ''
  if train.get('patience'):
    after = plural(train['patience'], 'evaluation')
    ends += f', ended after {after} in a row without a lower validation loss'
  if train.get('keep_best'):
    ends += ', with the adapter of the lowest validation loss'
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
  of_file = [d.rows['description'] for d in results.datasets if d.rows['source'] == OWN_FILE]
  if of_file:
    return f'the user’s own, {of_file[0]}'
  if data == 'synthetic':
    return 'synthetic ones, generated by this project'
  if data == 'hub':
    return 'those of the canonical datasets, from their hub'
  path = PurePath(data)
  here = path.is_absolute() or data.startswith('~')
  return f'the files in the directory {code(path.name if here else data)}'


def rates(results: Results) -> Section:
  """The learning rates that were chosen, and what they were chosen by."""
  blocks: list[Block] = []
  for arm, of_arm in {'': results, **results.others}.items():
    names = [n for n in of_arm.configurations if any(n in own for own in of_arm.rates.values())]
    rows = [
      [dataset.title, *(_rate(of_arm.rates[dataset.name].get(name)) for name in names)]
      for dataset in of_arm.datasets
      if dataset.name in of_arm.rates
    ]
    if rows:
      blocks += [f'At {arm_title(arm)}:'] if arm else []
      blocks.append(Table(['dataset', *map(code, names)], rows))
  if blocks:
    blocks.append(
      'The rate with the lowest validation loss, nats a token of the completions, tried with one '
      'seed and used for all; in brackets every rate with its loss.'
    )
  return Section('Learning rates', blocks)


def _rate(held: dict[str, Any] | None) -> Cell:
  if held is None:
    return Cell(NOTHING)
  loss = lambda of: 'diverged' if of is None else f'{of:.3f}'
  told = ', '.join(f'{rate:g}: {loss(of)}' for rate, of in held['tried'])
  return Cell(f'{held["chosen"]:g}', held['chosen'], detail=told)


def each_seed(results: Results) -> Section:
  """The score of every single run, where a configuration has several."""
  blocks: list[Block] = []
  if any(len(e.seed_means) > 1 for d in results.datasets for e in d.entries.values()):
    rows = [
      [dataset.title, *(_seed_scores(dataset.entries[name]) for name in results.configurations)]
      for dataset in results.datasets
    ]
    blocks.append(Table(['dataset', *columns(results)], rows))
  return Section('Each seed', blocks)


def _seed_scores(entry: Entry) -> str:
  seeds = {seed: f'{mean:.1f}' for seed, mean in entry.seed_means.items()}
  seeds |= dict.fromkeys(entry.diverged, 'diverged')
  return ', '.join(seeds[seed] for seed in sorted(seeds, key=int)) or NOTHING


def costs(results: Results) -> Section:
  """What an adapter weighs and what training it took."""
  rows = [
    [
      code(name),
      ', '.join(cost.modules),
      Cell(f'{cost.trainable_params:,}', cost.trainable_params),
      Cell(tables.significant(cost.adapter_bytes / 2**20), cost.adapter_bytes),
      Cell(
        f'{cost.tokens_per_second:,.0f}' if cost.tokens_per_second else NOTHING,
        cost.tokens_per_second,
      ),
      Cell(f'{cost.seconds:,.1f}', cost.seconds),
    ]
    for name, cost in results.costs.items()
  ]
  header = ['targets', 'modules', 'trainable parameters', 'adapter MiB', 'tokens/s', 's a run']
  note = (
    'Tokens/s: tokens trained on, padding not counted, after the first step. Seconds: '
    'compilation included, averaged over runs; a run that finds its programs compiled is shorter.'
  )
  return Section('Size and training', [Table(header, rows, 2, note)] if rows else [])


def latency(results: Results) -> Section:
  """Times of unmerged adapters."""
  if results.latency is None:
    return Section('Latency', [])
  targets = results.latency['targets']
  known = [name for name in results.configurations if name in targets]
  names = [*known, *sorted(targets.keys() - set(known))]

  rows = [[code(name), *timings.cells(targets, name)] for name in names]
  note = (
    'Adapters unmerged, one row at a time, on '
    f'{tables.device(results.latency)} in {results.latency["dtype"]}. '
    f'{timings.note(results.shared["settings"]["latency_turns"])}'
  )
  return Section('Latency', [Table(['targets', *timings.HEADER], rows, 1, note)])


def other_scores(results: Results) -> Section:
  """The scores beside the headline ones."""
  rows = []
  for dataset in results.datasets:
    names = dict.fromkeys(name for e in dataset.entries.values() for name in e.other_scores)
    for name in names:
      found = [dataset.entries[key].other_scores.get(name) for key in results.configurations]
      cells = [Cell(NOTHING if mean is None else f'{mean:.1f}', mean) for mean in found]
      rows.append([dataset.title, code(name), *cells])
  header = ['dataset', 'score', *columns(results)]
  return Section('Other scores', [Table(header, rows, 2)] if rows else [])


def rows_and_tasks(results: Results) -> Section:
  """Which rows were used, and how each task is posed."""
  rows = [
    [
      dataset.title,
      source_of(dataset.rows),
      *(str(dataset.rows.get(key, NOTHING)) for key in ('train', 'eval', 'test')),
      _batch(dataset.rows),
      *(
        str(dataset.rows.get(key, NOTHING))
        for key in ('prompt_limit', 'answer_limit', 'left_out', 'cut_completions')
      ),
    ]
    for dataset in results.datasets
  ]
  header = ['dataset', 'source', 'trained on', 'validation', 'scored']
  header += ['batch', 'prompt limit', 'answer limit', 'left out', 'completions cut']
  notes = [f'{d.title}: {note}' for d in results.datasets if (note := _note(d.rows))]
  most = results.shared['settings']['eval']['max_new_tokens']
  note = (
    'Validation: rows of the train split that are not trained on, for the validation loss. '
    'Batch: rows times tokens of a training step; such a row packs several of the data where they '
    'are short. Prompt limit: tokens of a prompt, whose document is cut to fit. Answer limit: '
    f'those of an answer, at most {most} tokens. Left out: training rows whose prompt does '
    'not fit. Completions cut: training targets longer than an answer may be.'
  )
  return Section(
    'Rows and tasks', [Table(header, rows, 2, note), *([Bullets(notes)] if notes else [])]
  )


def _note(rows: dict[str, Any]) -> str:
  """What is to be known of a dataset's rows beside their numbers."""
  notes = [rows['note']]
  if asked := rows.get('in_test'):
    notes.append(f'Left out of training, since test rows ask the same: {plural(asked, "row")}.')
  test, there_are = rows.get('test', 0), rows.get('test_of', 0)
  if test < there_are:
    notes.append(
      f'Scored are the first {test:,} of {there_are:,} test rows, in their order; standard errors '
      'take them to be like the rest.'
    )
  return ' '.join(filter(None, notes))


def _batch(rows: dict[str, Any]) -> str:
  return f'{rows["batch_rows"]} × {rows["row_length"]}' if 'row_length' in rows else NOTHING


def status(results: Results) -> list[Block]:
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
      lines.append(f'{code(name)}: {plural(cost.bad_steps, "update")} left out, not finite.')
  return [Bullets(lines)] if lines else []


def versions(results: Results) -> Section:
  """What the records were made with."""
  found = (f'{name} {", ".join(held)}' for name, held in results.versions.items())
  return Section('Versions', ['; '.join(found) + '.'])


def columns(results: Results) -> list[str]:
  """The configurations as heads of columns."""
  return [name if name == BASE else code(name) for name in results.configurations]


def plural(count: int, noun: str) -> str:
  """'1 seed', '2 seeds'."""
  return f'{count} {noun}' + ('' if count == 1 else 's')

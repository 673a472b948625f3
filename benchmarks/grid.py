"""A grid of configurations as one run of ours, beside the same grid in a loop of PEFT runs.

  python -m benchmarks.grid                          the article's eight on generated MedMCQA rows
  python -m benchmarks.grid --data=DIR --test_rows=200
  python -m benchmarks.grid --dataset=cocohd --targets=qkv --targets=o_proj

Our side is `python -m experiments.ablate` itself, started with nothing compiled; it counts
until the last cell's record stands on disk (what it then does, timing adapters, PEFT's
loop does not do). PEFT's side is `benchmarks/peft_grid.py`: one process that loads the base
once and goes through the configurations with `get_peft_model` and `unload`. Each dtype is a
run; the faster by total time is the one to beat.

Equal on both sides: weights, target modules, rank, alpha, learning rates, the rows to train
on and how many of them each configuration sees, the test rows and their prompts, how
predictions come about (the likeliest choice from logits of the last position alone; greedy
generation with a cache), the score. The base is scored too. Different: batches (to train on
ours are packed and PEFT's 8 rows padded to their longest; to score, ours are packed where
prompts are only read, and else both sides' prompts are ordered by length and padded), the
schedule (PEFT's rate is constant) and gradient clipping (ours only). So scores agree within
noise and no better.
"""

import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.box
import rich.table
from absl import app, flags, logging
from rich.console import Console

from benchmarks import batches as batching
from benchmarks import peer, side
from benchmarks.train import DTYPES, PEER_ROWS
from experiments import _launcher
from lora_jax import lora, overlap
from lora_jax.data import builder, encode, pipeline, sources, tasks
from lora_jax.data.task import Task
from lora_jax.errors import UserError, exit_on_user_error
from lora_jax.hub import bases, huggingface
from lora_jax.presets import ARTICLE_TARGETS

# What both sides do with their adapters; the rest of our settings are the preset's.
_LEARNING_RATE, _LR_RATIO = 5e-4, 4.0


@dataclasses.dataclass(frozen=True)
class Options:
  """What to compare; see the flags."""

  base: str
  data: str | None
  dataset: str
  targets: tuple[str, ...]
  rank: int
  steps: int
  tokens_per_batch: int
  max_length: int
  train_rows: int
  test_rows: int
  batch_rows: int
  max_new_tokens: int
  dtype: str
  peer_dtypes: tuple[str, ...]
  # Of PEFT's batches; 0: as many as ours hold on average.
  peer_rows: int = PEER_ROWS


@dataclasses.dataclass(frozen=True)
class Grid:
  """What our side did.

  Attributes:
    measured: 'train_seconds', 'score_seconds', 'total_seconds', 'programs', 'peak_bytes'.
    cells: targets ('base' for none) -> the cell's record.
  """

  measured: dict[str, Any]
  cells: dict[str, dict[str, Any]]


def run_ours(options: Options, python: str = sys.executable) -> Grid:
  """Runs the main job on the grid, in a process of its own.

  Raises:
    UserError: it failed, or a cell was not scored.
  """
  local_base = Path(options.base).expanduser()
  with tempfile.TemporaryDirectory() as folder:
    out, record = Path(folder) / 'run', Path(folder) / 'record.json'
    command = [
      *(python, '-m', 'benchmarks.grid_side', f'--record={record}', '--'),
      *(f'--targets={targets}' for targets in options.targets),
      f'--base={local_base.resolve() if local_base.exists() else options.base}',
      f'--datasets={options.dataset}',
      *([f'--data={Path(options.data).expanduser().resolve()}'] if options.data else []),
      f'--rank={options.rank}',
      f'--alpha={2 * options.rank}',
      f'--lr={_LEARNING_RATE}',
      f'--lr_ratio={_LR_RATIO}',
      f'--steps={options.steps}',
      # PEFT's loop keeps no rows out either.
      '--eval_rows=0',
      f'--tokens_per_batch={options.tokens_per_batch}',
      f'--max_length={options.max_length}',
      f'--train_rows={options.train_rows}',
      f'--test_rows={options.test_rows}',
      f'--batch_rows={options.batch_rows}',
      f'--max_new_tokens={options.max_new_tokens}',
      f'--dtype={options.dtype}',
      f'--out={out}',
    ]
    start = time.time()
    # A program that an earlier run compiled would not be compiled again.
    cold = {'JAX_ENABLE_COMPILATION_CACHE': '0'}
    measured = side.run(command, record, 'our side of the grid', cold)
    files = [*(out / 'cells').glob('*.json')]
    measured['total_seconds'] = max(file.stat().st_mtime for file in files) - start
    cells = {}
    for file in files:
      cell = json.loads(file.read_text())
      if cell['status'] != 'done':
        raise UserError(f'our side of the grid: {file.name} is {cell["status"]}, not done')
      cells[cell['cell']['targets']] = cell
  # Shares of their waves' time, that of compiling the step ahead included.
  trained = [cell['train']['seconds'] for cell in cells.values() if 'train' in cell]
  measured['train_seconds'] = math.fsum(trained)
  return Grid(measured, cells)


class Rows:
  """A dataset's rows as both sides see them."""

  def __init__(self, options: Options, base: bases.Base, task: Task):
    """Prepares and encodes them as the main job does."""
    source = (
      sources.Directory(Path(options.data).expanduser())
      if options.data
      else sources.Synthetic(seed=0, train=options.train_rows, test=options.test_rows)
    )
    with tempfile.TemporaryDirectory() as folder:
      splits = builder.prepare(task, source, folder)
      max_length = min(options.max_length, base.config.max_length)
      self.limits = encode.budget(task, max_length, options.max_new_tokens)
      examples = overlap.apart(task, splits['train'][: options.train_rows], splits['test'])
      self.train = pipeline.encode_split(task, examples, base.tokenizer, self.limits)
      self.test = [*splits['test'][: options.test_rows]]
    self.prompts = [
      encode.encode_prompt(task, example, base.tokenizer, self.limits.prompt)
      for example in self.test
    ]
    # Rows of like length share a batch, as on our side.
    self.order = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))

  def write_prompts(self, path: Path, base: bases.Base, task: Task, batch_rows: int) -> None:
    """The prompts in batches, as `benchmarks/peft_grid.py` reads them."""
    arrays: dict[str, Any] = {}
    for number, at in enumerate(range(0, len(self.order), batch_rows)):
      chosen = self.order[at : at + batch_rows]
      shape = (len(chosen), max(len(self.prompts[i]) for i in chosen))
      tokens_BT = np.full(shape, base.tokenizer.pad_id, np.int32)
      mask_BT = np.zeros(shape, np.int32)
      for row, i in enumerate(chosen):
        tokens_BT[row, shape[1] - len(self.prompts[i]) :] = self.prompts[i]
        mask_BT[row, shape[1] - len(self.prompts[i]) :] = 1
      arrays |= {f'tokens_{number}': tokens_BT, f'mask_{number}': mask_BT}
      if task.choices is not None:
        ids = [
          [base.tokenizer.encode_plain(choice)[0] for choice in task.choices(self.test[i])]
          for i in chosen
        ]
        arrays[f'choices_{number}'] = np.asarray(ids, np.int32)
    np.savez(path, **arrays)

  def mean_score(self, said: Sequence[Sequence[int]], base: bases.Base, task: Task) -> float:
    """The headline's mean over the test rows, times 100, of what a peer said in `order`."""
    scores = []
    for i, answer in zip(self.order, said, strict=True):
      if task.choices is not None:
        prediction = task.choices(self.test[i])[answer[0]]
      else:
        eos = base.tokenizer.eos_id
        ids = answer[: answer.index(eos)] if eos in answer else answer
        prediction = base.tokenizer.decode(ids)
      scores.append(task.score(prediction, self.test[i])[task.headline])
    return 100 * float(np.mean(scores))


def mean_rows(cells: Mapping[str, Mapping[str, Any]], steps: int) -> int:
  """How many rows a batch of our side held on average."""
  seen = [cell['train']['examples'] for cell in cells.values() if 'train' in cell]
  return max(1, round(sum(seen) / len(seen) / steps))


def run_theirs(
  options: Options,
  base: bases.Base,
  task: Task,
  rows: Rows,
  cells: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
  """Runs the loop in every dtype of the peer's: dtype -> its record.

  Args:
    options: what to compare.
    base: the frozen model.
    task: the dataset.
    rows: its rows.
    cells: the records of our side, which say how many rows each configuration saw.
  """
  train = rows.train[: cells['base']['rows']['train']]
  order = np.random.default_rng(0).permutation(len(train))
  whole = [batching.whole(train[i]) for i in order]
  configurations: list[dict[str, Any]] = [{'name': 'base', 'modules': [], 'rows': 0}]
  for targets in options.targets:
    paths = lora.resolve(targets, base.params)
    configurations.append(
      {
        'name': targets,
        'modules': [path.rsplit('/', 1)[-1] for path in paths],
        'rows': cells[targets]['train']['examples'],
      }
    )
  work = {
    'rank': options.rank,
    'learning_rate': _LEARNING_RATE,
    'lr_ratio': _LR_RATIO,
    'configurations': configurations,
    'max_new_tokens': rows.limits.completion,
    'eos_id': base.tokenizer.eos_id,
    'pad_id': base.tokenizer.pad_id,
  }
  records = {}
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / 'work.json').write_text(json.dumps(work))
    huggingface.save(folder / 'base', base.config, base.params, dtype='float32')
    peer_rows = options.peer_rows or mean_rows(cells, options.steps)
    batching.write_padded(
      folder / 'batches.npz', batching.pad(whole, peer_rows, base.tokenizer.pad_id)
    )
    rows.write_prompts(folder / 'prompts.npz', base, task, options.batch_rows)
    for dtype in options.peer_dtypes:
      command = [
        *(str(peer.python()), '-m', 'benchmarks.peft_grid'),
        f'--weights={folder / "base"}',
        f'--dtype={dtype}',
        f'--work={folder / "work.json"}',
        f'--batches={folder / "batches.npz"}',
        f'--prompts={folder / "prompts.npz"}',
        f'--out={folder / "record.json"}',
      ]
      start = time.time()
      record = side.run(command, folder / 'record.json', "PEFT's side of the grid")
      record['total_seconds'] = time.time() - start
      for cell in record['cells']:
        cell['score'] = rows.mean_score(cell.pop('said'), base, task)
      records[dtype] = record
      print(f'PEFT {dtype}: {record["total_seconds"]:.0f} s', file=sys.stderr)
  return records


def compare(options: Options, python: str = sys.executable) -> dict[str, Any]:
  """Runs both sides.

  Returns:
    'ours' and 'PEFT <dtype>' -> 'train_seconds', 'score_seconds', 'total_seconds',
    'peak_bytes' and 'cells': targets -> 'score' and 'real_tokens'; ours has 'programs' too.

  Raises:
    UserError: a dataset that cannot be posed, a peer that cannot be installed, or a side
      that failed.
  """
  peer.check_targets(options.targets)
  (task,) = tasks.by_names([options.dataset])
  if task.needs_vision:
    raise UserError(f'--dataset={options.dataset} needs a base that sees; give another')
  peer.python()
  base = bases.load(options.base)
  rows = Rows(options, base, task)
  ours = run_ours(options, python)
  print(f'ours: {ours.measured["total_seconds"]:.0f} s', file=sys.stderr)
  theirs = run_theirs(options, base, task, rows, ours.cells)
  means = lambda cell: cell['scores']['means'][cell['scores']['headline']]
  dtype = ours.cells['base']['settings']['train']['dtype']
  held = {
    name: {'score': means(cell), 'real_tokens': cell.get('train', {}).get('tokens', 0)}
    for name, cell in ((name, ours.cells[name]) for name in ('base', *options.targets))
  }
  records: dict[str, Any] = {f'lora_jax {dtype}': {**ours.measured, 'cells': held}}
  for dtype, record in theirs.items():
    side.check_alike(ours.measured, record, f'PEFT {dtype}')
    held = {
      cell['name']: {'score': cell['score'], 'real_tokens': cell['real_tokens']}
      for cell in record['cells']
    }
    records[f'PEFT {dtype}'] = {**record, 'cells': held}
  return records


def table(records: dict[str, Any]) -> rich.table.Table:
  """Seconds and memory by part, a column a side; ratios are of the faster PEFT to ours."""
  ours, *theirs = records
  best = min(theirs, key=lambda name: records[name]['total_seconds'])
  out = rich.table.Table(
    title=f'{len(records[ours]["cells"]) - 1} configurations and the base; ratio: {best} to ours',
    box=rich.box.SIMPLE,
  )
  out.add_column('', no_wrap=True)
  for name in (*records, 'ratio'):
    out.add_column(name, no_wrap=True, justify='right')

  def line(what, value, unit):
    values = {name: value(record) for name, record in records.items()}
    ratio = values[best] / values[ours] if values[ours] > 0 else float('nan')
    out.add_row(what, *(unit.format(value) for value in values.values()), f'{ratio:.2f}x')

  rest = lambda r: r['total_seconds'] - r['train_seconds'] - r['score_seconds']
  line('training, s', lambda r: r['train_seconds'], '{:.1f}')
  line('scoring, s', lambda r: r['score_seconds'], '{:.1f}')
  line('load and all else, s', rest, '{:.1f}')
  line('total, s', lambda r: r['total_seconds'], '{:.1f}')
  line('peak memory, GiB', lambda r: r['peak_bytes'] / 2**30, '{:.2f}')
  return out


def scores(records: dict[str, Any]) -> rich.table.Table:
  """Each configuration's score and real tokens on all sides."""
  out = rich.table.Table(title='score (real tokens trained)', box=rich.box.SIMPLE)
  out.add_column('', no_wrap=True)
  for name in records:
    out.add_column(name, no_wrap=True, justify='right')
  for targets in next(iter(records.values()))['cells']:
    cells = [record['cells'][targets] for record in records.values()]
    out.add_row(targets, *(f'{c["score"]:.1f} ({c["real_tokens"]})' for c in cells))
  return out


def show(records: dict[str, Any]) -> None:
  """Prints both tables, and how many programs ours compiled."""
  console = Console(width=max(Console().width, 100))
  console.print(table(records))
  console.print(scores(records))
  ours = next(iter(records.values()))
  seconds = ours['compiler_seconds']
  print(f'ours compiled {ours["programs"]} programs, {seconds:.1f} s of the compiler, within these')


if __name__ == '__main__':
  _FLAGS = {
    'base': flags.DEFINE_string('base', 'smollm2-135m-instruct', 'Name or path of the base.'),
    'data': flags.DEFINE_string('data', None, 'Folder with the dataset; none: generated rows.'),
    'dataset': flags.DEFINE_string('dataset', 'medmcqa', 'Whose rows.'),
    'targets': flags.DEFINE_multi_string(
      'targets', list(ARTICLE_TARGETS), "A set of targets; repeat for more. The article's eight."
    ),
    'rank': flags.DEFINE_integer('rank', 8, 'Rank.', lower_bound=1),
    'steps': flags.DEFINE_integer('steps', 20, 'Steps of ours.', lower_bound=1),
    'tokens_per_batch': flags.DEFINE_integer('tokens_per_batch', 2048, 'Of our packed batches.'),
    'max_length': flags.DEFINE_integer('max_length', 1024, 'Longest row, in tokens.'),
    'train_rows': flags.DEFINE_integer('train_rows', 400, 'Rows to train on.', lower_bound=1),
    'test_rows': flags.DEFINE_integer('test_rows', 64, 'Rows to score.', lower_bound=1),
    'batch_rows': flags.DEFINE_integer('batch_rows', 16, 'Prompts scored together.', lower_bound=1),
    'max_new_tokens': flags.DEFINE_integer('max_new_tokens', 160, 'Longest prediction.'),
    'peer_rows': flags.DEFINE_integer(
      'peer_rows', PEER_ROWS, "Of PEFT's batches; 0: as many as ours hold.", lower_bound=0
    ),
    'dtype': flags.DEFINE_enum('dtype', 'auto', ['auto', *DTYPES], 'Of our side.'),
    'peer_dtypes': flags.DEFINE_multi_enum(
      'peer_dtypes', list(DTYPES), DTYPES, "Of PEFT's side; repeat for more."
    ),
  }
  _JSON = flags.DEFINE_string('json', None, 'Where to keep the records.')

  def _main(_):
    logging.set_verbosity(logging.WARNING)
    # This process trains nothing; an accelerator's memory is for those that do.
    jax.config.update('jax_platforms', 'cpu')
    with exit_on_user_error():
      side.check_json(_JSON.value)
      values: dict[str, Any] = {name: flag.value for name, flag in _FLAGS.items()}
      values['targets'] = tuple(dict.fromkeys(map(lora.canonical, values['targets'])))
      values['peer_dtypes'] = tuple(dict.fromkeys(values['peer_dtypes']))
      records = compare(Options(**values))
      if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(records, indent=2))
      show(records)

  # Inherited by every side.
  _launcher.prefer_huge_pages()
  app.run(_main)
